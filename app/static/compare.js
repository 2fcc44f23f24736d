// Compare: two models from the same noise, and prompts by steps. A picture stands beside one of its own request only.

import {enlarge} from "./create.js";
import {draw, leave} from "./draw.js";
import * as form from "./form.js";
import {remember} from "./past.js";
import {$, chips, el, median, picked, plural, say, seconds} from "./util.js";

const SIDES = ["left", "right"];
let pair = null, view = "side", cut = 50;
const ratios = new Map();

export function start() {
  chips($("view"), "view", [["side", "Side by side"], ["slide", "Slider"]], view, (value) => { view = value; show(); });
  for (const side of SIDES) $(`${side}-model`).onchange = () => { refresh(); stale(); };
  $("both").onclick = both;
  $("grid-go").onclick = grid;
  form.onchange((what) => {
    if (what === "models") refresh();
    // Typing makes an end of what was asked before it, a teacher's many steps among them.
    if (what === "typed" && pair && !pair.done) SIDES.forEach(leave);
    stale();
  });
  $("grid-prompts").value = form.EXAMPLES.slice(0, 3).join("\n");
  show();
}

function refresh() {
  for (const side of SIDES) {
    const model = form.modelOf($(`${side}-model`).value);
    form.stepChips($(`${side}-steps`), `${side}-steps`, model, picked($(`${side}-steps`)), stale);
  }
}

function requests() {
  const {prompt, seed, negative_prompt, guidance_scale} = form.request();
  return SIDES.map((side) => {
    const id = $(`${side}-model`).value, limits = form.modelOf(id)?.limits;
    const own = limits && !limits.guidance_free ? {negative_prompt: negative_prompt ?? "", guidance_scale} : {};
    const asked = {prompt, seed, model: id, ...own};
    if (picked($(`${side}-steps`))) asked.steps = Number(picked($(`${side}-steps`)));
    return asked;
  });
}

const keyOf = (asked) => JSON.stringify(asked);

/** Draw both from the seed of the form. Whatever comes of an older pair finds that it is no longer the one shown. */
export async function both() {
  if (!form.locked()) form.roll();
  const asked = requests();
  const mine = pair = {asked, keys: asked.map(keyOf), shots: [null, null], said: ["waiting", "waiting"], done: false};
  show();
  // The quick one first: it is there at once, and the other has the device for itself.
  const order = [0, 1].sort((a, b) => (asked[a].steps ?? 50) - (asked[b].steps ?? 50));
  for (const at of order) {
    try {
      const shots = await draw(SIDES[at], asked[at], {embed: $("embed").checked, onstep: (step, of) => {
        if (pair === mine) { mine.said[at] = `step ${step} of ${of}`; heads(); }
      }});
      if (pair !== mine) return;
      if (!shots) {
        order.filter((other) => !mine.shots[other]).forEach((other) => { mine.said[other] = "stopped"; });
        break;
      }
      mine.shots[at] = shots[0];
      mine.said[at] = "";
    } catch (error) {
      if (pair !== mine) return;
      mine.said[at] = "failed";
      say(error.message, true);
    }
    show();
  }
  mine.done = true;
  if (mine.shots[0] && mine.shots[1]) {
    const key = asked.map(({model, steps}) => `${model} ${steps}`).join(" | ");
    const times = mine.shots.map((shot) => shot.settings.seconds.total);
    const list = ratios.get(key) ?? ratios.set(key, []).get(key);
    list.push(times[0] / times[1]);
    mine.key = key;
    remember(mine.shots);
  }
  show();
}

export function halt() {
  SIDES.forEach(leave);
  leave("grid");
}

const fresh = (at) => pair && pair.keys[at] === keyOf(requests()[at]);

function stale() {
  [...$("pair").querySelectorAll(".card")].forEach((card, at) => card.classList.toggle("stale", Boolean(pair) && !fresh(at)));
  heads();
}

function head(at) {
  const shot = pair?.shots[at], asked = pair ? pair.asked[at] : requests()[at];
  const name = form.nameOf(asked.model);
  const facts = shot ? `${plural(shot.settings.steps, "step")} · ${seconds(shot.settings.seconds.total)}` : pair?.said[at] ?? "";
  return [el("b", {}, name), el("span", {}, facts), ...(pair && !fresh(at) ? [el("em", {}, "of other settings")] : [])];
}

const heads = () => [...$("pair").querySelectorAll(".head")].forEach((box, at) => box.replaceChildren(...head(at)));

function show() {
  const shots = pair?.shots ?? [null, null];
  const slide = view === "slide" && shots[0] && shots[1];
  $("pair").className = slide ? "pair slide" : "pair";
  if (slide) slider(shots);
  else $("pair").replaceChildren(...shots.map((shot, at) => el("div", {class: "card"},
    el("div", {class: "head"}, ...head(at)),
    shot ? el("button", {class: "shot", "aria-label": "Enlarge", onclick: () => enlarge(shot)}, el("img", {src: shot.url, alt: `${shot.settings.model}: ${shot.settings.prompt}`}))
      : el("div", {class: pair && !pair.done ? "shot empty drawing" : "shot empty"}))));
  stale();
  ratio();
}

function slider(shots) {
  const over = el("img", {class: "over", src: shots[0].url, alt: `left: ${shots[0].settings.model}`});
  const line = el("i", {class: "line"});
  const move = (value) => {
    cut = value;
    over.style.clipPath = `inset(0 ${100 - cut}% 0 0)`;
    line.style.left = `${cut}%`;
  };
  $("pair").replaceChildren(el("div", {class: "card wide"},
    el("div", {class: "row between"}, el("div", {class: "head"}, ...head(0)), el("div", {class: "head"}, ...head(1))),
    el("div", {class: "shot over-box"}, el("img", {src: shots[1].url, alt: `right: ${shots[1].settings.model}`}), over, line,
      el("input", {type: "range", min: 0, max: 100, value: cut, "aria-label": "Where left ends and right begins", oninput: (e) => move(Number(e.target.value))}))));
  move(cut);
}

function ratio() {
  const list = pair?.key ? ratios.get(pair.key) : null;
  if (!list) {
    $("ratio").replaceChildren(pair ? "" : "Both are drawn from the same prompt, seed and noise.");
    return;
  }
  const middle = median(list), [slow, quick] = middle >= 1 ? pair.asked : [...pair.asked].reverse();
  const times = middle >= 1 ? middle : 1 / middle;
  $("ratio").replaceChildren(el("b", {}, `${times.toFixed(times < 10 ? 1 : 0)}×`),
    el("span", {}, ` faster: ${quick.model} in ${plural(quick.steps, "step")} than ${slow.model} in ${slow.steps}`),
    el("small", {}, `median of ${plural(list.length, "pair")}, networks' time`));
}

/** Prompts by step counts, all from one seed. */
async function grid() {
  const prompts = $("grid-prompts").value.split("\n").map(form.tidy).filter(Boolean).slice(0, 8), seed = form.seed();
  const columns = form.state.models.flatMap((model) => (model.limits?.steps ?? (form.isMany(model) ? [model.limits?.default_steps ?? 50] : [1]))
    .filter((steps) => [1, 2, 4].includes(steps) || form.isMany(model)).map((steps) => ({model: model.id, title: form.nameOf(model.id), steps})));
  const cells = prompts.map(() => columns.map(() => el("td", {}, el("div", {class: "shot empty"}))));
  $("grid").replaceChildren(el("table", {},
    el("thead", {}, el("tr", {}, el("th", {}, `seed ${seed}`), ...columns.map((column) => el("th", {scope: "col"}, column.title, el("small", {}, plural(column.steps, "step")))))),
    el("tbody", {}, ...prompts.map((prompt, row) => el("tr", {}, el("th", {scope: "row"}, prompt), ...cells[row])))));
  for (const [at, column] of columns.entries()) {
    for (const [row, prompt] of prompts.entries()) {
      try {
        const shots = await draw("grid", {prompt, seed, model: column.model, steps: column.steps});
        if (!shots) return;
        cells[row][at].replaceChildren(el("button", {class: "shot", "aria-label": "Enlarge", onclick: () => enlarge(shots[0])}, el("img", {src: shots[0].url, alt: `${column.title}: ${prompt}`})),
          el("small", {}, seconds(shots[0].settings.seconds.total)));
      } catch (error) {
        cells[row][at].replaceChildren(el("small", {class: "bad"}, error.message));
      }
    }
  }
}
