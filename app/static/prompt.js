// The prompt: its height, what the model understood of it, and the words one can click.

import * as form from "./form.js";
import {$, el, plural, post} from "./util.js";

let timer = null, asked = 0;

export function start(generate, stop) {
  const box = $("prompt");
  box.addEventListener("input", () => { fit(); understand(); form.changed("typed"); });
  box.addEventListener("scroll", () => { $("marks").scrollTop = box.scrollTop; });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      generate();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("large").open) stop();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  });
  $("examples").append(...form.EXAMPLES.map((text) => el("button", {class: "chip", onclick: () => write(text)}, text)));
  form.onchange((what) => {
    if (what !== "typed") {
      fit();
      examples();
      understand();
    }
  });
  new ResizeObserver(fit).observe(box.parentElement);
}

function write(text) {
  $("prompt").value = text;
  form.changed("restored");
}

function fit() {
  const box = $("prompt");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, 140)}px`;
}

/** A model of classes has its own examples. */
function examples() {
  const names = form.modelOf($("model").value)?.limits?.class_names;
  const texts = names ? names.slice(0, 24) : form.EXAMPLES;
  if ([...$("examples").children].map((chip) => chip.textContent).join() === texts.join()) return;
  $("examples").replaceChildren(...texts.map((text) => el("button", {class: "chip", onclick: () => write(text)}, text)));
  if (names && !names.includes($("prompt").value)) write(names[0]);
}

function understand() {
  clearTimeout(timer);
  timer = setTimeout(read, 80);
}

async function read() {
  const mine = ++asked, text = $("prompt").value;
  let said = {};
  try {
    said = await post("/api/tokens", {model: $("model").value || "student", prompt: text});
  } catch { /* Nothing is known of it then. */ }
  if (mine !== asked || text !== $("prompt").value) return;
  mark(text, said);
  vocabulary(said.words);
}

/** Words that are unknown or past the limit, marked in place, and the counter. */
function mark(text, {tokens, limit, unknown = [], past = []}) {
  const spans = [...unknown.map(([a, b]) => [a, b, "unknown"]), ...past.map(([a, b]) => [a, b, "past"])].sort((a, b) => a[0] - b[0]);
  const letters = [...text], parts = [];
  let at = 0;
  for (const [a, b, kind] of spans) {
    if (a < at || a === b) continue;
    parts.push(letters.slice(at, a).join(""), el("mark", {class: kind}, letters.slice(a, b).join("")));
    at = b;
  }
  $("marks").replaceChildren(...parts, letters.slice(at).join(""));
  if (!limit) {
    $("understood").replaceChildren();
    return;
  }
  const words = [...new Set(unknown.map(([a, b]) => letters.slice(a, b).join("")))];
  $("understood").replaceChildren(
    el("span", {class: tokens > limit ? "bad" : ""}, `${tokens} of ${limit} tokens`),
    ...(words.length ? [el("span", {class: "unknown"}, `does not know: ${words.slice(0, 6).join(", ")}`)] : []),
    ...(past.length ? [el("span", {class: "bad"}, `${plural(past.length, "word")} past the limit, not read`)] : []),
  );
}

function vocabulary(words) {
  $("vocabulary").hidden = !words;
  if (!words || $("words").childElementCount === words.length) return;
  // Few words are worth the place they take, where there is some.
  $("vocabulary").open = words.length <= 60 && innerWidth > 860;
  $("words").replaceChildren(...words.map((word) => el("button", {class: "chip", onclick: () => {
    const box = $("prompt"), before = box.value;
    write(before && !/\s$/.test(before) ? `${before} ${word}` : before + word);
  }}, word)));
}
