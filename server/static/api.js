// Requests to the service: the key of this tab, problems as errors, pictures as object URLs.

const KEY = "lightbox-key";

export class Problem extends Error {
  constructor(body, status) {
    super(body.detail || body.title || `status ${status}`);
    this.status = status;
    this.field = body.field;
  }
}

async function send(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  const response = await fetch(path, { ...options, headers }).catch(() => {
    throw new Problem({ detail: "The server does not answer." }, 0);
  });
  if (response.status === 401 && (await askForKey())) return send(path, options);
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Problem(body, response.status);
  }
  return response;
}

let asking = null;
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const input = document.getElementById("key");
    input.value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      asking = null;
      if (dialog.returnValue === "ok" && input.value) sessionStorage.setItem(KEY, input.value);
      resolve(dialog.returnValue === "ok" && Boolean(input.value));
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

export async function get(path) {
  return (await send(path)).json();
}

export async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return (await send(path, { method: "POST", headers, body: JSON.stringify(body), signal })).json();
}

// An <img> cannot carry a key, so pictures are fetched and shown as object URLs.
export async function picture(img, path) {
  try {
    const url = URL.createObjectURL(await (await send(path)).blob());
    img.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
    img.src = url;
  } catch {
    img.alt = "The picture cannot be shown";
  }
}

export const collection = (name) => `/v1/collections/${encodeURIComponent(name)}`;
