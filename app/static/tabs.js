// Metrics, Training and API: what was measured, what is being trained, and how to call this server.

import * as form from "./form.js";
import {copy, el, get, plural, seconds} from "./util.js";

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const number = (value) => value === null || value === undefined ? "none" : Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);

export async function metrics(box) {
  let said;
  try {
    said = await get("/api/metrics");
  } catch { return; }
  box.replaceChildren(live(said.live), said.results ? measured(said.results)
    : el("p", {class: "hint"}, "No measurements of these models: start with --results FILE, a results.json of python -m evaluation run."));
}

function live({models, batches, counts, queue}) {
  const all = Object.values(batches).reduce((a, b) => a + b, 0);
  const histogram = el("div", {class: "bars"}, ...Object.entries(batches).map(([size, count]) => {
    const bar = el("i", {});
    bar.style.height = `${Math.max(4, 100 * count / Math.max(...Object.values(batches)))}%`;
    return el("div", {title: plural(count, "image")}, bar, el("span", {}, size));
  }));
  return el("div", {}, el("h2", {}, "This server, now"), el("div", {class: "tiles"},
    tile(counts.images ?? 0, "images drawn"), tile(queue, "waiting"),
    ...Object.entries(models).flatMap(([name, row]) => [tile(seconds(row.p50), `${name}, p50`), tile(seconds(row.p95), `${name}, p95 of ${row.window}`)]),
    tile(counts.cancelled ?? 0, "stopped"), tile(counts.busy ?? 0, "refused: busy")),
  ...(all ? [el("h3", {}, "Images by the size of their batch"), histogram] : []));
}

const tile = (value, name) => el("div", {class: "tile"}, el("b", {}, String(value)), el("span", {}, name));

function measured(results) {
  const quality = Object.keys(results.rows[0]?.metrics ?? {}).find((name) => /^(fd:|fid)/.test(name) && !/\/(se|infinity)/.test(name));
  const has = (name) => results.rows.some((row) => name in row.metrics);
  const diversity = results.rows.flatMap((row) => Object.keys(row.metrics)).filter((name) => /^diversity:[^/]*(\/of_teacher)?$/.test(name)).sort().at(-1);
  const columns = [quality, diversity, ...["clip:scenes-v1", "attributes/all", "latency/ms"].filter(has)].filter(Boolean);
  const served = new Map(form.state.models.map((model) => [model.about.sha256, model.id]));
  const table = el("table", {class: "wide"},
    el("thead", {}, el("tr", {}, ...["model", "steps", "guidance", ...columns, "N"].map((name) => el("th", {scope: "col"}, name)))),
    el("tbody", {}, ...results.rows.map((row) => el("tr", {class: served.has(row.sha256) ? "here" : ""},
      el("th", {scope: "row"}, `${row.role}: ${row.name}`), el("td", {}, row.steps), el("td", {}, row.guidance === 1 ? "none" : row.guidance),
      ...columns.map((name) => el("td", {}, name in row.metrics ? number(row.metrics[name]) : "", row.metrics[`${name}/se`] ? el("small", {}, ` ± ${number(row.metrics[`${name}/se`])}`) : "")), el("td", {}, row.n)))));
  const about = `${results.protocol}${results.companion ? `, diversity ${results.companion}` : ""}, reference ${results.reference} (${results.reference_n ?? "?"} images), seeds ${results.seeds?.[0]} to ${results.seeds?.[1]}, ${results.dtype}, ${results.machine}, ${results.date?.slice(0, 10)}. Bold: served here.`;
  return el("div", {}, el("h2", {}, "Measured"), quality ? plot(results.rows, quality) : "", el("div", {class: "scroll"}, table), el("p", {class: "hint"}, about),
    ...(results.warnings ?? []).map((text) => el("p", {class: "note"}, text)));
}

const kind = (row) => row.role === "teacher" ? "teacher" : row.role.startsWith("teacher") ? "few" : "student";

/** Quality against latency, both on logarithmic axes: down and to the left is better. */
function plot(rows, quality) {
  const points = rows.filter((row) => row.metrics[quality] > 0 && row.metrics["latency/ms"] > 0);
  if (!points.length) return "";
  const [w, h, left, bottom] = [640, 260, 54, 40];
  const scale = (values, from, to) => {
    const [low, high] = [Math.log(Math.min(...values) / 1.3), Math.log(Math.max(...values) * 1.3)];
    return (value) => from + (to - from) * (Math.log(value) - low) / (high - low);
  };
  const x = scale(points.map((p) => p.metrics["latency/ms"]), left, w - 10), y = scale(points.map((p) => p.metrics[quality]), h - bottom, 10);
  const ticks = (values) => [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].filter((t) => t > Math.min(...values) / 1.3 && t < Math.max(...values) * 1.3);
  const xs = ticks(points.map((p) => p.metrics["latency/ms"])), ys = ticks(points.map((p) => p.metrics[quality]));
  return svg("svg", {viewBox: `0 0 ${w} ${h}`, class: "plot", role: "img", "aria-label": `${quality} against milliseconds an image`},
    ...xs.map((t) => svg("line", {x1: x(t), x2: x(t), y1: 10, y2: h - bottom, class: "rule"})), ...xs.map((t) => svg("text", {x: x(t), y: h - bottom + 16, "text-anchor": "middle"}, String(t))),
    ...ys.map((t) => svg("line", {x1: left, x2: w - 10, y1: y(t), y2: y(t), class: "rule"})), ...ys.map((t) => svg("text", {x: left - 6, y: y(t) + 4, "text-anchor": "end"}, String(t))),
    svg("text", {x: (left + w) / 2, y: h - 6, "text-anchor": "middle"}, "milliseconds an image"), svg("text", {x: 4, y: 20}, quality),
    ...points.map((p) => svg("g", {class: kind(p)}, svg("circle", {cx: x(p.metrics["latency/ms"]), cy: y(p.metrics[quality]), r: 6}),
      svg("text", {x: x(p.metrics["latency/ms"]), y: y(p.metrics[quality]) - 11, "text-anchor": "middle"}, String(p.steps)))),
    ...[...new Map(points.map((p) => [kind(p), p.role]))].map(([name, role], i) => svg("g", {class: name}, svg("circle", {cx: w - 196, cy: 24 + 18 * i, r: 5}),
      svg("text", {x: w - 184, y: 28 + 18 * i}, `${role}, by steps`))));
}

export async function training(box) {
  let said;
  try {
    said = await get("/api/runs");
  } catch { return; }
  if (!said.runs.length) {
    box.replaceChildren(el("p", {class: "hint"}, "No run is watched: start with --run runs/NAME to see its losses, health and previews here while it trains."));
    return;
  }
  box.replaceChildren(...said.runs.map(run));
}

function run(one, at) {
  const done = one.of ? 100 * one.step / one.of : null;
  const bar = el("div", {class: "bar"}, el("i", {class: "denoise"}));
  bar.firstChild.style.width = `${done ?? 0}%`;
  const state = one.step === null || one.step === undefined ? "has not begun" : one.of && one.step >= one.of ? "done" : one.age !== null && one.age < 120 ? "running" : "not running";
  return el("article", {class: "run"},
    el("h2", {}, one.name, el("small", {}, ` ${one.method}`)),
    el("p", {}, `${state}: step ${one.step ?? 0}${one.of ? ` of ${one.of}` : ""}${one.eta ? `, about ${duration(one.eta)} left` : ""}`), bar,
    el("div", {class: "curves"}, ...Object.entries(one.curves).filter(([, points]) => points.length > 1).map(([name, points]) => curve(name, points))),
    one.health.length ? el("div", {class: "scroll"}, el("table", {class: "wide"}, el("thead", {}, el("tr", {}, ...["health", "now", "normally", ""].map((name) => el("th", {}, name)))),
      el("tbody", {}, ...one.health.map((row) => el("tr", {class: row.good ? "" : "off"}, el("th", {scope: "row"}, row.name), el("td", {}, row.value === null ? "not finite" : number(row.value)),
        el("td", {}, `${number(row.low)} to ${row.high === null ? "∞" : number(row.high)}`), el("td", {}, row.good ? "good" : row.cause)))))) : "",
    el("div", {class: "previews"}, ...one.previews.map((name, i) => el("figure", {}, el("img", {src: `/api/runs/${at}/preview/${i}?${name}`, alt: `preview at step ${Number(name)}`, loading: "lazy"}), el("figcaption", {}, `step ${Number(name)}`)))));
}

const duration = (left) => left > 5400 ? `${(left / 3600).toFixed(1)} h` : left > 90 ? `${Math.round(left / 60)} min` : `${Math.round(left)} s`;

function curve(name, points) {
  const ys = points.map(([, y]) => y), [low, high] = [Math.min(...ys), Math.max(...ys)], first = points[0][0], last = points.at(-1)[0];
  const at = ([x, y]) => `${(200 * (x - first) / (last - first || 1)).toFixed(1)},${(56 - 52 * (y - low) / (high - low || 1)).toFixed(1)}`;
  return el("figure", {}, svg("svg", {viewBox: "0 0 200 60", class: "curve", role: "img", "aria-label": `${name}, from ${number(ys[0])} to ${number(ys.at(-1))}`}, svg("polyline", {points: points.map(at).join(" ")})),
    el("figcaption", {}, name, el("b", {}, ` ${number(ys.at(-1))}`)));
}

export function api(box) {
  if (box.childElementCount) return;
  const url = location.origin, prompt = "a large green star on a black background";
  const codes = {
    "curl": `curl -s ${url}/v1/images/generations -H 'content-type: application/json' \\\n  -d '{"prompt": "${prompt}", "seed": 7, "steps": 1}' \\\n  | python3 -c 'import sys, json, base64; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))' > star.png`,
    "curl, from a picture": `curl -s ${url}/v1/images/edits -F image=@picture.png -F prompt='${prompt}' -F seed=7 -F steps=2 -F strength=0.75`,
    "openai (Python)": `from openai import OpenAI\nimport base64\n\nclient = OpenAI(base_url="${url}/v1", api_key="none")\nclient.models.retrieve("student")\nmade = client.images.generate(model="student", prompt="${prompt}", response_format="b64_json",\n                              extra_body={"seed": 7, "steps": 1})\nopen("star.png", "wb").write(base64.b64decode(made.data[0].b64_json))`,
    "gradio_client (Python)": `from gradio_client import Client\n\nclient = Client("${url}", httpx_kwargs={"timeout": 60})\nimages, settings = client.predict("${prompt}", "student", 1, 7, 1, "", None, api_name="/generate")\nprint(images[0]["image"], settings[0]["seed"])`,
    "the command line": `python -m app --check`,
  };
  box.replaceChildren(el("h2", {}, "Call this server"),
    ...Object.entries(codes).flatMap(([name, code]) => [el("div", {class: "row between"}, el("h3", {}, name), el("button", {onclick: () => copy(code, "Code")}, "Copy")), el("pre", {tabindex: "0"}, code)]),
    el("p", {}, el("a", {href: "/gradio/", class: "link"}, "The same models as a Gradio page")),
    el("h3", {}, "Addresses"),
    el("table", {class: "wide"}, el("tbody", {}, ...[["POST /v1/images/generations", "images, in OpenAI's shape; seed, steps, guidance_scale and negative_prompt beside its fields"], ["POST /v1/images/edits", "a form with image (PNG, JPEG or WebP) and strength beside the same fields: images drawn from it"], ["GET /v1/models, /v1/models/ID", "what is served"], ["GET /healthz", "200 when ready, 503 until then"], ["GET /metrics", "for Prometheus"], ["/gradio", "Gradio's page; its functions are /generate and /compare"]].map(([a, b]) => el("tr", {}, el("th", {scope: "row"}, a), el("td", {}, b))))));
}
