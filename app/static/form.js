// The form: what is asked for, which model there is, and the link that says it all.

import * as picture from "./picture.js";
import {$, chips, el, get, picked, plural, say} from "./util.js";

export const EXAMPLES = [
  "a small red circle above a large blue square on a yellow background",
  "a large green star on a black background",
  "a large purple diamond left of a small white cross on a cyan background",
  "a small yellow triangle below a large red circle on a white background",
];
export const state = {models: [], server: null};
const listeners = new Set();
export const onchange = (listener) => listeners.add(listener);
export const changed = (what = "form") => listeners.forEach((listener) => listener(what));

export const modelOf = (id) => state.models.find((model) => model.id === id);
export const isMany = (model) => model.limits ? !model.limits.steps : model.id === "teacher";

/** What a model is called: by its title, and by its id where another has the same. */
export const nameOf = (id) => {
  const title = modelOf(id)?.title ?? id;
  return state.models.some((other) => other.id !== id && other.title === title) ? `${id}: ${title}` : title;
};

/** The request of the form: what stands in it, and nothing of what its model does not take. */
export function request() {
  const limits = modelOf($("model").value)?.limits;
  const asked = {prompt: $("prompt").value, model: $("model").value || "student", seed: seed()};
  if (picked($("steps"))) asked.steps = Number(picked($("steps")));
  if (limits && !limits.guidance_free) {
    if ($("negative").value.trim()) asked.negative_prompt = $("negative").value;
    if ($("guidance").value) asked.guidance_scale = Number($("guidance").value);
  }
  return {...asked, ...picture.asked()};
}

export function seed() {
  const value = Number($("seed").value);
  if (Number.isInteger(value) && value >= 0 && value <= 4294967295) return value;
  return roll();
}

export function roll() {
  const value = crypto.getRandomValues(new Uint32Array(1))[0];
  $("seed").value = value;
  return value;
}

export const locked = () => $("lock").getAttribute("aria-pressed") === "true";
export const lock = (on) => $("lock").setAttribute("aria-pressed", on);

/** Whether settings that came back are those of the form. */
export function current(settings) {
  const asked = request(), same = (a, b) => (a ?? null) === (b ?? null) || a === undefined || a === null;
  return settings.prompt === tidy(asked.prompt) && settings.model === asked.model && settings.seed === asked.seed
    && same(asked.steps, settings.steps) && same(asked.guidance_scale, settings.guidance_scale)
    && (settings.negative_prompt ?? "") === tidy(asked.negative_prompt ?? "")
    && (settings.image ?? "") === (asked.image ?? "") && settings.strength === asked.strength;
}

export const tidy = (text) => text.normalize("NFC").replace(/\s+/g, " ").trim();

/** Fill the form from settings, all of it or all but the seed. */
export function restore(settings, withSeed = true) {
  $("prompt").value = settings.prompt ?? "";
  if (modelOf(settings.model)) $("model").value = settings.model;
  refreshModel(settings.steps);
  if (withSeed && Number.isInteger(settings.seed) && settings.seed >= 0) {
    $("seed").value = settings.seed;
    lock(true);
  } else roll();
  $("negative").value = settings.negative_prompt ?? "";
  if (settings.guidance_scale) $("guidance").value = settings.guidance_scale;
  if (!picture.restore(settings)) say("It was drawn from a picture that is not chosen here; choose it, and draw again.", true);
  changed("restored");
}

/** Steps, guidance and negative prompt as the chosen model takes them. */
export function refreshModel(wanted = null) {
  const model = modelOf($("model").value), limits = model?.limits;
  const before = wanted ?? picked($("steps"));
  stepChips($("steps"), "steps", model, before, () => changed());
  const guided = Boolean(limits) && !limits.guidance_free;
  $("negative-field").hidden = $("guidance-field").hidden = !guided;
  if (guided && !$("guidance").value) $("guidance").value = limits.default_guidance;
  if (guided) $("guidance").max = limits.max_guidance;
  showPicture();
}

export function showPicture() {
  picture.show(modelOf($("model").value)?.limits, Number(picked($("steps")) ?? 1));
}

export function stepChips(box, name, model, before, listener) {
  const limits = model?.limits;
  const listed = limits?.steps ?? (model && isMany(model) ? [10, 25, 50] : [1]);
  const all = [...listed];
  // Of a model that is not loaded yet what it takes is unknown: what was asked for stays.
  const takes = !limits || (!limits.steps && before <= limits.max_steps);
  if (before && takes && !all.includes(Number(before))) all.push(Number(before));
  const chosen = all.includes(Number(before)) ? before : limits?.default_steps ?? all.at(isMany(model ?? {}) ? -1 : 0);
  chips(box, name, all.sort((a, b) => a - b).map((count) => [count, String(count), plural(count, "step")]), chosen, listener);
}

function fill(select, wanted) {
  const before = select.value || wanted;
  select.replaceChildren(...state.models.map((model) => el("option", {value: model.id, disabled: model.state === "failed"},
    `${model.id === model.title ? model.id : `${model.id}: ${model.title}`}${model.state === "failed" ? " (failed)" : model.state === "loading" ? " (loading)" : ""}`)));
  select.value = modelOf(before) ? before : state.models[0]?.id ?? "";
}

/** Ask the server what it serves. */
export async function refresh() {
  const server = await get("/api/models");
  const before = JSON.stringify(state.models);
  state.server = server;
  state.models = server.models;
  if (JSON.stringify(state.models) === before) return;
  fill($("model"), "student");
  const students = state.models.filter((model) => model.id !== "teacher").map((model) => model.id);
  fill($("left-model"), modelOf("teacher") ? "teacher" : students[1] ?? students[0]);
  fill($("right-model"), students[0]);
  refreshModel();
  changed("models");
}

export const link = (settings) => {
  const kept = Object.entries({
    prompt: settings.prompt, seed: settings.seed, steps: settings.steps, model: settings.model,
    negative: settings.negative_prompt, guidance: settings.guidance_scale,
  }).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return `${location.origin}/#${new URLSearchParams(kept)}`;
};

/** The settings of a link; null where the address holds none. */
export function linked() {
  const read = new URLSearchParams(location.hash.slice(1));
  if (!read.get("prompt")) return null;
  const number = (name) => read.has(name) ? Number(read.get(name)) : undefined;
  return {
    prompt: read.get("prompt").slice(0, 2000), seed: number("seed"), steps: number("steps"), model: read.get("model") ?? undefined,
    negative_prompt: read.get("negative") ?? "", guidance_scale: number("guidance"),
  };
}
