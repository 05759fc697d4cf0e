// The routing explorer: a heat map of tasks and skills and a map of tasks, for one run at a time.

const READABLE = 16; // most skills for which the cells have room for numbers

function decoded(routing) {
  const bytes = Uint8Array.from(atob(routing.weights), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => view.getInt16(2 * i, true) * routing.unit);
}

// The weights of each task over skills, at one router and head or averaged over them (-1).
function sharesOf(routing, weights, router, head) {
  const [N, H, K] = [routing.routers.length, routing.heads, routing.skills];
  const routers = router < 0 ? [...Array(N).keys()] : [router];
  const heads = head < 0 ? [...Array(H).keys()] : [head];
  return routing.tasks.map((_, task) => {
    const shares = new Float64Array(K);
    for (const n of routers) {
      for (const h of heads) {
        const start = ((task * N + n) * H + h) * K;
        for (let k = 0; k < K; k++) shares[k] += weights[start + k];
      }
    }
    return shares.map((share) => share / (routers.length * heads.length));
  });
}

function ordered(routing, by) {
  const names = new Intl.Collator("en", { numeric: true });
  const order = [...routing.tasks.keys()];
  if (by === "alike") return [...routing.order];
  const category = (i) => (by === "category" ? routing.categories[i] ?? "" : "");
  return order.sort((a, b) => names.compare(category(a), category(b)) || names.compare(routing.tasks[a], routing.tasks[b]));
}

function options(select, names, first = null) {
  const entries = names.map((name, i) => html("option", { value: i }, name));
  if (first) entries.unshift(html("option", { value: -1 }, first));
  select.replaceChildren(...entries);
}

function showExplorer(root, all) {
  const find = (id) => root.querySelector(`#${id}`);
  const [table, readout, scroll] = [find("heat"), find("readout"), find("heat-scroll")];
  const controls = { run: find("run"), router: find("router"), head: find("head"), order: find("order") };
  let routing, weights, shares, order, categories, map;

  function chooseRun() {
    routing = all[controls.run.value];
    weights = decoded(routing);
    categories = [...new Set(routing.categories)].sort((a, b) => (a === "") - (b === "") || (a < b ? -1 : 1));
    options(controls.router, routing.routers, "mean of all routers");
    options(controls.head, [...Array(routing.heads).keys()].map((h) => `head ${h + 1}`), "mean of all heads");
    controls.order.querySelector('[value="category"]').disabled = !categories.length;
    if (!categories.length && controls.order.value === "category") controls.order.value = "alike";
    find("about-run").textContent = `${routing.run}: ${routing.about}`;
    map = showMap(find("map"), routing, categories, (task) => readTask(task));
    drawHeat();
  }

  function drawHeat() {
    shares = sharesOf(routing, weights, +controls.router.value, +controls.head.value);
    order = ordered(routing, controls.order.value);
    const flat = shares.flatMap((row) => [...row]);
    const low = flat.reduce((a, b) => Math.min(a, b), Infinity);
    const high = Math.max(low + 1e-9, flat.reduce((a, b) => Math.max(a, b), -Infinity));
    const columns = [...Array(routing.skills).keys()];
    const mean = columns.map((k) => shares.reduce((sum, row) => sum + row[k], 0) / shares.length);
    table.classList.toggle("dense", routing.skills > READABLE);
    table.caption.textContent = `Weight of each skill for each task: ${routing.run}, `
      + `${controls.router.selectedOptions[0].text}, ${controls.head.selectedOptions[0].text}`;
    const heads = columns.map((k) => html("th", { scope: "col" }, routing.skills > READABLE && (k + 1) % 8 ? "" : String(k + 1)));
    table.tHead.replaceChildren(html("tr", {}, html("th", { scope: "col" }, "task \\ skill"), ...heads));
    table.tBodies[0].replaceChildren(...order.map((task) => {
      const sample = categories.length ? [categoryDot(categories.indexOf(routing.categories[task])), " "] : [];
      const name = html("th", { scope: "row", class: "name", title: routing.tasks[task] }, ...sample, routing.tasks[task]);
      return html("tr", { "data-task": task }, name, ...cells(shares[task], low, high));
    }));
    table.tFoot.replaceChildren(html("tr", {}, html("th", { scope: "row" }, "mean of tasks"), ...cells(mean, low, high)));
    table.querySelector("tbody td").tabIndex = 0;
    find("scale-low").textContent = plain(low);
    find("scale-high").textContent = plain(high);
  }

  function cells(row, low, high) {
    return Array.from(row, (share) => {
      const level = Math.max(0, Math.min(1, (share - low) / (high - low)));
      const attributes = { style: `--w:${level.toFixed(3)}`, tabindex: "-1" };
      // Between the thresholds black and white letters are equally clear, in light and in dark.
      if (level > 0.52) attributes.class = level > 0.62 ? "strong" : "middle";
      return html("td", attributes, share.toFixed(2));
    });
  }

  function readCell(cell) {
    const row = cell.parentElement;
    const skill = cell.cellIndex - 1;
    const task = row.dataset.task;
    if (task === undefined) {
      readout.textContent = `All tasks, skill ${skill + 1}: ${cell.textContent} on average.`;
      return;
    }
    choose(+task);
    readout.textContent = `${routing.tasks[task]}, skill ${skill + 1}: ${shares[task][skill].toFixed(3)}. ${about(+task)}`;
  }

  function readTask(task) {
    choose(task);
    const row = table.querySelector(`tr[data-task="${task}"]`);
    if (row.offsetTop < scroll.scrollTop + 40 || row.offsetTop > scroll.scrollTop + scroll.clientHeight - 80) {
      scroll.scrollTop = row.offsetTop - scroll.clientHeight / 2;
    }
    readout.textContent = `${routing.tasks[task]}. ${about(task)}`;
  }

  function about(task) {
    const near = routing.nearest[task].map(([other, cosine]) => `${routing.tasks[other]} (${cosine.toFixed(2)})`);
    const category = routing.categories[task] ? `Category ${routing.categories[task]}. ` : "";
    return category + (near.length ? `Most similar routes: ${near.join(", ")}.` : "");
  }

  function choose(task) {
    table.querySelector("tr.chosen")?.classList.remove("chosen");
    table.querySelector(`tr[data-task="${task}"]`)?.classList.add("chosen");
    map.mark(task);
  }

  table.addEventListener("pointerover", (event) => event.target.closest("td") && readCell(event.target.closest("td")));
  table.addEventListener("focusin", (event) => {
    const cell = event.target.closest("td");
    if (!cell) return;
    table.querySelector('td[tabindex="0"]').tabIndex = -1;
    cell.tabIndex = 0;
    readCell(cell);
  });
  table.addEventListener("keydown", (event) => {
    const cell = event.target.closest("td");
    if (!cell) return;
    const rows = [...table.tBodies[0].rows, ...table.tFoot.rows];
    const place = { row: rows.indexOf(cell.parentElement), column: cell.cellIndex };
    const far = event.ctrlKey || event.metaKey;
    const to = {
      ArrowUp: [place.row - 1, place.column], ArrowDown: [place.row + 1, place.column],
      ArrowLeft: [place.row, place.column - 1], ArrowRight: [place.row, place.column + 1],
      PageUp: [place.row - 10, place.column], PageDown: [place.row + 10, place.column],
      Home: [far ? 0 : place.row, 1], End: [far ? rows.length - 1 : place.row, routing.skills],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    const row = Math.max(0, Math.min(rows.length - 1, to[0]));
    rows[row].cells[Math.max(1, Math.min(routing.skills, to[1]))].focus();
  });
  controls.run.addEventListener("change", chooseRun);
  for (const control of [controls.router, controls.head, controls.order]) control.addEventListener("change", drawHeat);
  options(controls.run, all.map((each) => each.run));
  chooseRun();
}

function categoryDot(index) {
  const dot = marker(Math.floor(index / COLOURS) + (index % COLOURS), colour(index));
  return svg("svg", { viewBox: "-6 -6 12 12", "aria-hidden": "true" }, dot);
}

// The map of tasks; calls `read` with the task under the pointer. Returns a function to mark one.
function showMap(figure, routing, categories, read) {
  const size = 400;
  const edge = routing.places.flat().reduce((most, value) => Math.max(most, Math.abs(value)), 1e-9) * 1.06;
  const place = (task) => routing.places[task].map((value, i) => size / 2 + ((i ? -1 : 1) * value * size) / (2 * edge));
  const plot = svg("svg", {
    class: "plot", viewBox: `-6 -6 ${size + 12} ${size + 36}`, tabindex: "0", role: "application",
    "aria-label": "Map of the tasks; the arrow keys move to the next task in their direction.",
  });
  const [first, second] = routing.shares.map((share) => `${Math.round(100 * share)}%`);
  plot.append(
    svg("rect", { class: "grid", x: -5, y: -5, width: size + 10, height: size + 10, fill: "none" }),
    svg("text", { x: size / 2, y: size + 24, "text-anchor": "middle" }, `across ${first} of the variance, up ${second}`),
  );
  const links = svg("g");
  const dots = routing.tasks.map((name, task) => {
    const index = Math.max(0, categories.indexOf(routing.categories[task]));
    const dot = marker(Math.floor(index / COLOURS) + (index % COLOURS), colour(index));
    dot.setAttribute("transform", `translate(${place(task).join(" ")})`);
    dot.setAttribute("class", "task");
    dot.append(svg("title", {}, name));
    dot.addEventListener("pointerover", () => read(task));
    return dot;
  });
  const cursor = svg("circle", { class: "cursor", r: 9, visibility: "hidden" });
  plot.append(links, ...dots, cursor);
  let chosen = null;

  function mark(task) {
    chosen = task;
    const [x, y] = place(task);
    filled(cursor, { cx: x, cy: y, visibility: "visible" }, []);
    links.replaceChildren(...routing.nearest[task].map(([other]) => {
      const [x2, y2] = place(other);
      return svg("line", { class: "nearest", x1: x, y1: y, x2, y2 });
    }));
  }

  plot.addEventListener("keydown", (event) => {
    const way = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way) return;
    event.preventDefault();
    const from = chosen === null ? null : place(chosen);
    let [best, next] = [Infinity, chosen ?? 0];
    if (from) {
      dots.forEach((_, task) => {
        const [dx, dy] = place(task).map((value, i) => value - from[i]);
        const along = dx * way[0] + dy * way[1];
        const aside = Math.abs(dx * way[1]) + Math.abs(dy * way[0]);
        if (task !== chosen && along > 0 && along + 2 * aside < best) [best, next] = [along + 2 * aside, task];
      });
    }
    read(next);
  });

  const legend = html("ul", { class: "legend", "aria-label": "categories" });
  categories.forEach((category, index) => {
    const dot = categoryDot(index);
    dot.setAttribute("class", "dot");
    const button = html("button", { type: "button", "aria-pressed": "true", title: "show or fade" }, dot, category || "no category");
    button.addEventListener("click", () => {
      const isShown = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", isShown);
      dots.forEach((each, task) => routing.categories[task] === category && each.classList.toggle("faded", !isShown));
    });
    legend.append(html("li", {}, button));
  });
  figure.replaceChildren(figure.querySelector("figcaption"), plot, legend);
  return { mark };
}
