// Starts the page: tables that sort, the choice of the reference, charts, and the explorer.

const content = JSON.parse(document.getElementById("content").textContent);

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  let current = null;
  const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const texts = new Intl.Collator("en", { numeric: true });

  function sort(column, isUp) {
    current = [column, isUp];
    heads.forEach((head, i) => {
      if (i === column) head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    const isNumber = "number" in heads[column].dataset;
    const empty = (row) => (isNumber ? !(parseFloat(key(row, column)) <= Infinity) : !key(row, column));
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      if (empty(a) || empty(b)) return empty(a) - empty(b);
      const [one, other] = [key(a, column), key(b, column)];
      return (isUp ? 1 : -1) * (isNumber ? one - other : texts.compare(one, other));
    });
    table.tBodies[0].append(...rows);
  }

  heads.forEach((head, column) => {
    const button = html("button", { type: "button" }, ...head.childNodes);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const wasUp = head.getAttribute("aria-sort") === "ascending";
      sort(column, head.hasAttribute("aria-sort") ? !wasUp : !("number" in head.dataset));
    });
  });
  return () => current && sort(...current);
}

// Shows the differences of all rows to a reference.
function compare(table, reference) {
  const place = table.querySelector("[data-reference]");
  const { name, others, differences } = content.references[reference];
  place.textContent = name;
  const column = place.closest("th").cellIndex;
  for (const row of table.tBodies[0].rows) {
    const found = differences[row.dataset.row];
    const cell = html("td", { class: "number", "data-value": found ? found[0] : "" });
    if (others[row.dataset.row] === +row.dataset.row) cell.append("reference");
    else if (!found) cell.append("-");
    else {
      const [mean, low, high] = found.map((value) => signed(value));
      cell.append(html("b", {}, mean));
      if (low !== "") cell.append(html("small", {}, `${low} to ${high}`));
      cell.classList.toggle("clear", found[1] > 0 || (found[2] !== null && found[2] < 0));
    }
    row.replaceChild(cell, row.cells[column]);
  }
}

function signed(value) {
  return value === null ? "" : (value < 0 ? "-" : "+") + Math.abs(value).toFixed(3);
}

function showAlignment(charts) {
  const [select, place] = [document.getElementById("measure"), document.getElementById("alignment")];
  const measures = [...new Set(charts.map((chart) => chart.key.split("-")[1]))];
  options(select, measures.map((name) => charts.find((chart) => chart.key.split("-")[1] === name).title.split(",")[0]));
  const show = () => {
    const chosen = charts.filter((chart) => chart.key.split("-")[1] === measures[select.value]);
    place.replaceChildren(...chosen.map((chart) => {
      const figure = html("figure", { class: "chart" }, html("figcaption", {}, chart.title));
      showChart(figure, chart);
      return figure;
    }));
  };
  select.addEventListener("change", show);
  show();
}

const again = [...document.querySelectorAll("table.sortable")].map((table) => sortable(table));
const results = document.getElementById("results");
if (results) {
  const select = document.getElementById("reference");
  const show = () => {
    compare(results, select.value);
    again[0]();
  };
  select.addEventListener("change", show);
  show();
}
for (const figure of document.querySelectorAll("[data-chart]")) {
  showChart(figure, content.charts.find((chart) => chart.key === figure.dataset.chart));
}
const alignment = content.charts.filter((chart) => chart.key.startsWith("alignment-"));
if (alignment.length) showAlignment(alignment);
if (content.routing.length) showExplorer(document.getElementById("explorer"), content.routing);
// Browsers without ::details-content only print tables of tasks that are open.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details.table")) details.open = true;
});
