// One task: how it mixes skills, its nearest tasks, its file, and its end.

import { byId, html, tell } from "./page-elements.js";
import { Heat } from "./page-heat.js";
import { choose, pickers, refreshPickers } from "./page-picker.js";
import { ask, askJson, taskPath } from "./page-server.js";

const NEAREST = 8;
let looking = null; // at the task that is being shown
let heat;

const say = (text, isError = false) => tell(byId("explore-state"), text, isError);

async function show() {
  const { name } = pickers.explored;
  looking?.abort();
  looking = new AbortController();
  const { signal } = looking;
  say(`reading the row of ${name}`);
  try {
    const row = await askJson(taskPath(name, "/row"), { signal });
    byId("routing").hidden = false;
    heat.show(name, row);
    say(null);
  } catch (error) {
    if (error.name === "AbortError") return;
    byId("routing").hidden = true;
    say(error.message, true);
    return;
  }
  await showNearest(name, signal);
}

async function showNearest(name, signal) {
  const [list, state] = [byId("nearest"), byId("nearest-state")];
  list.replaceChildren();
  tell(state, "comparing with all tasks");
  try {
    const { nearest } = await askJson(taskPath(name, `/nearest?k=${NEAREST}`), { signal });
    tell(state, nearest.length ? null : "there is no other task");
    list.replaceChildren(...nearest.map((near) => nearestItem(near.name, near.similarity)));
  } catch (error) {
    if (error.name !== "AbortError") tell(state, error.message, true);
  }
}

function nearestItem(name, similarity) {
  const button = html("button", { type: "button", class: "link name" }, name);
  button.addEventListener("click", () => {
    pickers.explored.name = name;
    byId("task-explored").focus();
    show();
  });
  const bar = html("i", { "aria-hidden": "true" });
  bar.style.setProperty("--w", Math.max(0, Math.min(1, similarity)).toFixed(3));
  return html("li", {}, button, html("span", { class: "number" }, similarity.toFixed(3)), bar);
}

async function download() {
  const { name } = pickers.explored;
  say(`preparing the LoRA of ${name}`);
  try {
    const response = await ask(taskPath(name, "/export"), { method: "POST" });
    const address = URL.createObjectURL(await response.blob());
    const file = `${name.replace(/[^A-Za-z0-9_-]+/g, "_").slice(0, 100)}.zip`;
    html("a", { href: address, download: file }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000); // the browser may ask where to put it
    say(`${file} is a LoRA of PEFT`);
  } catch (error) {
    say(error.message, true);
  }
}

// Whether the user wants it, really.
function isSure(question) {
  const dialog = byId("sure");
  byId("sure-text").textContent = question;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((tellIt) => {
    dialog.addEventListener("close", () => tellIt(dialog.returnValue === "yes"), { once: true });
  });
}

async function remove() {
  const { name } = pickers.explored;
  if (!(await isSure(`Delete the task ${name}? Only its examples could bring it back.`))) return;
  try {
    await ask(taskPath(name), { method: "DELETE" });
    looking?.abort();
    byId("routing").hidden = true;
    refreshPickers();
    say(`the task ${name} is deleted`);
  } catch (error) {
    say(error.message, true);
  }
}

// Start the section of a server that says of itself what `health` has.
export function startTasks(health) {
  heat = new Heat();
  byId("delete").hidden = !health.can_learn;
  byId("use").hidden = !health.writes;
  byId("show").hidden = !health.has_rows;
  byId("no-rows").hidden = health.has_rows;
  byId("explore").addEventListener("submit", (event) => {
    event.preventDefault();
    if (health.has_rows) show();
  });
  byId("use").addEventListener("click", () => choose(pickers.explored.name));
  byId("export").addEventListener("click", download);
  byId("delete").addEventListener("click", remove);
  for (const answer of ["yes", "no"]) {
    byId(`sure-${answer}`).addEventListener("click", () => byId("sure").close(answer));
  }
}
