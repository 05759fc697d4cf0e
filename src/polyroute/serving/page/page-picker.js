// A field for the name of a task, with suggestions for what is typed: there may be 100,000 tasks.

import { byId, counted, html, tell } from "./page-elements.js";
import { askJson } from "./page-server.js";

const SHOWN = 50;
const PAUSE = 150; // milliseconds without a key before the server is asked

export class Picker {
  // `place` is the element with a label and an input.
  constructor(place, value) {
    this.input = place.querySelector("input");
    this.list = html("datalist", { id: `${this.input.id}-names` });
    this.state = html("p", { id: `${this.input.id}-state`, class: "hint one-line", role: "status" });
    place.append(this.list, this.state);
    for (const [name, given] of Object.entries({
      type: "search", list: this.list.id, autocomplete: "off", spellcheck: "false", autocapitalize: "off",
      "aria-describedby": this.state.id,
    })) this.input.setAttribute(name, given);
    this.input.value = value;
    this.input.addEventListener("input", () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.suggest(), PAUSE);
    });
    // The browser filters suggestions by what the field has; a new name replaces the old one.
    this.input.addEventListener("focus", () => this.input.select());
  }

  get name() {
    return this.input.value;
  }

  set name(value) {
    this.input.value = value;
    this.suggest();
  }

  // Ask for the first names that begin as the field does.
  async suggest() {
    const typed = this.name;
    this.asking?.abort();
    this.asking = new AbortController();
    const query = new URLSearchParams({ limit: SHOWN, prefix: typed });
    try {
      const page = await askJson(`/v1/models?${query}`, { signal: this.asking.signal });
      const names = page.data.map((model) => model.id);
      const isUnknown = !names.length && typed !== "";
      this.list.replaceChildren(...names.map((name) => html("option", { value: name })));
      tell(this.state, names.includes(typed) ? null : found(names, page.has_more), isUnknown);
      this.input.setAttribute("aria-invalid", String(isUnknown));
    } catch (error) {
      if (error.name !== "AbortError") tell(this.state, error.message, true);
    }
  }
}

function found(names, hasMore) {
  if (!names.length) return "no name begins so";
  const many = hasMore ? `more than ${names.length} names begin` : `${counted(names.length, "name")} begin`;
  return `${many}${names.length === 1 ? "s" : ""} so`;
}

export const pickers = {};

// Make the pickers of the page.
export function makePickers() {
  for (const place of document.querySelectorAll("[data-picker]")) {
    pickers[place.dataset.picker] = new Picker(place, place.dataset.picker === "two" ? "base" : "mu");
  }
}

// Ask for suggestions anew: tasks have come or gone, or another key holds.
export function refreshPickers() {
  for (const picker of Object.values(pickers)) picker.suggest();
}

// Put a task into the playground.
export function choose(name) {
  pickers.one.name = name;
  byId("playground").scrollIntoView();
  byId("prompt").focus({ preventScroll: true });
}
