// The page: one box for words, pictures and stored documents; chips for facets; two retrievers side by side.

import { collection, get, Problem, post } from "./api.js";
import { element, hitPair } from "./hits.js";
import { startJobs } from "./jobs.js";
import { openViewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const PAGE = 12;
const MAX_FACETS = 5;

const state = {
  parts: [], // {image: base64, url, name, weight} or {id, name, weight}
  textWeight: 1,
  filters: new Map(), // field -> Set of values
  fields: [], // metadata fields worth a facet, as the service tells them
  columns: [],
  request: 0,
  opened: Promise.resolve(),
};

// --- the query ------------------------------------------------------------------------------------

function query() {
  const text = $("text").value.trim();
  const parts = text ? [{ [$("kind").value]: text, weight: state.textWeight }] : [];
  for (const part of state.parts) parts.push(part.id ? { id: part.id, weight: part.weight } : { image: part.image, weight: part.weight });
  return parts;
}

function where(except) {
  const clauses = [...state.filters].filter(([field, values]) => values.size && field !== except).map(([field, values]) => ({ [field]: { $in: [...values] } }));
  return clauses.length ? { $and: clauses } : null;
}

function body(retriever, cursor) {
  const sure = Number($("sure").value);
  return { query: query(), retriever, k: PAGE, cursor, where: where(), facets: state.fields, min_confidence: sure || null };
}

async function search() {
  await state.opened; // words may be typed before the collection has told what it can do
  const parts = query();
  if (!parts.length) return say("Type some words, or drop a picture.");
  const mine = ++state.request;
  const retrievers = [$("retriever").value, $("beside").value].filter(Boolean);
  say("Searching…");
  try {
    const path = `${collection($("collection").value)}/search`;
    const asked = retrievers.map((name) => post(path, body(name, null)));
    const [counts, ...answers] = await Promise.all([filteredCounts(path, retrievers[0]), ...asked]);
    if (mine !== state.request) return; // a later search has begun
    show(retrievers, answers, counts);
  } catch (error) {
    if (mine === state.request) fail(error);
  }
}

// What a filtered field would count without its own filter: how else could a second value be chosen?
async function filteredCounts(path, retriever) {
  const fields = [...state.filters].filter(([, values]) => values.size).map(([field]) => field);
  const lean = { k: 1, fields: [], highlight: false };
  const answers = fields.map((field) => post(path, { ...body(retriever, null), ...lean, where: where(field), facets: [field] }));
  return Object.assign({}, ...(await Promise.all(answers)).map((answer) => answer.facets));
}

function show(retrievers, answers, counts) {
  state.columns = retrievers.map((retriever) => new Column(retriever));
  const several = retrievers.length > 1;
  const shown = state.columns.map(({ retriever, wall, list }) =>
    element("div", { class: several ? "column" : "column alone" }, several ? element("h2", {}, retriever) : null, wall, list));
  $("results").replaceChildren(element("div", { class: several ? "columns" : "" }, ...shown));
  $("start").hidden = true;
  state.columns.forEach((column, i) => append(column, answers[i]));
  facets({ ...answers[0].facets, ...counts });
  legend(answers);
  const { total, took_ms: took, exact, recall } = answers[0];
  const sure = exact ? "exact" : `approximate, measured recall ${recall.toFixed(3)}`;
  say(total.value
    ? `${total.relation === "gte" ? "At least " : ""}${total.value} found in ${took.total.toFixed(0)} ms · ${sure}`
    : "Nothing relevant was found. Fewer filters, other words or a lower threshold may help.");
}

// The hits of one retriever: films on a light box, reports beside it.
class Column {
  constructor(retriever) {
    this.retriever = retriever;
    this.hits = [];
    this.wall = element("div", { class: "wall", role: "group", "aria-label": "Films", hidden: true });
    this.list = element("ul", { class: "hits" });
  }

  add(hit) {
    this.hits.push(hit);
    const { card, sheet } = hitPair(hit, this.hits.length, this.hits[0].score, { like, add, view: () => this.view(hit) });
    this.list.append(card);
    if (sheet) this.wall.append(sheet);
    this.wall.hidden = !this.wall.childElementCount;
  }

  view(hit) {
    const films = this.hits.filter((each) => each.image_url);
    openViewer(films, films.indexOf(hit), { like });
  }
}

function append(column, answer) {
  column.cursor = answer.cursor;
  for (const hit of answer.hits) column.add(hit);
  $("more").hidden = !state.columns.some((each) => each.cursor);
}

async function more() {
  $("more").disabled = true;
  try {
    const path = `${collection($("collection").value)}/search`;
    for (const column of state.columns.filter((each) => each.cursor)) append(column, await post(path, body(column.retriever, column.cursor)));
  } catch (error) {
    if (error instanceof Problem && error.status === 410) await search();
    else fail(error);
  } finally {
    $("more").disabled = false;
  }
}

function legend(answers) {
  const legs = new Set(answers.flatMap((answer) => answer.hits.flatMap((hit) => Object.keys(hit.parts))));
  $("legend").replaceChildren(...(legs.size < 2 ? [] : [...legs].map((leg) => {
    const dot = element("span", { class: "dot", "aria-hidden": "true" });
    dot.style.background = `var(--${leg}, var(--glow))`;
    return element("span", {}, dot, leg);
  })));
}

function like(hit) {
  $("text").value = "";
  state.parts = [{ id: hit.id, name: hit.title || hit.id, weight: 1 }];
  drawParts();
  search();
  window.scrollTo({ top: 0 });
  $("results").focus();
}

function add(hit, weight) {
  state.parts.push({ id: hit.id, name: hit.title || hit.id, weight });
  drawParts();
  search();
}

// --- pictures and weights ---------------------------------------------------------------------------

async function addFile(file) {
  if (!file) return;
  const bytes = new Uint8Array(await file.arrayBuffer());
  let binary = "";
  for (let i = 0; i < bytes.length; i += 32768) binary += String.fromCharCode(...bytes.subarray(i, i + 32768));
  const url = file.type.startsWith("image/") ? URL.createObjectURL(file) : null;
  state.parts.push({ image: btoa(binary), url, name: file.name || "pasted picture", weight: 1 });
  drawParts();
  search();
}

function drawParts() {
  const chips = state.parts.map((part, i) => element("div", { class: "part" },
    part.url ? element("img", { src: part.url, alt: "" }) : null,
    slider(part.name, part.weight, (value) => { part.weight = value; }),
    element("button", { type: "button", "aria-label": `Remove ${part.name}`, onclick: () => { state.parts.splice(i, 1); drawParts(); search(); } }, "✕")));
  if ($("text").value.trim() && state.parts.length) {
    chips.unshift(element("div", { class: "part" }, slider("Words", state.textWeight, (value) => { state.textWeight = value; })));
  }
  $("parts").replaceChildren(...chips);
}

function slider(name, value, change) {
  const shown = element("span", {}, value.toFixed(1));
  const input = element("input", { type: "range", min: "-1", max: "1", step: "0.1", value: String(value), oninput: () => {
    shown.textContent = Number(input.value).toFixed(1);
    change(Number(input.value));
  }, onchange: search });
  return element("label", {}, element("span", { class: "name" }, `${name} `, shown), input);
}

// --- facets ------------------------------------------------------------------------------------------

function facets(found) {
  const groups = state.fields.map((field) => {
    const chosen = state.filters.get(field) || new Set();
    const values = new Map((found[field] || []).slice(0, 8).map(({ value, count }) => [value, count]));
    for (const value of chosen) if (!values.has(value)) values.set(value, 0);
    if (values.size < 2 && !chosen.size) return null;
    const chips = [...values].map(([value, count]) => element("button", {
      type: "button", class: "chip", "aria-pressed": String(chosen.has(value)), "data-chip": JSON.stringify([field, value]),
      onclick: () => toggle(field, value),
    }, `${value} `, element("b", {}, String(count))));
    return element("fieldset", {}, element("legend", {}, field), ...chips);
  });
  const held = document.activeElement?.dataset.chip; // whoever filters by keyboard stays where they are
  $("facets").replaceChildren(...groups.filter(Boolean));
  if (held) [...$("facets").querySelectorAll("[data-chip]")].find((chip) => chip.dataset.chip === held)?.focus();
}

function toggle(field, value) {
  const chosen = state.filters.get(field) || new Set();
  chosen.delete(value) || chosen.add(value);
  state.filters.set(field, chosen);
  search();
}

// --- collections -------------------------------------------------------------------------------------

function openCollection() {
  state.filters.clear();
  state.parts = [];
  drawParts();
  for (const id of ["facets", "results", "legend"]) $(id).replaceChildren();
  $("more").hidden = true;
  $("start").hidden = false;
  state.opened = opening();
  return state.opened;
}

async function opening() {
  const name = $("collection").value;
  const info = await get(collection(name));
  const legs = info.retrievers;
  $("retriever").replaceChildren(...legs.map((leg) => element("option", { value: leg, selected: leg === "hybrid" }, leg)));
  $("beside").replaceChildren(element("option", { value: "" }, "nothing"), ...legs.map((leg) => element("option", { value: leg }, leg)));
  state.fields = info.facets.slice(0, MAX_FACETS);
  $("examples").hidden = !legs.includes("ontology");
  say(`${info.documents} documents in ${name}.`);
}

async function start() {
  const { collections } = await get("/v1/collections");
  if (!collections.length) return say("No collection yet: run “lightbox index NAME SOURCE”, then reload.");
  $("collection").replaceChildren(...collections.map(({ collection: name }) => element("option", { value: name }, name)));
  await opening();
  const wanted = new URLSearchParams(location.search).get("q");
  if (wanted) {
    $("text").value = wanted;
    queueMicrotask(search);
  }
}

function say(text) {
  $("status").textContent = text;
  $("status").classList.remove("error");
}

function fail(error) {
  if (!(error instanceof Problem)) console.error(error);
  $("status").textContent = error instanceof Problem ? error.message : "A fault of this page; its console tells more.";
  $("status").classList.add("error");
}

// --- events ------------------------------------------------------------------------------------------

$("search").addEventListener("submit", (event) => { event.preventDefault(); search(); });
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); search(); }
});
$("text").addEventListener("input", () => { if (state.parts.length) drawParts(); });
$("file").addEventListener("change", () => { addFile($("file").files[0]); $("file").value = ""; });
for (const id of ["retriever", "beside", "kind"]) $(id).addEventListener("change", () => { if (query().length) search(); });
$("sure").addEventListener("input", () => { $("sure").ariaValueText = $("sure-value").textContent = Number($("sure").value) ? `≥ ${Math.round($("sure").value * 100)} %` : "any"; });
$("sure").addEventListener("change", () => { if (query().length) search(); });
$("more").addEventListener("click", more);
$("collection").addEventListener("change", () => openCollection().catch(fail));
for (const example of document.querySelectorAll("#examples button")) {
  example.addEventListener("click", () => { $("text").value = example.textContent; search(); });
}
document.addEventListener("keydown", (event) => {
  const writing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || document.querySelector("dialog[open]");
  if (event.key === "/" && !writing && !$("view-search").hidden) { event.preventDefault(); $("text").focus(); }
});
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files || [])].find((each) => each.type.startsWith("image/"));
  if (file) { event.preventDefault(); addFile(file); }
});
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", over);
    if (name === "drop") addFile(event.dataTransfer.files[0]);
  });
}
const views = ["search", "jobs", "measure"];
for (const view of views) {
  $(`tab-${view}`).addEventListener("click", () => {
    for (const each of views) {
      $(`view-${each}`).hidden = each !== view;
      $(`tab-${each}`).setAttribute("aria-pressed", String(each === view));
    }
  });
}

startJobs(() => $("collection").value);
state.opened = start().catch(fail);
