// History across reloads, in this browser alone; and a PNG read back.

import {session} from "./draw.js";
import * as form from "./form.js";
import * as picture from "./picture.js";
import {$, blobOf, el, plural, post, say} from "./util.js";

const KEY = "stepdistill-history-1";
const MOST = 60, MOST_CHARACTERS = 4_000_000, SIDE = 128, MOST_BYTES = 8 * 2 ** 20;
let goto = () => {};

export function start(show) {
  goto = show;
  $("clear").onclick = () => { write([]); list(); };
  $("file").onchange = (event) => { if (event.target.files[0]) read(event.target.files[0]); event.target.value = ""; };
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => {
    if (![...event.dataTransfer?.types ?? []].includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) read(event.dataTransfer.files[0]);
  });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
  list();
}

function entries() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(kept) ? kept.filter((entry) => entry?.settings && typeof entry.image === "string" && entry.image.startsWith("data:image/")) : [];
  } catch {
    return [];
  }
}

function write(kept) {
  for (let count = Math.min(kept.length, MOST); ; count = Math.floor(count / 2)) {
    const text = JSON.stringify(kept.slice(0, count));
    if (text.length <= MOST_CHARACTERS || !count) {
      try {
        localStorage.setItem(KEY, text);
        return;
      } catch { /* The browser's storage is full: keep fewer. */ }
    }
    if (!count) return;
  }
}

/** Keep images, the newest first; one that is there already moves to the front. */
export async function remember(shots) {
  const made = [];
  for (const {blob, settings} of shots) {
    const {seconds: _, about, ...rest} = settings;
    made.push({image: await small(blob), settings: {...rest, about: {sha256: about?.sha256}}, at: Date.now()});
  }
  const same = (a, b) => ["prompt", "model", "seed", "steps", "guidance_scale", "negative_prompt", "image", "strength"].every((name) => a[name] === b[name]);
  write([...made, ...entries().filter((old) => !made.some((entry) => same(entry.settings, old.settings)))]);
  list();
}

/** A picture of at most 128 pixels, as text. */
async function small(blob) {
  const image = await createImageBitmap(blob);
  const scale = Math.min(1, SIDE / Math.max(image.width, image.height));
  const canvas = el("canvas", {width: Math.round(image.width * scale), height: Math.round(image.height * scale)});
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}

function list() {
  const kept = entries();
  $("kept").textContent = kept.length ? `${kept.length}, in this browser only` : "";
  $("clear").hidden = !kept.length;
  $("past").replaceChildren(...kept.map(({image, settings}) => el("button", {
    class: "old", title: settings.prompt, "aria-label": `Restore: ${settings.prompt}, ${settings.model}, ${plural(settings.steps, "step")}, seed ${settings.seed}`,
    onclick: () => { form.restore(settings); goto("create"); },
  }, el("img", {src: image, alt: "", loading: "lazy"}), el("span", {}, `${plural(settings.steps, "step")} · ${settings.made_by ?? settings.model}`))));
  if (!kept.length) $("past").replaceChildren(el("p", {class: "hint"}, "What you draw is kept here, also when the page is loaded anew."));
}

async function read(file) {
  goto("history");
  const box = $("read");
  box.replaceChildren("Reading");
  try {
    if (file.size > MOST_BYTES) throw new Error(`the file has ${Math.round(file.size / 2 ** 20)} MB, more than the 8 allowed.`);
    const said = await post("/api/read", file);
    const lines = said.notes.map((note) => el("p", {class: "note"}, note));
    if (!said.settings) {
      box.replaceChildren(...lines);
      return;
    }
    form.restore(said.settings);
    const {image, strength} = said.settings;
    if (image && picture.name() !== image) lines.push(el("p", {}, picture.chooser(image, strength, () => read(file))));
    const url = URL.createObjectURL(file), result = el("p", {}, "Drawing it again");
    const pictures = el("div", {class: "pair small"}, card("the file", url));
    box.replaceChildren(...lines, el("p", {}, `${said.settings.prompt} · ${said.settings.model}, ${plural(said.settings.steps ?? 0, "step")}, seed ${said.settings.seed}`), pictures, result);
    if (image && picture.name() !== image) {
      result.replaceChildren();
      return;
    }
    const again = await post("/api/reproduce", file, {headers: {"content-type": "application/octet-stream", "x-session": session}});
    pictures.append(card("drawn again", URL.createObjectURL(blobOf(again.png))));
    result.replaceChildren(el("b", {class: again.identical ? "good" : "note"}, again.said));
  } catch (error) {
    box.replaceChildren(el("p", {class: "bad"}, error.message));
    say(error.message, true);
  }
}

const card = (name, url) => el("div", {class: "card"}, el("div", {class: "head"}, el("span", {}, name)), el("div", {class: "shot"}, el("img", {src: url, alt: name})));

