// How busy the server is, looked at as long as the page is seen.

import { byId, tell } from "./page-elements.js";
import { askJson } from "./page-server.js";

const EVERY = 2000; // milliseconds
const numbers = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
let watching = new AbortController();

async function look(signal) {
  let load = {};
  let trouble = null;
  try {
    load = await askJson("/v1/load", { signal });
  } catch (error) {
    if (error.name === "AbortError") return;
    if (error.status !== 401) trouble = error.message; // that one asks for a key
  }
  for (const place of document.querySelectorAll("[data-load]")) {
    const value = load[place.dataset.load];
    place.textContent = typeof value === "number" ? numbers.format(value) : "-";
  }
  showTrouble(trouble);
}

function showTrouble(message) {
  const place = byId("trouble");
  // What is told again each time must not be read out each time.
  if (message !== null && !place.hidden) return;
  place.hidden = message === null;
  tell(place, message, true);
}

async function watch() {
  watching.abort();
  watching = new AbortController();
  const { signal } = watching;
  while (!document.hidden && !signal.aborted) {
    await look(signal);
    await new Promise((resume) => setTimeout(resume, EVERY));
  }
}

// Look from now on; returns a function that looks at once.
export function startLoad() {
  document.addEventListener("visibilitychange", watch);
  watch();
  return watch;
}
