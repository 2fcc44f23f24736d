// What all parts share: elements, numbers for people, messages, and talking to the server.

export const $ = (id) => document.getElementById(id);

/** An element: el("p", {class: "a", onclick: f}, "text", child). Text is never read as HTML. */
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** A group of radio buttons that look like chips: arrow keys move in it, as in any group. */
export function chips(box, name, options, value, onchange) {
  const before = box.contains(document.activeElement);
  box.replaceChildren(...options.map(([option, text, hint]) => el("label", {title: hint},
    el("input", {type: "radio", name, value: option, checked: String(option) === String(value), onchange: (e) => onchange(e.target.value)}),
    el("span", {}, text))));
  if (before) box.querySelector("input:checked")?.focus();
}

export const picked = (box) => box.querySelector("input:checked")?.value;

export const seconds = (value) =>
  value >= 0.9995 ? `${value.toFixed(2)} s` : value >= 0.00095 ? `${Math.round(value * 1000)} ms` : "0 ms";

export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

export const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
};

/** A message at the edge of the page, over nothing one can press. */
export function say(text, bad = false) {
  const toast = el("div", {class: bad ? "toast bad" : "toast"}, text, el("button", {"aria-label": "Dismiss", onclick: () => toast.remove()}, "×"));
  $("toasts").replaceChildren(...[...$("toasts").children].slice(-2), toast);
  setTimeout(() => toast.remove(), bad ? 8000 : 3000);
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // No permission, or no https: the old way.
    const box = el("textarea", {class: "away"}, text);
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
  say(`${what} copied.`);
}

export class Refused extends Error {
  constructor(message, type, after, field) {
    super(message);
    this.type = type;
    this.after = after;
    this.field = field;
  }
}

async function refused(answer) {
  let error = {message: `the server answered ${answer.status}.`, type: "refused"};
  try {
    error = (await answer.json()).error;
  } catch { /* No sentence of ours. */ }
  return new Refused(error.message, error.type, Number(answer.headers.get("retry-after")) || 0, error.param);
}

export async function get(path) {
  const answer = await fetch(path, {cache: "no-store"});
  if (!answer.ok) throw await refused(answer);
  return answer.json();
}

export async function post(path, body, options = {}) {
  const json = !(body instanceof Blob);
  const answer = await fetch(path, {
    method: "POST",
    headers: {"content-type": json ? "application/json" : "application/octet-stream"},
    body: json ? JSON.stringify(body) : body,
    ...options,
  });
  if (!answer.ok) throw await refused(answer);
  return answer.json();
}

/** The lines of a streamed answer, each parsed. */
export async function* lines(path, body, signal) {
  const answer = await fetch(path, {
    method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body), signal,
  });
  if (!answer.ok) throw await refused(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
  }
}

export function blobOf(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  return new Blob([bytes], {type: "image/png"});
}
