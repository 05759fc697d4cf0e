// The heat map of one task: a row for each router, and columns for each head's skills.

import { byId, counted, html } from "./page-elements.js";

const READABLE = 20; // most columns for which the cells have room for numbers
const MOST_CELLS = 30_000; // a table with more is slow to scroll

export class Heat {
  constructor() {
    [this.table, this.readout] = [byId("heat"), byId("readout")];
    this.table.addEventListener("pointerover", (event) => this.read(event.target.closest("td")));
    this.table.addEventListener("focusin", (event) => this.enter(event.target.closest("td")));
    this.table.addEventListener("keydown", (event) => this.move(event));
  }

  // Show the `weights` [N][H][K] of a task, and the names of the `routers`.
  show(name, { weights, routers }) {
    const [heads, skills] = [weights[0].length, weights[0][0].length];
    this.skills = skills;
    this.routers = routers;
    this.shown = weights.slice(0, Math.max(1, Math.floor(MOST_CELLS / (heads * skills)))).map((each) => each.flat());
    const flat = this.shown.flat();
    const low = flat.reduce((a, b) => Math.min(a, b), Infinity);
    const high = Math.max(low + 1e-9, flat.reduce((a, b) => Math.max(a, b), -Infinity));
    this.table.classList.toggle("dense", heads * skills > READABLE);
    this.table.style.setProperty("--columns", heads * skills);
    this.entitle(name, weights.length, heads);
    this.table.tHead.replaceChildren(...this.heads(heads));
    this.table.tBodies[0].replaceChildren(...this.shown.map((each, n) => this.line(n, each, low, high)));
    this.table.querySelector("td").tabIndex = 0;
    byId("heat-scroll").scrollTo(0, 0);
    byId("scale-low").textContent = low.toFixed(3);
    byId("scale-high").textContent = high.toFixed(3);
    this.readout.textContent = "Point at a cell, or move with the arrow keys.";
  }

  entitle(name, number, heads) {
    const sizes = `${counted(number, "router")}, ${counted(heads, "head")}, ${counted(this.skills, "skill")}`;
    const left = number > this.shown.length ? `; the first ${this.shown.length} routers are shown` : "";
    byId("heat-title").textContent = `Weight of each skill in ${name}`;
    byId("heat-sizes").textContent = `${sizes}${left}.`;
  }

  // Two lines: the heads, and the skills of each.
  heads(heads) {
    const isDense = this.table.classList.contains("dense");
    const label = (k) => (!isDense || k === 0 || (k + 1) % 8 === 0 ? String(k + 1) : "");
    const numbers = Array.from({ length: heads * this.skills }, (_, i) => {
      const first = i % this.skills === 0 ? { class: "first" } : {};
      return html("th", { scope: "col", ...first }, label(i % this.skills));
    });
    const groups = Array.from({ length: heads }, (_, h) =>
      html("th", { scope: "colgroup", colspan: this.skills, class: "first" }, heads === 1 ? "skill" : `head ${h + 1}`));
    return [
      html("tr", {}, html("th", { scope: "col", rowspan: 2 }, "router"), ...groups),
      html("tr", {}, ...numbers),
    ];
  }

  line(n, shares, low, high) {
    const name = this.routers[n];
    const cells = shares.map((share, i) => {
      const level = (share - low) / (high - low);
      // Between the thresholds black and white letters are equally clear, in light and in dark.
      const strength = level > 0.62 ? ["strong"] : level > 0.52 ? ["middle"] : [];
      const classes = [...strength, ...(i % this.skills === 0 ? ["first"] : [])].join(" ");
      const cell = html("td", { tabindex: "-1", class: classes }, share.toFixed(2));
      cell.style.setProperty("--w", level.toFixed(3));
      return cell;
    });
    return html("tr", {}, html("th", { scope: "row", class: "name", title: name }, name), ...cells);
  }

  read(cell) {
    if (!cell) return;
    const [n, i] = [cell.parentElement.rowIndex - 2, cell.cellIndex - 1];
    const head = this.shown[n].length > this.skills ? `, head ${Math.floor(i / this.skills) + 1}` : "";
    this.readout.textContent = `${this.routers[n]}${head}, skill ${(i % this.skills) + 1}: ${this.shown[n][i].toFixed(3)}.`;
  }

  enter(cell) {
    if (!cell) return;
    this.table.querySelector('td[tabindex="0"]').tabIndex = -1;
    cell.tabIndex = 0;
    this.read(cell);
  }

  move(event) {
    const cell = event.target.closest("td");
    if (!cell) return;
    const { rows } = this.table.tBodies[0];
    const [row, column, last] = [cell.parentElement.rowIndex - 2, cell.cellIndex, this.shown[0].length];
    const far = event.ctrlKey || event.metaKey;
    const to = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      PageUp: [row - 10, column], PageDown: [row + 10, column],
      Home: [far ? 0 : row, 1], End: [far ? rows.length - 1 : row, last],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    const next = rows[Math.max(0, Math.min(rows.length - 1, to[0]))];
    next.cells[Math.max(1, Math.min(last, to[1]))].focus();
  }
}
