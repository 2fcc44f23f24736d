// The page: its tabs, what it does when it opens, and what it says of the server.

import * as create from "./create.js";
import * as compare from "./compare.js";
import {stop as stopAll} from "./draw.js";
import * as form from "./form.js";
import * as past from "./past.js";
import * as prompt from "./prompt.js";
import {api, metrics, training} from "./tabs.js";
import {$, el, plural, say} from "./util.js";

const TABS = ["create", "compare", "history", "metrics", "training", "api"];
const OPENED = {metrics, training, api};
let tab = "create", failures = 0;

function show(name, focus = false) {
  tab = name;
  for (const each of TABS) {
    const button = $(`tab-${each}`), on = each === name;
    $(each).hidden = !on;
    button.setAttribute("aria-selected", on);
    button.tabIndex = on ? 0 : -1;
    if (on && focus) button.focus();
    if (on) button.scrollIntoView({block: "nearest", inline: "nearest"});
  }
  $("ask").hidden = !["create", "compare"].includes(name);
  $("go").hidden = name !== "create";
  OPENED[name]?.($(name));
  if (name === "create" || name === "compare") form.changed("shown");
}

function tabs() {
  for (const [at, name] of TABS.entries()) {
    $(`tab-${name}`).onclick = () => show(name);
    $(`tab-${name}`).onkeydown = (event) => {
      const move = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (move) show(TABS[(at + move + TABS.length) % TABS.length], true);
    };
  }
}

async function stop() {
  create.halt();
  compare.halt();
  await stopAll();
}

const generate = () => tab === "compare" ? compare.both() : create.generate();

/** Ask the server how it is: often until it is ready, then now and then. */
async function watch() {
  let pause = 4000;
  try {
    const before = form.state.server?.status;
    await form.refresh();
    const {server} = form.state;
    if (failures) { $("gone").hidden = true; failures = 0; }
    status(server);
    if (server.status !== "ready" || form.state.models.some((model) => model.state === "loading")) pause = 500;
    if (before && before !== "ready" && server.status === "ready") form.changed("ready");
  } catch {
    failures += 1;
    if (failures >= 2) {
      $("gone").hidden = false;
      status({status: "gone"});
    }
    pause = 1000;
  }
  if (!$("metrics").hidden) metrics($("metrics"));
  if (!$("training").hidden) training($("training"));
  setTimeout(watch, pause);
}

const WORDS = {ready: "ready", loading: "loading the models", new: "loading the models", failed: "not available", closed: "stopping", gone: "server gone"};

function status(server) {
  const pill = $("status");
  if (pill.textContent !== WORDS[server.status]) pill.textContent = WORDS[server.status] ?? server.status;
  pill.className = `pill ${server.status}`;
  const parts = [];
  if (server.problem) parts.push(el("span", {class: "bad"}, server.problem));
  for (const model of form.state.models) {
    const count = Object.values(model.about.parameters ?? {}).reduce((a, b) => a + b, 0);
    if (model.problem) parts.push(el("span", {class: "bad"}, `${model.id}: ${model.problem}`));
    else if (count) parts.push(el("span", {}, `${form.nameOf(model.id)} ${(count / 1e6).toFixed(1)} M parameters`));
  }
  if (server.device) parts.push(el("span", {}, `${server.device_name ?? server.device}, ${server.dtype}`), el("span", {}, `attention ${server.attention}`), el("span", {}, plural(server.threads, "thread")));
  const sizes = form.modelOf("student")?.batch;
  if (sizes) parts.push(el("span", {title: "Sizes of a batch in which an image has the bits it has alone"}, `batches of ${sizes.join(", ")}`));
  $("facts").replaceChildren(...parts);
}

function theme() {
  const set = (value) => { document.documentElement.dataset.theme = value; };
  const dark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  try {
    const kept = localStorage.getItem("stepdistill-theme");
    if (kept === "dark" || kept === "light") set(kept);
  } catch { /* No storage: the system's. */ }
  $("theme").onclick = () => {
    set(dark() ? "light" : "dark");
    try { localStorage.setItem("stepdistill-theme", document.documentElement.dataset.theme); } catch { /* For this visit only. */ }
  };
}

theme();
tabs();
create.start();
compare.start();
past.start((name) => show(name));
prompt.start(generate, stop);
$("stop").onclick = stop;
window.addEventListener("hashchange", () => { const said = form.linked(); if (said) { form.restore(said); create.generate(); } });
window.addEventListener("unhandledrejection", (event) => { if (event.reason?.message) say(event.reason.message, true); });

const said = form.linked();
$("prompt").value = said?.prompt ?? form.EXAMPLES[0];
$("seed").value = said?.seed ?? 7;
watch();
// Something to look at at once: the server keeps it until its models are there.
if (!said) create.generate();
else form.onchange(function once(what) { if (what === "models" && !once.done) { once.done = true; form.restore(said); create.generate(); } });
