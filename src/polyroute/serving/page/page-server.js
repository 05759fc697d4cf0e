// Requests to the server: with the API key, errors as sentences, and streams of events.

import { byId, tell } from "./page-elements.js";

const PLACE = "polyroute-api-key";
let key = stored();

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status; // 0 if no answer came
  }
}

// The address of a task or of a part of it. A slash of its name is no slash of the address.
export const taskPath = (name, part = "") => `/v1/tasks/${encodeURIComponent(name)}${part}`;

// The response of the server; a ServerError if it refuses, an AbortError if the signal says so.
export async function ask(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: JSON.stringify(body), cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("the server does not answer: look whether it still runs");
  }
  if (response.ok) return response;
  if (response.status === 401) wantKey();
  const said = await response.json().catch(() => null);
  const message = said?.error?.message ?? `the server answered with status ${response.status}`;
  throw new ServerError(message, response.status);
}

export const askJson = async (path, options) => (await ask(path, options)).json();

// The JSON documents of a stream of server-sent events, up to its end.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, data] = ["", []];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ServerError("the connection ended before the answer did");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
        if (line !== "" || !data.length) continue;
        const whole = data.join("\n");
        data = [];
        if (whole === "[DONE]") return;
        yield JSON.parse(whole);
      }
    }
  } catch (error) {
    // Browsers call a lost connection a TypeError, with words of their own.
    if (error instanceof TypeError) throw new ServerError("the connection was lost before the answer ended");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

function stored() {
  try {
    return sessionStorage.getItem(PLACE) ?? "";
  } catch {
    return ""; // where the browser keeps nothing, the key lives as long as the page
  }
}

function keep(value) {
  key = value;
  try {
    if (key) sessionStorage.setItem(PLACE, key);
    else sessionStorage.removeItem(PLACE);
  } catch {
    // as in `stored`
  }
  byId("forget-key").hidden = !key;
}

function wantKey() {
  const form = byId("key-form");
  if (!form.hidden) return; // what polls must not tell it again and again
  tell(byId("key-reason"), key ? "the server does not know this API key" : "this server asks for an API key");
  form.hidden = false;
  if (document.activeElement === document.body) byId("key").focus();
}

// Let the key be given and forgotten; `again` is called when another one holds.
export function offerKey(again) {
  const field = byId("key");
  byId("forget-key").hidden = !key;
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = field.value.trim();
    if (!/^[\x21-\x7e]+$/.test(given)) {
      tell(byId("key-reason"), "a key has letters, digits and signs of ASCII, and no spaces");
      return;
    }
    keep(given);
    field.value = "";
    byId("key-form").hidden = true;
    again();
  });
  byId("forget-key").addEventListener("click", () => {
    keep("");
    again();
  });
}
