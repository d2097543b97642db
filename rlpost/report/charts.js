/* Charts in SVG: curves with bands, stacked shares, heat maps. Text goes into the page as text nodes, never as HTML. */
const NS = "http://www.w3.org/2000/svg";
const COLOURS = 8;
const colour = (i) => `var(--c${i % COLOURS})`;
const dash = (i) => ["", "6 3", "2 3", "8 3 2 3"][Math.floor(i / COLOURS) % 4];

function fill(node, attributes, kids) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "style") Object.assign(node.style, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const kid of kids.flat(Infinity)) {
    if (kid === null || kid === undefined || kid === false) continue;
    node.append(kid instanceof Node ? kid : document.createTextNode(String(kid)));
  }
  return node;
}
const h = (tag, attributes, ...kids) => fill(document.createElement(tag), attributes, kids);
const s = (tag, attributes, ...kids) => fill(document.createElementNS(NS, tag), attributes, kids);

function fmt(value, digits = 4) {
  if (value === null || value === undefined) return "-";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size >= 1e15 || (size > 0 && size < 1e-3)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) return `${+(value / (name === "k" ? 1e3 : unit)).toPrecision(digits)}${name}`;
  }
  return String(+value.toPrecision(digits));
}

/* Names of ticks: with as many digits as tell neighbours apart; in thousands all of them, or none. */
function tickNames(values) {
  const largest = Math.max(...values.map(Math.abs));
  if (largest >= 1e4 && largest < 1e6) return values.map((value) => (value ? `${+(value / 1e3).toPrecision(4)}k` : "0"));
  const gap = values.length > 1 ? Math.abs(values[1] - values[0]) : largest;
  const digits = gap > 0 && largest > 0 ? Math.ceil(Math.log10(largest / gap) + 1e-9) + 1 : 4;
  return values.map((value) => fmt(value, Math.max(4, Math.min(digits, 9))));
}

function ticks(low, high, most) {
  const span = high - low || 1;
  const rough = span / Math.max(most, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => span / x <= most) || 10 * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

/* Nothing is drawn before it is near the window, and all is drawn anew when its width or a setting changes. */
const drawn = new Set();
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); drawn.add(entry.target); draw(entry.target); }
}, { rootMargin: "500px" });
const sizes = new ResizeObserver((entries) => {
  for (const entry of entries) if (drawn.has(entry.target) && entry.target.drawnWidth !== entry.target.clientWidth) draw(entry.target);
});
function draw(plot) {
  plot.drawnWidth = plot.clientWidth;
  if (plot.drawnWidth > 40) plot.redraw(plot.drawnWidth);
}
const redrawAll = () => drawn.forEach((plot) => (plot.isConnected ? draw(plot) : drawn.delete(plot)));

function figure({ title, help, wide, legend, table }, redraw) {
  const plot = h("div", { class: "plot" });
  plot.redraw = redraw(plot);
  near.observe(plot);
  sizes.observe(plot);
  const keys = h("ul", { class: "legend" });
  plot.legend = (items) => keys.replaceChildren(...items.map(([name, ink, shape]) =>
    h("li", {}, h("i", { class: shape, style: { background: ink } }), name)));
  if (legend) plot.legend(legend);
  const data = h("details", {}, h("summary", {}, "Table"));
  data.addEventListener("toggle", () => {
    if (data.open) data.replaceChildren(data.firstChild, h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${title}, table` }, tableOf(table(plot))));
  });
  return h("figure", { class: wide ? "card wide" : "card" }, h("h3", {}, title), help && h("p", { class: "soft" }, help), keys, plot, data);
}

function tableOf({ head, rows }, kind = "") {
  const cell = (value) => h("td", { class: typeof value === "number" ? "num" : "any" }, typeof value === "number" ? fmt(value, 5) : value);
  const numeric = head.map((_, i) => rows.length > 0 && typeof rows[0][i] === "number");
  return h("table", { class: kind }, h("thead", {}, h("tr", {}, head.map((name, i) => h("th", { scope: "col", class: numeric[i] && "num" }, name)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map(cell)))));
}

/* spec: title, help, series() -> [{name, ink, dash, x, y, band}], xName(), smooth(), floor */
function lineChart(spec) {
  const table = () => {
    const series = spec.series();
    const every = [...new Set(series.flatMap((one) => one.x))].filter((x) => x !== null).sort((a, b) => a - b);
    const places = series.map((one) => new Map(one.x.map((x, i) => [x, i])));
    const shown = series.map((one) => one.band && one.band.some((pair) => pair));
    const rows = every.map((x) => [x, ...series.flatMap((one, i) => {
      const at = places[i].get(x);
      const value = at === undefined ? "-" : one.y[at] ?? "-";
      const pair = at === undefined || !shown[i] ? null : one.band[at];
      return shown[i] ? [value, pair ? `${fmt(pair[0])} to ${fmt(pair[1])}` : "-"] : [value];
    })]);
    return { head: [spec.xName(), ...series.flatMap((one, i) => (shown[i] ? [one.name, "95 %"] : [one.name]))], rows };
  };
  return figure({ ...spec, table }, (plot) => (width) => {
    const series = spec.series().filter((one) => one.y.some((y) => y !== null));
    plot.legend(series.length > 1 || series.some((one) => one.named) ? series.map((one) => [one.name, one.ink]) : []);
    const height = 210;
    const all = series.flatMap((one) => one.x).filter((x) => x !== null);
    if (!all.length) return plot.replaceChildren(h("p", { class: "soft" }, "Nothing was logged."));
    const smooth = spec.smooth ? spec.smooth() : 0;
    for (const one of series) one.line = smooth && one.y.length > 4 ? averaged(one.y, smooth) : one.y;
    let [low, high] = range(series.flatMap((one) => one.y).filter((y) => y !== null));
    const span = high - low || Math.abs(high) || 1; // a band that is wider than this, as one of two seeds, leaves the picture
    const [below, above] = range([low, high, ...series.flatMap((one) => (one.band || []).flatMap((pair) => pair || [])).filter((y) => y !== null)]);
    [low, high] = [Math.max(low - span / 2, below), Math.min(high + span / 2, above)];
    if (spec.floor !== undefined && low < spec.floor + (high - low)) low = Math.min(low, spec.floor);
    if (high - low < 1e-12) [low, high] = [low - (Math.abs(low) / 10 || 0.5), high + (Math.abs(high) / 10 || 0.5)];
    const pad = (high - low) * 0.05;
    [low, high] = [low === spec.floor ? low : low - pad, high + pad];
    const yTicks = ticks(low, high, 5).filter((y) => y <= high);
    const left = 12 + Math.max(...tickNames(yTicks).map((name) => name.length)) * 6.4;
    const box = { left, right: width - 10, top: 8, bottom: height - 34 };
    let [from, to] = range(all);
    if (from === to) [from, to] = [from - 1, to + 1];
    const X = (x) => box.left + ((x - from) / (to - from)) * (box.right - box.left);
    const Y = (y) => box.bottom - ((y - low) / (high - low)) * (box.bottom - box.top);
    const inside = (y) => Math.min(Math.max(Y(y), box.top), box.bottom);
    const image = frame(width, height, box, { X, Y, from, to, yTicks, xName: spec.xName(), label: spec.title });
    for (const one of series) {
      if (one.band) image.append(s("path", { d: bandPath(one, X, inside), style: { fill: one.ink, fillOpacity: series.length > 2 ? 0.09 : 0.17 } }));
      if (one.line !== one.y) image.append(s("path", { d: linePath(one.x, one.y, X, Y), fill: "none", style: { stroke: one.ink, strokeOpacity: 0.25 } }));
      const few = one.x.length <= 30;
      image.append(s("path", { d: linePath(one.x, one.line, X, Y), fill: "none", "stroke-width": 1.8, "stroke-dasharray": one.dash || null, style: { stroke: one.ink } }));
      if (few) one.x.forEach((x, i) => x !== null && one.line[i] !== null && image.append(s("circle", { cx: X(x), cy: Y(one.line[i]), r: 2.6, style: { fill: one.ink } })));
    }
    plot.replaceChildren(image, ...pointer(plot, image, series, box, X, Y, spec.xName()));
  });
}

function range(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
  return [low, high];
}

function frame(width, height, box, { X, Y, from, to, yTicks, xName, label }) {
  const image = s("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0, "aria-label": `${label}, by ${xName}. Arrow keys read the values; the table has all of them.` });
  const yNames = tickNames(yTicks);
  for (const [i, y] of yTicks.entries()) {
    image.append(s("line", { x1: box.left, x2: box.right, y1: Y(y), y2: Y(y), style: { stroke: "var(--grid)" } }),
      s("text", { x: box.left - 6, y: Y(y) + 4, "text-anchor": "end" }, yNames[i]));
  }
  const xTicks = ticks(from, to, Math.max(2, Math.floor((box.right - box.left) / 75))).filter((x) => x >= from - 1e-9);
  const xNames = tickNames(xTicks);
  for (const [i, x] of xTicks.entries()) {
    const anchor = X(x) > box.right - 14 ? "end" : X(x) < box.left + 8 ? "start" : "middle";
    image.append(s("line", { x1: X(x), x2: X(x), y1: box.bottom, y2: box.bottom + 4, style: { stroke: "var(--line)" } }),
      s("text", { x: X(x), y: box.bottom + 16, "text-anchor": anchor }, xNames[i]));
  }
  image.append(s("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, style: { stroke: "var(--line)" } }),
    s("text", { x: box.right, y: height - 4, "text-anchor": "end" }, xName));
  return image;
}

function linePath(xs, ys, X, Y) {
  let path = "", open = false;
  for (let i = 0; i < xs.length; i++) {
    if (ys[i] === null || ys[i] === undefined || xs[i] === null) { open = false; continue; }
    path += `${open ? "L" : "M"}${X(xs[i]).toFixed(1)} ${Y(ys[i]).toFixed(1)}`;
    open = true;
  }
  return path;
}

function bandPath({ x, band }, X, Y) {
  const known = x.map((_, i) => i).filter((i) => band[i] && band[i][0] !== null && x[i] !== null);
  if (known.length < 2) return known.map((i) => `M${X(x[i]) - 3} ${Y(band[i][0])}h6V${Y(band[i][1])}h-6Z`).join("");
  const at = (i, side) => `${X(x[i]).toFixed(1)} ${Y(band[i][side]).toFixed(1)}`;
  return `M${known.map((i) => at(i, 1)).join("L")}L${known.reverse().map((i) => at(i, 0)).join("L")}Z`;
}

/* Moving mean with weights that fade; without the pull towards 0 of a plain one at the start. */
function averaged(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

function pointer(plot, image, series, box, X, Y, xName) {
  const tip = h("div", { class: "tip", hidden: true, role: "status" });
  const line = s("line", { y1: box.top, y2: box.bottom, style: { stroke: "var(--soft)", strokeDasharray: "2 2" }, visibility: "hidden" });
  image.append(line);
  const every = [...new Set(series.flatMap((one) => one.x))].filter((x) => x !== null).sort((a, b) => a - b);
  let place = -1;
  const show = (i) => {
    place = Math.min(Math.max(i, 0), every.length - 1);
    const x = every[place], at = X(x);
    const rows = series.map((one) => {
      const j = one.x.indexOf(x);
      if (j < 0 || one.y[j] === null) return null;
      const pair = one.band && one.band[j];
      return h("div", {}, h("span", { style: { color: one.ink } }, "\u25cf "), series.length > 1 ? `${one.name} ` : "", h("b", {}, fmt(one.y[j])), pair ? ` (${fmt(pair[0], 3)} to ${fmt(pair[1], 3)})` : "");
    }).filter(Boolean);
    fill(line, { x1: at, x2: at, visibility: "visible" }, []);
    tip.replaceChildren(h("div", { class: "soft" }, `${xName} ${fmt(x, 5)}`), ...rows.slice(0, 12));
    tip.hidden = false;
    const half = at > (box.left + box.right) / 2;
    Object.assign(tip.style, { left: half ? "auto" : `${at + 10}px`, right: half ? `${plot.clientWidth - at + 10}px` : "auto" });
  };
  const hide = () => { tip.hidden = true; line.setAttribute("visibility", "hidden"); };
  image.addEventListener("pointermove", (event) => {
    const bounds = image.getBoundingClientRect();
    const wanted = event.clientX - bounds.left;
    let low = 0, high = every.length - 1;
    while (low < high) { const middle = (low + high) >> 1; if (X(every[middle]) < wanted) low = middle + 1; else high = middle; }
    show(low > 0 && wanted - X(every[low - 1]) < X(every[low]) - wanted ? low - 1 : low);
  });
  image.addEventListener("pointerleave", hide);
  image.addEventListener("blur", hide);
  image.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 }[event.key];
    if (!move) return;
    event.preventDefault();
    const begin = event.key === "End" || (move < 0 && event.key !== "Home") ? every.length - 1 : 0;
    show(place < 0 ? begin : place + move);
  });
  return [tip];
}

/* parts: [{name, ink, y: share by column}], x: first step of a column */
function stackChart({ title, help, x, parts, xName, unit }) {
  const table = () => ({ head: [xName, ...parts.map((part) => part.name)], rows: x.map((at, i) => [at, ...parts.map((part) => part.y[i] ?? 0)]) });
  return figure({ title, help, table, legend: parts.map((part) => [part.name, part.ink, "square"]) }, (plot) => (width) => {
    const height = 210, box = { left: 46, right: width - 10, top: 8, bottom: height - 34 };
    const sums = x.map((_, i) => parts.reduce((sum, part) => sum + (part.y[i] || 0), 0) || 1);
    const last = x.length > 1 ? x[x.length - 1] : x[0] + 1;
    const X = (at) => box.left + ((at - x[0]) / (last - x[0])) * (box.right - box.left);
    const Y = (share) => box.bottom - share * (box.bottom - box.top);
    const image = frame(width, height, box, { X, Y: (y) => Y(y / 100), from: x[0], to: last, yTicks: [0, 25, 50, 75, 100], xName, label: title });
    let under = x.map(() => 0);
    const xs = x.length > 1 ? x : [x[0], last];
    for (const part of parts) {
      const over = under.map((base, i) => base + (part.y[i] || 0) / sums[i]);
      const top = xs.map((at, i) => `${X(at).toFixed(1)} ${Y(over[Math.min(i, over.length - 1)]).toFixed(1)}`);
      const bottom = xs.map((at, i) => `${X(at).toFixed(1)} ${Y(under[Math.min(i, under.length - 1)]).toFixed(1)}`).reverse();
      image.append(s("path", { d: `M${top.join("L")}L${bottom.join("L")}Z`, style: { fill: part.ink, fillOpacity: 0.75, stroke: "var(--card)", strokeWidth: 0.5 } }));
      under = over;
    }
    const shares = parts.map((part) => ({ name: part.name, ink: part.ink, x, y: x.map((_, i) => part.y[i] ?? null) }));
    image.append(s("text", { x: box.left - 6, y: height - 18, "text-anchor": "end" }, unit || "%"));
    plot.replaceChildren(image, ...pointer(plot, image, shares, box, X, Y, xName));
  });
}

/* cells[column][row] are counts; a column is coloured by the share of its sum */
function heatChart({ title, help, x, to, cells, rows, xName, wide }) {
  const table = () => ({ head: [xName, ...rows], rows: cells.map((column, i) => [x[i] === to[i] ? x[i] : `${x[i]} to ${to[i]}`, ...column]) });
  return figure({ title, help, table, wide }, (plot) => (width) => {
    const height = 250, box = { left: 62, right: width - 10, top: 6, bottom: height - 34 };
    const first = x[0], last = to[to.length - 1] + 1;
    const X = (at) => box.left + ((at - first) / (last - first)) * (box.right - box.left);
    const tall = (box.bottom - box.top) / rows.length;
    const image = frame(width, height, box, { X, Y: () => 0, from: first, to: last - 1, yTicks: [], xName, label: title });
    rows.forEach((name, i) => (i % 2 === 0 || i === rows.length - 1) && image.append(s("text", { x: box.left - 6, y: box.bottom - (i + 0.5) * tall + 4, "text-anchor": "end" }, name)));
    cells.forEach((column, i) => {
      const sum = column.reduce((a, b) => a + b, 0) || 1;
      column.forEach((count, j) => count && image.append(s("rect", {
        x: X(x[i]), y: box.bottom - (j + 1) * tall + 0.5, width: Math.max(X(to[i] + 1) - X(x[i]) - 0.4, 0.6), height: tall - 1,
        style: { fill: "var(--c0)", fillOpacity: 0.1 + 0.9 * Math.sqrt(count / sum) },
      })));
    });
    const whole = cells.map((column) => column.reduce((a, b) => a + b, 0));
    const series = rows.map((name, j) => ({ name, ink: "var(--c0)", x, y: cells.map((column) => column[j] || null) })).reverse();
    series.push({ name: "all", ink: "var(--soft)", x, y: whole });
    plot.replaceChildren(image, ...pointer(plot, image, series, box, (at) => X(at), () => 0, xName));
  });
}
