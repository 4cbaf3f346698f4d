// One film, large, beside its report: lighter, darker, inverted; the arrow keys go through the films of the answer.

import { picture } from "./api.js";
import { element, report } from "./hits.js";

const LIGHT = { bright: 1, contrast: 1, inverted: false }; // stays as it is from film to film

export function openViewer(hits, at, actions) {
  const img = element("img", {});
  const side = element("div", { class: "beside" });
  const place = element("span", { class: "hint", "aria-live": "polite" });
  const dialog = element("dialog", { class: "viewer", "aria-label": "Film", onclose: () => dialog.remove() },
    element("div", { class: "glass" }, img),
    element("div", { class: "reading" }, side,
      element("div", { class: "light" },
        slider("Brightness", "bright", 0.3, 2.5), slider("Contrast", "contrast", 0.3, 3),
        element("button", { type: "button", "aria-pressed": String(LIGHT.inverted), onclick: (event) => {
          LIGHT.inverted = !LIGHT.inverted;
          event.currentTarget.setAttribute("aria-pressed", String(LIGHT.inverted));
          shine();
        } }, "Invert")),
      element("div", { class: "row" },
        element("button", { type: "button", "aria-label": "Previous film", onclick: () => go(-1) }, "←"), place,
        element("button", { type: "button", "aria-label": "Next film", autofocus: true, onclick: () => go(1) }, "→"),
        element("button", { type: "button", onclick: () => { dialog.close(); actions.like(hits[at]); } }, "More like this"),
        element("button", { type: "button", class: "primary", onclick: () => dialog.close() }, "Close"))));

  function slider(name, what, min, max) {
    const input = element("input", { type: "range", min, max, step: 0.05, value: LIGHT[what], oninput: () => { LIGHT[what] = Number(input.value); shine(); } });
    return element("label", {}, name, input);
  }

  function shine() {
    img.style.filter = `brightness(${LIGHT.bright}) contrast(${LIGHT.contrast}) invert(${LIGHT.inverted ? 1 : 0})`;
  }

  function go(step) {
    at = (at + step + hits.length) % hits.length;
    const hit = hits[at];
    img.alt = `Picture of ${hit.title || hit.id}`;
    picture(img, hit.image_url);
    side.replaceChildren(...report(hit));
    place.textContent = `${at + 1} of ${hits.length}`;
  }

  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && event.target.type !== "range") { event.preventDefault(); go(step); }
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  document.body.append(dialog);
  shine();
  go(0);
  dialog.showModal();
}
