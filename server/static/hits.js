// One hit: its film, its words with what matched, and why it is there. Text only ever goes in as text.

import { picture } from "./api.js";

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

// A hit as a film for the light box (null where it has no picture) and as a card for the list beside it.
export function hitPair(hit, rank, best, actions) {
  const why = element("div", { class: "why", hidden: true }, whyTable(hit));
  const toggle = element("button", { type: "button", class: "quiet", "aria-expanded": "false", onclick: () => {
    why.hidden = !why.hidden;
    toggle.setAttribute("aria-expanded", String(!why.hidden));
  } }, "Why this hit");
  const card = element("li", { class: "hit" },
    element("span", { class: "rank", "aria-hidden": "true" }, String(rank)),
    element("div", { class: "body" }, ...report(hit), metadata(hit.metadata || {}), bar(hit.parts, best),
      element("div", { class: "actions" },
        element("button", { type: "button", onclick: () => actions.like(hit) }, "More like this"),
        element("button", { type: "button", class: "quiet", onclick: () => actions.add(hit, 0.5) }, "Add to query"),
        element("button", { type: "button", class: "quiet", onclick: () => actions.add(hit, -0.3) }, "Less like this"),
        toggle,
        element("span", { class: "score" }, scoreLine(hit)))),
    why);
  const sheet = hit.image_url ? film(hit, rank, actions) : null;
  if (sheet) lightTogether(card, sheet);
  return { card, sheet };
}

// Title, id and words of a hit, with what was asked for and what was found marked.
export function report(hit) {
  const text = marked(hit.text || "", hit.highlights.text || [], hit.findings);
  return [
    element("h3", {}, marked(hit.title || hit.id, hit.title ? hit.highlights.title || [] : [], [])),
    hit.title ? element("div", { class: "id" }, hit.id) : null,
    text.childNodes.length ? longText(text) : null,
  ].filter(Boolean);
}

function scoreLine(hit) {
  const percent = hit.confidence >= 0.995 ? "over 99" : Math.round(hit.confidence * 100);
  const sure = hit.confidence == null ? "" : ` · confidence ${percent} %`;
  const group = hit.group && hit.group.size > 1 ? ` · ${hit.group.size} in its group` : "";
  return `score ${hit.score.toFixed(3)}${sure}${group}`;
}

function film(hit, rank, actions) {
  const img = element("img", { alt: "" });
  picture(img, `${hit.image_url}?size=336`);
  return element("button", { type: "button", class: "film", "aria-label": `Film ${rank}: ${hit.title || hit.id}`, onclick: () => actions.view(hit) },
    img, element("span", { class: "rank", "aria-hidden": "true" }, String(rank)));
}

// Whoever points at a film sees which report is its own, and the other way round.
function lightTogether(card, sheet) {
  for (const [one, other] of [[card, sheet], [sheet, card]]) {
    for (const [event, lit] of [["pointerenter", true], ["pointerleave", false], ["focusin", true], ["focusout", false]]) {
      one.addEventListener(event, () => { for (const each of [one, other]) each.classList.toggle("lit", lit); });
    }
  }
}

function longText(text) {
  const node = element("p", { class: "text" }, text);
  if (node.textContent.length < 420) return node;
  node.classList.add("long");
  const open = element("button", { type: "button", onclick: () => { node.classList.remove("long"); open.remove(); } }, "Read on");
  return element("div", {}, node, open);
}

// Words that the query asked for are marked; findings are underlined, denied ones struck out.
function marked(text, highlights, findings) {
  const points = new Set([0, text.length]);
  // Offsets count code points, strings here count UTF-16 units.
  const unit = unitsOf(text);
  const spans = highlights.map(([start, end]) => ({ start: unit(start), end: unit(end), mark: true }));
  for (const f of findings) spans.push({ start: unit(f.start), end: unit(f.end), finding: f });
  for (const span of spans) { points.add(span.start); points.add(span.end); }
  const cuts = [...points].filter((p) => p >= 0 && p <= text.length).sort((a, b) => a - b);
  const out = document.createDocumentFragment();
  for (let i = 0; i + 1 < cuts.length; i++) {
    const over = spans.filter((s) => s.start <= cuts[i] && s.end >= cuts[i + 1]);
    let node = document.createTextNode(text.slice(cuts[i], cuts[i + 1]));
    const finding = over.find((s) => s.finding)?.finding;
    if (over.some((s) => s.mark)) node = element("mark", {}, node);
    if (finding) node = element("span", { class: `finding ${finding.assertion}`, title: `${finding.name}: ${finding.assertion}` }, node);
    out.append(node);
  }
  return out;
}

function unitsOf(text) {
  if (!/[\ud800-\udbff]/.test(text)) return (point) => point;
  const starts = [];
  for (let i = 0; i < text.length; i += text.codePointAt(i) > 0xffff ? 2 : 1) starts.push(i);
  starts.push(text.length);
  return (point) => starts[Math.min(point, starts.length - 1)];
}

function metadata(values) {
  const shown = Object.entries(values).filter(([, value]) => value != null && typeof value !== "object").slice(0, 8);
  return shown.length ? element("div", { class: "meta" }, ...shown.map(([name, value]) => element("span", {}, `${name}: `, link(value)))) : null;
}

function link(value) {
  if (!/^https?:/.test(value) || !URL.canParse(value)) return String(value);
  return element("a", { href: value, target: "_blank", rel: "noopener noreferrer" }, new URL(value).hostname);
}

// What each leg gave, against the best hit's score: the raw scores of a leg alone know no 1.
function bar(parts, best) {
  const node = element("div", { class: "bar", "aria-hidden": "true" });
  for (const [leg, share] of Object.entries(parts)) {
    const piece = element("i", { title: leg });
    piece.style.width = `${Math.max(0, Math.min(1, share.weight * share.normalised / Math.max(best, 1e-9))) * 100}%`;
    piece.style.background = `var(--${leg}, var(--glow))`;
    node.append(piece);
  }
  return node;
}

function whyTable(hit) {
  const rows = Object.entries(hit.parts).map(([leg, share]) => {
    const dot = element("span", { class: "dot", "aria-hidden": "true" });
    dot.style.background = `var(--${leg}, var(--glow))`;
    return element("tr", {}, element("td", {}, dot, leg),
      ...[share.rank ?? "–", share.raw.toFixed(3), share.normalised.toFixed(3), share.weight.toFixed(3), (share.weight * share.normalised).toFixed(4)]
        .map((value) => element("td", {}, String(value))));
  });
  const sum = element("tr", {}, element("th", { scope: "row", colspan: "5" }, "sum"), element("th", {}, hit.score.toFixed(4)));
  const head = element("tr", {}, ...["leg", "rank", "raw", "normalised", "weight", "share"].map((name) => element("th", { scope: "col" }, name)));
  const said = hit.findings.length ? element("p", {}, "Says: ", [...new Set(hit.findings.map((f) => `${f.name} (${f.assertion})`))].join(", ")) : null;
  return element("div", {}, element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows, sum)), said);
}
