// Charts as SVG: what `charts.py` describes, with hover, arrow keys and a legend that hides lines.

const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const COLOURS = 8;
const MARKERS = [
  "M-4.5 0A4.5 4.5 0 1 1 4.5 0A4.5 4.5 0 1 1 -4.5 0Z", // circle
  "M-4 -4H4V4H-4Z", // square
  "M0 -5.5L5 4H-5Z", // triangle
  "M0 -5.5L5.5 0L0 5.5L-5.5 0Z", // diamond
  "M0 5.5L5 -4H-5Z", // triangle on its point
  "M-1.7 -5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z", // plus
  "M-5 -3L-3 -5L0 -2L3 -5L5 -3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0Z", // cross
  "M0 -5.2L4.9 -1.6L3 4.2H-3L-4.9 -1.6Z", // pentagon
];

function html(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function colour(index) {
  return index < 0 ? "var(--soft)" : `var(--c${index % COLOURS})`;
}

function marker(index, fill) {
  return svg("path", { d: MARKERS[index % MARKERS.length], fill });
}

function plain(value) {
  const size = Math.abs(value);
  if (Number.isInteger(value) || size >= 1000) return Math.round(value).toLocaleString("en");
  return size >= 0.001 ? value.toFixed(3) : value.toPrecision(2);
}

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

// An axis: `place` from a value to a share of its length, and the values of its ticks.
function axis(values, isLog, most) {
  const scale = isLog ? Math.log10 : (value) => value;
  let from = scale(values.reduce((a, b) => Math.min(a, b), Infinity));
  let to = scale(values.reduce((a, b) => Math.max(a, b), -Infinity));
  const pad = to > from ? 0.06 * (to - from) : isLog ? 0.3 : 0.5 * (Math.abs(from) || 1);
  [from, to] = [from - pad, to + pad];
  return {
    place: (value) => (scale(value) - from) / (to - from),
    ticks: isLog ? logTicks(from, to, most, values) : linearTicks(from, to, most, values.every(Number.isInteger) ? 1 : 0),
  };
}

function linearTicks(from, to, most, least) {
  const rough = (to - from) / most;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(least, unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough));
  const ticks = [];
  for (let i = Math.ceil(from / step); i * step <= to; i++) ticks.push(i * step || 0);
  return ticks;
}

function logTicks(from, to, most, values) {
  const measured = [...new Set(values)].sort((a, b) => a - b);
  const isFar = (value, i) => !i || Math.log10(value / measured[i - 1]) > (to - from) / (1.8 * most);
  if (measured.length < 10 && measured.every(isFar)) return measured;
  for (const factors of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = Math.floor(from); power <= to; power++) {
      ticks.push(...factors.map((factor) => factor * 10 ** power));
    }
    const inside = ticks.filter((tick) => Math.log10(tick) >= from && Math.log10(tick) <= to);
    if (inside.length <= most || factors.length === 1) return inside;
  }
}

// Draws a chart into a figure, again whenever its width changes.
function showChart(figure, chart) {
  const isShown = chart.series.map(() => true);
  const plot = svg("svg", {
    class: "plot", tabindex: "0", role: "application",
    "aria-label": `${chart.title}: ${chart.y} over ${chart.x}. The arrow keys read the points.`,
  });
  const tip = html("output", { class: "tip" });
  const frame = html("div", { style: "position: relative" }, plot, tip);
  let at = null;
  let places = [];
  let width = 0;

  function draw() {
    const used = chart.series.filter((_, i) => isShown[i]);
    [places, at] = [[], null];
    plot.replaceChildren();
    tip.replaceChildren();
    const height = Math.max(240, Math.min(380, width * 0.55));
    plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    if (!used.length) return;
    const box = { left: 58, right: width - 14, top: 10, bottom: height - 44 };
    const points = used.flatMap((series) => series.points);
    const x = axis(points.map((p) => p[0]), chart.log, width / 90);
    const y = axis(points.flatMap((p) => [p[1], p[2] ?? p[1], p[3] ?? p[1]]), false, height / 55);
    const across = (value) => box.left + x.place(value) * (box.right - box.left);
    const up = (value) => box.bottom - y.place(value) * (box.bottom - box.top);
    for (const tick of y.ticks) {
      const text = svg("text", { x: box.left - 7, y: up(tick) + 4, "text-anchor": "end" }, String(+tick.toFixed(6)));
      plot.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: up(tick), y2: up(tick) }), text);
    }
    for (const tick of x.ticks) {
      const text = svg("text", { x: across(tick), y: box.bottom + 17, "text-anchor": "middle" }, compact.format(tick));
      plot.append(svg("line", { class: "grid", x1: across(tick), x2: across(tick), y1: box.bottom, y2: box.bottom + 5 }), text);
    }
    const middle = (box.top + box.bottom) / 2;
    plot.append(
      svg("text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, chart.x),
      svg("text", { transform: `translate(12 ${middle}) rotate(-90)`, "text-anchor": "middle" }, chart.y),
    );
    const named = used.filter((series) => series.name);
    for (const series of used) {
      // Points with intervals stand side by side, not on one another.
      const isBeside = series.name && series.points[0][2] !== null;
      const aside = isBeside ? (named.indexOf(series) - (named.length - 1) / 2) * Math.min(5, 30 / named.length) : 0;
      const right = (value) => across(value) + aside;
      const stroke = colour(series.colour);
      const group = svg("g", { "data-series": series.name });
      if (series.line) {
        const path = series.points.map((p) => `${right(p[0])} ${up(p[1])}`).join("L");
        const dash = series.colour < 0 ? "1 4" : DASHES[series.colour % DASHES.length];
        group.append(svg("path", { class: "line", d: `M${path}`, stroke, "stroke-dasharray": dash }));
      }
      for (const p of series.points) {
        if (isBeside) {
          group.append(svg("line", { class: "whisker", x1: right(p[0]), x2: right(p[0]), y1: up(p[2]), y2: up(p[3]), stroke }));
        }
        if (series.marker !== null) {
          const dot = marker(series.marker, stroke);
          dot.setAttribute("transform", `translate(${right(p[0])} ${up(p[1])})`);
          group.append(dot);
        }
      }
      plot.append(group);
      if (series.name) places.push(series.points.map((p) => ({ series, point: p, x: right(p[0]), y: up(p[1]) })));
    }
    plot.append(svg("circle", { class: "cursor", r: 8, visibility: "hidden" }));
  }

  function read(line, index) {
    const place = places[line]?.[index];
    const cursor = plot.querySelector(".cursor");
    at = place ? [line, index] : null;
    cursor?.setAttribute("visibility", place ? "visible" : "hidden");
    tip.replaceChildren();
    if (!place) return;
    const [x, y, low, high, label] = place.point;
    const interval = low === null ? "" : ` (${plain(low)} to ${plain(high)})`;
    const where = label || `${chart.x} ${plain(x)}`;
    tip.append(`${place.series.name}: ${plain(y)}${interval}, ${where}`);
    cursor.setAttribute("cx", place.x);
    cursor.setAttribute("cy", place.y);
    const ratio = plot.clientWidth / width;
    tip.style.top = `${place.y * ratio + 14}px`;
    tip.style.left = `${Math.max(0, Math.min(place.x * ratio, plot.clientWidth - tip.offsetWidth))}px`;
  }

  plot.addEventListener("pointermove", (event) => {
    const area = plot.getBoundingClientRect();
    const ratio = width / area.width;
    const [x, y] = [(event.clientX - area.left) * ratio, (event.clientY - area.top) * ratio];
    let [best, line, index] = [40 * 40, -1, -1];
    places.forEach((row, i) => row.forEach((place, j) => {
      const far = (place.x - x) ** 2 + (place.y - y) ** 2;
      if (far < best) [best, line, index] = [far, i, j];
    }));
    read(line, index);
  });
  plot.addEventListener("pointerleave", () => read(-1, -1));
  plot.addEventListener("blur", () => read(-1, -1));
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (event.key === "Escape") read(-1, -1);
    if (!move || !places.length) return;
    event.preventDefault();
    const line = at ? (at[0] + move[0] + places.length) % places.length : 0;
    const last = places[line].length - 1;
    read(line, at ? Math.max(0, Math.min(last, at[1] + move[1])) : 0);
  });

  figure.replaceChildren(...figure.children, frame, legendOf(chart, isShown, draw), numbersOf(chart));
  new ResizeObserver(() => {
    if (frame.clientWidth && frame.clientWidth !== width) {
      width = frame.clientWidth;
      draw();
    }
  }).observe(frame);
}

function legendOf(chart, isShown, draw) {
  const legend = html("ul", { class: "legend", "aria-label": "lines" });
  chart.series.forEach((series, i) => {
    if (!series.name) return;
    const stroke = colour(series.colour);
    const sample = svg("svg", { viewBox: "-13 -6 26 12", "aria-hidden": "true" });
    if (series.line) {
      const dash = DASHES[Math.max(0, series.colour) % DASHES.length];
      sample.append(svg("line", { x1: -13, x2: 13, stroke, "stroke-width": 2, "stroke-dasharray": dash }));
    }
    if (series.marker !== null) sample.append(marker(series.marker, stroke));
    const button = html("button", { type: "button", "aria-pressed": "true", title: "show or hide" }, sample, series.name);
    button.addEventListener("click", () => {
      isShown[i] = !isShown[i];
      button.setAttribute("aria-pressed", isShown[i]);
      draw();
    });
    legend.append(html("li", {}, button));
  });
  return legend;
}

function numbersOf(chart) {
  const details = html("details", { class: "numbers" }, html("summary", {}, "the numbers"));
  details.addEventListener("toggle", () => {
    if (details.children.length > 1) return;
    const head = ["line", chart.x, chart.y, "from", "to", ""].map((name) => html("th", { scope: "col" }, name));
    const rows = chart.series.filter((series) => series.name).flatMap((series) => series.points.map((p) => {
      const cells = p.map((value) => html("td", {}, typeof value === "number" ? plain(value) : value ?? ""));
      return html("tr", {}, html("th", { scope: "row" }, series.name), ...cells);
    }));
    const table = html("table", {}, html("thead", {}, html("tr", {}, ...head)), html("tbody", {}, ...rows));
    details.append(html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "numbers" }, table));
  });
  return details;
}
