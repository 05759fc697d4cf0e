// The playground: one prompt, answered by one task or by two side by side.

import { byId, html, tell } from "./page-elements.js";
import { pickers } from "./page-picker.js";
import { ServerError, ask, events } from "./page-server.js";

const ENDED = { stop: "the task ended its answer", length: "the answer has the most tokens that it may have" };
let stopping = null; // of the answers that are being written

// Where one task answers.
class Side {
  constructor(id) {
    this.title = html("h3", { id: `${id}-title` });
    this.text = html("div", {
      id, class: "answer", tabindex: "0", role: "region", "aria-live": "polite", "aria-labelledby": this.title.id,
    });
    this.numbers = Object.fromEntries(["first token", "tokens", "tokens per second"].map((name) => [name, html("dd", {}, "-")]));
    const pairs = Object.entries(this.numbers).map(([name, place]) => html("div", {}, html("dt", {}, name), place));
    this.state = html("p", { class: "state", role: "status" });
    this.root = html("article", { class: "side", "aria-labelledby": this.title.id },
      this.title, this.text, html("dl", { class: "numbers" }, ...pairs), this.state);
  }

  // Write the answer as it comes. It tells errors itself.
  async answer(task, request, signal) {
    this.begin(task);
    try {
      tell(this.state, await this.read(request, signal));
    } catch (error) {
      if (error.name === "AbortError") tell(this.state, "stopped");
      else tell(this.state, error.message, true);
    }
    this.text.setAttribute("aria-busy", "false");
    this.root.classList.remove("waiting");
  }

  begin(task) {
    this.title.textContent = task;
    this.written = document.createTextNode("");
    this.text.replaceChildren(this.written);
    this.text.setAttribute("aria-busy", "true"); // it is read out once it is whole
    this.root.classList.add("waiting");
    tell(this.state, "waiting for the first token");
    for (const place of Object.values(this.numbers)) place.textContent = "-";
    [this.count, this.began, this.ended] = [0, performance.now(), null];
  }

  // Returns why the answer ended.
  async read(request, signal) {
    const response = await ask(request.path, { method: "POST", body: request.body, signal });
    let reason = "the answer ended";
    for await (const { choices = [], usage, error } of events(response)) {
      if (error) throw new ServerError(error.message);
      const [choice] = choices;
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      if (piece) this.add(piece);
      if (choice?.finish_reason) reason = ENDED[choice.finish_reason] ?? choice.finish_reason;
      // A piece may have several tokens; the server knows how many there were.
      if (usage) this.measure(usage.completion_tokens);
    }
    return this.written.data ? reason : "the task gave an empty answer";
  }

  add(piece) {
    const { scrollTop, scrollHeight, clientHeight } = this.text;
    if (!this.count) {
      this.numbers["first token"].textContent = `${Math.round(performance.now() - this.began)} ms`;
      this.root.classList.remove("waiting");
      tell(this.state, "answering");
    }
    this.written.appendData(piece);
    if (scrollHeight - scrollTop - clientHeight < 8) this.text.scrollTop = this.text.scrollHeight;
    this.ended = performance.now();
    this.measure(this.count + 1);
  }

  // The rate counts from sending the prompt.
  measure(tokens) {
    this.count = tokens;
    this.numbers.tokens.textContent = tokens.toLocaleString("en");
    const seconds = ((this.ended ?? performance.now()) - this.began) / 1000;
    this.numbers["tokens per second"].textContent = tokens && seconds > 0 ? (tokens / seconds).toFixed(1) : "-";
  }
}

// What to send for a task.
function requestOf(model) {
  const prompt = byId("prompt").value;
  const isChat = !byId("modes").hidden && byId("modes").querySelector(":checked").value === "chat";
  const seed = byId("seed").value;
  const body = {
    model,
    temperature: byId("temperature").valueAsNumber,
    max_tokens: byId("max-tokens").valueAsNumber,
    ...(seed === "" ? {} : { seed: Number(seed) }),
    stream: true,
    stream_options: { include_usage: true },
  };
  return isChat
    ? { path: "/v1/chat/completions", body: { ...body, messages: [{ role: "user", content: prompt }] } }
    : { path: "/v1/completions", body: { ...body, prompt } };
}

// The buttons keep the focus, so they are not disabled but say that they do nothing.
function showRunning(isRunning) {
  byId("send").setAttribute("aria-disabled", String(isRunning));
  byId("stop").setAttribute("aria-disabled", String(!isRunning));
}

async function send(sides) {
  if (stopping) return;
  stopping = new AbortController();
  showRunning(true);
  const asked = byId("compare").checked ? [pickers.one, pickers.two] : [pickers.one];
  sides[0].root.scrollIntoView({ block: "nearest" }); // below the form on a narrow screen
  await Promise.all(asked.map((picker, i) => sides[i].answer(picker.name, requestOf(picker.name), stopping.signal)));
  stopping = null;
  showRunning(false);
}

// Start the playground of a server that says of itself what `health` has.
export function startPlayground(health) {
  byId("writing").hidden = !health.writes;
  byId("no-text").hidden = health.writes;
  byId("modes").hidden = !health.has_chat;
  byId("max-tokens").max = health.max_length;
  byId("max-tokens").value = Math.min(128, Math.max(1, Math.floor(health.max_length / 2)));
  const sides = [new Side("answer-one"), new Side("answer-two")];
  sides[0].title.textContent = "Answer";
  sides[1].title.textContent = "Second answer";
  const compare = byId("compare");
  const arrange = () => {
    byId("second").hidden = !compare.checked;
    byId("task-two").disabled = !compare.checked;
    byId("answers").replaceChildren(...sides.slice(0, compare.checked ? 2 : 1).map((side) => side.root));
  };
  compare.addEventListener("change", arrange);
  arrange();
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send(sides);
  });
  byId("stop").addEventListener("click", () => stopping?.abort());
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
  });
}
