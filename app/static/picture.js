// The picture that images are drawn from: chosen or dropped here, uploaded for this tab alone, and how far it is changed.

import {session} from "./draw.js";
import {$, el, plural, post, say} from "./util.js";

const KINDS = ["image/png", "image/jpeg", "image/webp"], MOST_BYTES = 8 * 2 ** 20;
let picture = null, levels = null, wanted = 0.8, changed = () => {};

export function start(onchange) {
  changed = onchange;
  const zone = $("picture-drop");
  $("picture-file").onchange = (event) => { if (event.target.files[0]) choose(event.target.files[0]); event.target.value = ""; };
  $("picture-clear").onclick = () => { clear(); changed(); $("picture-file").focus(); };
  $("strength").oninput = () => { wanted = slid(Number($("strength").value)); changed(); };
  for (const kind of ["dragover", "dragleave", "drop"]) zone.addEventListener(kind, (event) => {
    if (![...event.dataTransfer?.types ?? []].includes("Files")) return;
    event.preventDefault();
    // Elsewhere on the page a file is read back.
    event.stopPropagation();
    zone.classList.toggle("over", kind === "dragover");
    document.body.classList.remove("dropping");
    if (kind === "drop" && event.dataTransfer.files[0]) choose(event.dataTransfer.files[0]);
  });
}

/** What a request says of the picture: nothing without one. */
export const asked = () => picture && !$("picture-field").hidden ? {image: picture.sha256, strength: wanted} : {};

export const name = () => picture?.sha256 ?? "";

/** Upload a file and draw from it. Resolves to whether it is one the server takes. */
export async function choose(file, strength = null) {
  try {
    if (file.type && !KINDS.includes(file.type)) throw new Error("the file is no picture; give a PNG, JPEG or WebP image.");
    if (file.size > MOST_BYTES) throw new Error(`the file has ${Math.round(file.size / 2 ** 20)} MB, more than the 8 allowed.`);
    const said = await upload(file);
    clear();
    picture = {file, url: URL.createObjectURL(file), ...said};
    wanted = strength ?? wanted;
    changed();
    return true;
  } catch (error) {
    say(error.message, true);
    return false;
  }
}

const upload = (file) => post("/api/picture", file, {headers: {"content-type": "application/octet-stream", "x-session": session}});

/** Send it again: the server keeps few, and none when it starts anew. */
export const again = () => picture ? upload(picture.file) : null;

export function clear() {
  if (picture) URL.revokeObjectURL(picture.url);
  picture = null;
}

/** Take over the strength of settings; false where they are of a picture that is not the chosen one. */
export function restore({image, strength}) {
  if (!image || picture?.sha256 !== image) {
    clear();
    return !image;
  }
  wanted = strength;
  return true;
}

// A few-step student has few levels to begin at, and the slider stops at each; a teacher has one for each step.
const count = () => levels && levels <= 20 ? levels : 20;
const slid = (at) => Math.min(1, Math.ceil(1000 * at / count()) / 1000);

/** Show the picture as the chosen model takes it. limits: the model's, where they are known; steps: those asked for. */
export function show(limits, steps) {
  $("picture-field").hidden = !limits || Boolean(limits.no_picture);
  if (levels !== (limits?.levels ?? null)) {
    levels = limits?.levels ?? null;
    $("strength").max = count();
    wanted = slid(Math.max(1, Math.floor(0.001 + wanted * count())));
  }
  $("picture-none").hidden = Boolean(picture);
  $("picture-some").hidden = !picture;
  if (!picture) return;
  if ($("picture-image").src !== picture.url) $("picture-image").src = picture.url;
  $("picture-size").textContent = `${picture.width} × ${picture.height}`;
  $("strength").value = Math.round(wanted * count());
  $("strength-value").textContent = wanted.toFixed(2);
  const text = means(steps);
  $("strength").setAttribute("aria-valuetext", `${wanted.toFixed(2)}: ${text}`);
  $("picture-hint").textContent = text;
}

/** What the strength means for the model: where it begins, and how many of its steps are left. */
function means(steps) {
  if (wanted >= 1) return "Nothing of the picture is left.";
  const left = Math.floor((levels ?? steps) * wanted), run = levels ? Math.min(steps, left) : left;
  if (!left) return "No step is left: the picture comes back as it is.";
  return levels ? `Begins at noise level ${left} of ${levels}: ${plural(run, "step")}.` : `The last ${plural(run, "step")} of ${steps}.`;
}

/** A way to choose the picture that settings name, for a place outside the form. */
export function chooser(image, strength, then) {
  const input = el("input", {type: "file", accept: KINDS.join(), class: "away", onchange: async (event) => {
    if (!event.target.files[0] || !await choose(event.target.files[0], strength)) return;
    if (name() === image) then();
    else say("That is another picture than the one it was drawn from.", true);
  }});
  return el("label", {class: "link"}, "Choose the picture", input);
}
