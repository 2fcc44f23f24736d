// Create: images as one types, one, four or eight at once, with where the time went.

import {draw, leave, onbusy} from "./draw.js";
import * as form from "./form.js";
import {remember} from "./past.js";
import * as picture from "./picture.js";
import {$, chips, copy, el, picked, plural, say, seconds} from "./util.js";

const PLACE = "create";
let shown = [], chosen = 0, settle = null, waiting = false, drawing = false;

export function start() {
  chips($("count"), "count", [[1, "1"], [4, "4"], [8, "8"]], 1, () => generate());
  $("go").onclick = () => generate();
  $("remix").onclick = () => { form.roll(); generate(); };
  $("copy").onclick = () => copy(JSON.stringify(shown[chosen].settings, null, 2), "Settings");
  $("share").onclick = () => copy(form.link(shown[chosen].settings), shown[chosen].settings.image ? "Link, without the picture," : "Link");
  $("from").onclick = () => picture.choose(new File([shown[chosen].blob], "drawn.png", {type: "image/png"}));
  picture.start(() => form.changed());
  $("dice").onclick = () => { form.roll(); form.lock(true); form.changed(); };
  $("lock").onclick = () => form.lock(!form.locked());
  $("live").onchange = () => form.changed();
  $("embed").onchange = () => { if (shown.length) generate(); };
  for (const name of ["seed", "negative", "guidance"]) $(name).oninput = () => form.changed();
  $("model").onchange = () => { form.refreshModel(); load(); form.changed(); };
  form.onchange(react);
  onbusy((busy) => document.body.classList.toggle("busy", busy));
}

async function load() {
  const model = form.modelOf($("model").value);
  if (model && model.state === "idle") {
    try {
      await fetch("/api/load", {method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify({model: model.id})});
    } catch { /* The page says already that the server is gone. */ }
  }
}

/** Something in the form changed: draw it live, or say that the image is of before. */
function react(what) {
  form.showPicture();
  if (what === "models") return;
  stale();
  if (fresh() && shown.length === count()) return;
  if ($("create").hidden || !$("live").checked || form.isMany(form.modelOf($("model").value) ?? {})) return;
  live();
}

/** The newest wins: while one is drawn the next waits, and what was typed between them is never drawn. */
async function live() {
  clearTimeout(settle);
  if (drawing) {
    waiting = true;
    return;
  }
  if (!form.tidy($("prompt").value)) return;
  drawing = true;
  try {
    await paint(form.request(), {n: count(), live: true, embed: $("embed").checked}, false);
  } finally {
    drawing = false;
  }
  if (waiting) {
    waiting = false;
    live();
  } else settle = setTimeout(() => shown.length && fresh() && (preview() ? finish() : remember(shown)), preview() ? 500 : 1500);
}

const preview = () => shown.some((shot) => shot.settings.preview);

/** What was decoded quickly while one typed is drawn again by the model's own decoder, once nobody types. */
async function finish() {
  if (await paint(form.request(), {n: count(), embed: $("embed").checked}, false)) remember(shown);
}

const count = () => Number(picked($("count")) ?? 1);
const fresh = () => shown.length && form.current(shown[0].settings);

/** Draw what the form says, once, and keep it. */
export async function generate() {
  clearTimeout(settle);
  waiting = false;
  if (!form.locked()) form.roll();
  if (await paint(form.request(), {n: count(), embed: $("embed").checked}, true)) remember(shown);
}

async function paint(request, options, loud) {
  const began = performance.now();
  $("shots").classList.add("drawing");
  const soon = setTimeout(() => { $("said").textContent = form.state.server?.status === "ready" ? "Drawing" : "Waiting for the models to load"; }, 400);
  try {
    const how = {...options, onstep: (step, of) => {
      if (of > 1) $("said").textContent = `Step ${step} of ${of}`;
    }};
    const shots = await draw(PLACE, request, how).catch(async (error) => {
      // The server keeps few pictures, and none when it starts anew.
      if (error.field !== "image" || !await picture.again()) throw error;
      return draw(PLACE, request, how);
    });
    if (!shots) return false;
    for (const shot of shown) URL.revokeObjectURL(shot.url);
    [shown, chosen] = [shots, 0];
    show(performance.now() - began);
    return true;
  } catch (error) {
    // Half a word is no mistake while one types.
    if (loud || error.type !== "invalid_request_error") say(error.message, true);
    $("said").textContent = "";
    return false;
  } finally {
    clearTimeout(soon);
    if ($("said").textContent.match(/^(Drawing|Waiting|Step)/)) $("said").textContent = "";
    $("shots").classList.remove("drawing");
  }
}

function show(elapsed) {
  const box = $("shots");
  box.className = `shots ${shown.length === 1 ? "one" : shown.length <= 4 ? "four" : "eight"}`;
  box.replaceChildren(...shown.map((shot, at) => el("button", {
    class: `shot${at === chosen ? " chosen" : ""}${shot.settings.preview ? " preview" : ""}`, "aria-label": `Image ${at + 1} of ${shown.length}, seed ${shot.settings.seed}${shot.settings.preview ? ", a preview" : ""}: enlarge`,
    onclick: () => { choose(at); enlarge(shot); }, onfocus: () => choose(at),
  }, el("img", {src: shot.url, alt: shot.settings.prompt, draggable: "true"}))));
  const {settings} = shown[0], total = settings.seconds.total * shown.length;
  $("split").hidden = $("actions").hidden = false;
  $("from").hidden = $("picture-field").hidden;
  split(settings, shown.length, elapsed / 1000);
  choose(0);
  stale();
  return total;
}

function choose(at) {
  chosen = at;
  [...$("shots").children].forEach((shot, i) => shot.classList.toggle("chosen", i === at && shown.length > 1));
  const {settings, url} = shown[at];
  // A file is of the model's own decoder, or is none.
  $("save").hidden = Boolean(settings.preview);
  $("save").href = url;
  $("save").download = `stepdistill-${settings.model}-${settings.steps}-${settings.seed}.png`;
}

/** Where the time of a picture went: a bar of its parts, each with its name and number. */
function split(settings, images, elapsed) {
  const {text, encode, denoise, decode, queued} = settings.seconds;
  const parts = {queue: queued, text: text * images, ...(encode === undefined ? {} : {encode: encode * images}), denoise: denoise * images, decode: decode * images};
  const rest = Math.max(0, elapsed - Object.values(parts).reduce((a, b) => a + b, 0));
  const all = {...parts, "file and network": rest}, total = Object.values(all).reduce((a, b) => a + b, 0) || 1;
  const bar = el("div", {class: "bar", "aria-hidden": "true"});
  for (const [name, value] of Object.entries(all)) {
    const part = el("i", {class: name.split(" ")[0]});
    part.style.width = `${100 * value / total}%`;
    bar.append(part);
  }
  $("split").replaceChildren(
    el("div", {class: "total"}, el("b", {}, seconds(elapsed)), ` for ${plural(images, "image")} · ${plural(settings.steps, "step")} · seed ${settings.seed}${settings.image ? ` · from a picture, strength ${settings.strength}` : ""}${settings.batch > 1 ? ` · batch ${settings.batch}` : ""}`),
    bar,
    el("div", {class: "key"}, ...Object.entries(all).map(([name, value]) => el("span", {}, el("i", {class: name.split(" ")[0]}), `${name} ${["text", "encode"].includes(name) && value < 0.0005 ? "kept" : seconds(value)}`))),
  );
}

/** An image that is not of what stands in the form is dimmed, and says so. */
function stale() {
  const old = shown.length > 0 && !fresh();
  $("shots").classList.toggle("stale", old);
  if (old && !drawing) $("said").textContent = "Of other settings than those of the form.";
  else if ($("said").textContent.startsWith("Of other")) $("said").textContent = "";
}

export function enlarge({url, settings}) {
  const dialog = $("large");
  dialog.querySelector("img").src = url;
  dialog.querySelector("img").alt = settings.prompt;
  dialog.querySelector("p").textContent = `${settings.prompt} · ${settings.made_by ?? settings.model}, ${plural(settings.steps, "step")}, seed ${settings.seed}`;
  dialog.showModal();
}

export function halt() {
  waiting = false;
  clearTimeout(settle);
  leave(PLACE);
}
