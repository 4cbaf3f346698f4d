// The OpenAPI document as a page: no bundle, nothing loaded from elsewhere.

import { element } from "./hits.js";

const spec = await (await fetch("/openapi.json")).json();
const main = document.getElementById("api");
main.replaceChildren();

function resolved(schema) {
  return schema?.$ref ? spec.components.schemas[schema.$ref.split("/").pop()] : schema;
}

function kind(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(kind).join(" or ");
  if (schema.type === "array") return `list of ${kind(schema.items)}`;
  return schema.enum ? schema.enum.join(" | ") : schema.type || schema.const || "anything";
}

function fields(schema) {
  const properties = Object.entries(resolved(schema)?.properties || {});
  if (!properties.length) return null;
  const rows = properties.map(([name, of]) => element("tr", {}, element("td", {}, element("code", {}, name)), element("td", {}, kind(of)), element("td", {}, of.description || (of.default !== undefined ? `default ${JSON.stringify(of.default)}` : ""))));
  return element("table", {}, element("tbody", {}, ...rows));
}

function content(title, body) {
  return Object.entries(body?.content || {}).flatMap(([type, { schema }]) => [element("p", {}, `${title}: ${type} ${kind(schema)}`), fields(schema), example(schema)]);
}

function example(schema) {
  const examples = resolved(schema)?.examples;
  return examples ? element("pre", {}, element("code", {}, JSON.stringify(examples[0], null, 1))) : null;
}

for (const [path, methods] of Object.entries(spec.paths)) {
  for (const [method, route] of Object.entries(methods)) {
    const answers = Object.entries(route.responses).map(([status, { description }]) => `${status} ${description}`).join(" · ");
    main.append(element("details", { class: "job" },
      element("summary", {}, element("strong", {}, method.toUpperCase()), " ", element("code", {}, path),
        element("span", { class: "hint" }, ` ${route.description || ""}`)),
      ...(route.parameters || []).map((p) => element("p", {}, `${p.in} parameter `, element("code", {}, p.name), ` ${kind(p.schema)}`)),
      ...content("takes", route.requestBody),
      ...content("gives", route.responses["200"] || route.responses["201"] || route.responses["202"]),
      element("p", { class: "hint" }, answers)));
  }
}
