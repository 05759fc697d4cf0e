// Adding a task from pasted examples, and how its learning goes.

import { byId, counted, html, tell } from "./page-elements.js";
import { examplesOf } from "./page-examples.js";
import { choose, pickers, refreshPickers } from "./page-picker.js";
import { askJson, taskPath } from "./page-server.js";

const EVERY = 500; // milliseconds between two looks at a task that is learned

// Tell what the text has, or its first fault; returns the examples, or null if there is a fault.
function check() {
  const [field, state] = [byId("examples"), byId("examples-state")];
  let examples = null;
  let fault = null;
  try {
    examples = examplesOf(field.value);
  } catch (error) {
    fault = error;
  }
  if (fault) tell(state, fault.message, true);
  else tell(state, examples.length ? counted(examples.length, "example") : null);
  field.setAttribute("aria-invalid", String(fault !== null));
  if (fault) field.dataset.fault = fault.line;
  else delete field.dataset.fault;
  return examples;
}

// Select the line with the fault.
function goToFault() {
  const field = byId("examples");
  const lines = field.value.split("\n"); // a text area has no other ends of lines
  const number = Number(field.dataset.fault) - 1;
  const start = lines.slice(0, number).reduce((sum, line) => sum + line.length + 1, 0);
  field.focus();
  field.setSelectionRange(start, start + lines[number].length);
}

async function add() {
  const examples = check();
  if (!examples) {
    goToFault();
    return;
  }
  const name = byId("name").value;
  tell(byId("add-state"), "sending the examples");
  try {
    const body = { name, examples, steps: byId("steps").valueAsNumber };
    const job = await askJson("/v1/tasks", { method: "POST", body });
    tell(byId("add-state"), `the server learns ${name}`);
    follow(name, job);
  } catch (error) {
    tell(byId("add-state"), error.message, true);
  }
}

// Show a job, and look at it until it is over.
async function follow(name, job) {
  const bar = html("progress", { "aria-label": `progress of ${name}` });
  const state = html("p", { class: "state", role: "status" });
  const item = html("li", {}, html("b", { class: "name" }, name), bar, state);
  byId("no-jobs").hidden = true;
  byId("jobs").prepend(item);
  let now = job;
  while (showJob(bar, state, now)) {
    await new Promise((resume) => setTimeout(resume, EVERY));
    try {
      now = (await askJson(taskPath(name))).job;
    } catch (error) {
      tell(state, error.message, true);
      if (error.status) return; // without an answer the server may come back
    }
  }
  if (now?.status !== "done") return;
  const use = html("button", { type: "button", class: "link" }, "Use in the playground");
  use.addEventListener("click", () => choose(name));
  item.append(use);
  pickers.one.name = name; // the focus stays where the user is
  refreshPickers();
}

// Returns whether the job goes on.
function showJob(bar, state, job) {
  bar.hidden = !["waiting", "running"].includes(job?.status);
  switch (job?.status) {
    case "waiting":
      bar.removeAttribute("value");
      state.textContent = "It waits for its turn.";
      return true;
    case "running":
      bar.max = job.steps;
      bar.value = job.step;
      state.textContent = `Step ${job.step} of ${job.steps}${lossOf(job)}.`;
      return true;
    case "done":
      tell(state, `learned in ${job.seconds.toFixed(1)} seconds${lossOf(job)}; the playground has it`);
      return false;
    case "failed":
      tell(state, job.error ?? "learning failed", true);
      return false;
    default:
      tell(state, "the server knows nothing of this task any more", true);
      return false;
  }
}

const lossOf = (job) => (job.loss === null || job.loss === undefined ? "" : `, loss ${job.loss.toFixed(3)}`);

// Start the form of a server that says of itself what `health` has.
export function startAdding(health) {
  byId("learning").hidden = !health.can_learn;
  byId("no-learning").hidden = health.can_learn;
  byId("add").addEventListener("submit", (event) => {
    event.preventDefault();
    add();
  });
  byId("examples").addEventListener("input", check);
  byId("tab").addEventListener("click", () => {
    // The key for it moves on to the next field.
    const field = byId("examples");
    field.setRangeText("\t", field.selectionStart, field.selectionEnd, "end");
    field.focus();
    check();
  });
}
