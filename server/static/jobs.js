// Jobs with their progress, and the last evaluation as a table and a plot.

import { collection, get, Problem, post } from "./api.js";
import { element } from "./hits.js";

const $ = (id) => document.getElementById(id);
const FINAL = ["done", "failed", "cancelled"];
const SVG = "http://www.w3.org/2000/svg";
let chosen;

export function startJobs(currentCollection) {
  chosen = currentCollection;
  $("rebuild").addEventListener("click", () => run(() => post(`${collection(chosen())}/rebuild`, { vector_index: $("spec").value.trim() || null }), "jobs"));
  $("evaluate").addEventListener("click", () => run(evaluate, "evaluation"));
  for (const id of ["tab-jobs", "tab-measure"]) $(id).addEventListener("click", () => refresh().catch(() => {}));
}

async function run(submit, place) {
  try {
    await submit();
    await follow();
  } catch (error) {
    $(place).prepend(element("p", { class: "status error", role: "alert" }, error.message));
  }
}

// Polled rather than streamed: an EventSource cannot carry a key.
async function follow() {
  while (await refresh()) await new Promise((resolve) => setTimeout(resolve, 700));
}

async function refresh() {
  const { jobs } = await get("/v1/jobs");
  const running = jobs.filter((job) => !FINAL.includes(job.state)).length;
  $("running").hidden = !running;
  $("running").textContent = running;
  $("jobs").replaceChildren(...(jobs.length ? jobs.slice(0, 30).map(jobCard) : [element("p", { class: "hint" }, "No job yet.")]));
  const mine = jobs.filter((job) => job.kind === "evaluation" && job.collection === chosen());
  const measured = mine.find((job) => job.state === "done");
  const shown = [mine[0] && mine[0] !== measured ? jobCard(mine[0]) : null, measured ? evaluation(measured) : null];
  $("evaluation").replaceChildren(...shown.filter(Boolean));
  return running;
}

function jobCard(job) {
  const ended = FINAL.includes(job.state);
  const cancel = ended ? null : element("button", { type: "button", onclick: () => post(`/v1/jobs/${job.id}/cancel`, {}).then(refresh) }, "Cancel");
  const progress = element("progress", { "aria-label": `${job.kind} of ${job.collection}` });
  if (job.total) { progress.max = job.total; progress.value = job.done; }
  const left = job.seconds_left != null && !ended ? ` · ${Math.ceil(job.seconds_left)} s left` : "";
  const rate = job.rate != null && !ended ? ` · ${job.rate.toFixed(0)} a second` : "";
  return element("div", { class: "job" },
    element("div", { class: "row" }, element("strong", {}, `${job.kind} of ${job.collection}`), element("span", {}, job.state), cancel),
    ended ? null : progress,
    element("div", { class: "hint" }, ended ? new Date(job.updated * 1000).toLocaleString() : `${job.phase} ${job.done}${job.total ? ` of ${job.total}` : ""}${rate}${left}`),
    ...job.errors.map((text) => element("p", { class: "status error" }, text)));
}

async function evaluate() {
  const info = await get(collection(chosen()));
  const asked = { retrievers: info.retrievers.filter((name) => !name.endsWith("+rerank")) };
  if ($("source").value.trim()) Object.assign(asked, { source: $("source").value.trim(), split: $("split").value.trim() || "test" });
  else {
    const lines = $("judged").value.split("\n").map((line) => line.split(/→|->/)).filter((pair) => pair.length === 2);
    asked.queries = lines.map(([text], i) => ({ _id: `q${i}`, text: text.trim() }));
    asked.qrels = Object.fromEntries(lines.map(([, ids], i) => [`q${i}`, Object.fromEntries(ids.trim().split(/\s+/).map((id) => [id, 1]))]));
    if (!lines.length) throw new Problem({ detail: "Name a source, or paste lines such as: enlarged heart → CXR12 CXR40" }, 422);
  }
  return post(`${collection(chosen())}/evaluations`, asked);
}

function evaluation(job) {
  const { results, intervals, queries, split } = job.result;
  const names = Object.keys(results);
  const measures = Object.keys(results[names[0]]);
  const head = element("tr", {}, element("th", { scope: "col" }, "retriever"), ...measures.map((m) => element("th", { scope: "col" }, m)));
  const rows = names.map((name) => element("tr", {}, element("th", { scope: "row" }, name),
    ...measures.map((m) => element("td", {}, `${results[name][m].toFixed(3)} [${intervals[name][m].map((x) => x.toFixed(3)).join(", ")}]`))));
  return element("div", {},
    element("h2", {}, `${job.collection}, ${split}: ${queries} ${queries === 1 ? "query" : "queries"}`),
    element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)),
    element("div", { class: "plots" }, ...measures.map((measure) => plot(names, measure, results, intervals))));
}

function plot(names, measure, results, intervals) {
  const row = 26, left = 96, width = 460;
  const x = (value) => left + value * (width - left - 60);
  const node = (tag, attributes, text) => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text) made.textContent = text;
    return made;
  };
  const svg = node("svg", { class: "plot", viewBox: `0 0 ${width} ${row * names.length + 30}`, role: "img", "aria-label": `${measure} of every retriever, with 95 % intervals` });
  names.forEach((name, i) => {
    const y = i * row + 6, [low, high] = intervals[name][measure];
    svg.append(node("text", { x: 0, y: y + 13 }, name),
      node("rect", { x: x(0), y, width: Math.max(1, x(results[name][measure]) - x(0)), height: 16, fill: `var(--${name.replace("+", "-")}, var(--glow))`, opacity: 0.75 }),
      node("line", { x1: x(low), x2: x(high), y1: y + 8, y2: y + 8, stroke: "currentColor", "stroke-width": 2 }),
      node("text", { x: x(Math.max(high, results[name][measure])) + 6, y: y + 13 }, results[name][measure].toFixed(3)));
  });
  svg.append(node("text", { x: left, y: row * names.length + 22, class: "title" }, `${measure}, with 95 % intervals`));
  return svg;
}
