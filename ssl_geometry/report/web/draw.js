// Figures as SVG: heat maps and line charts, with values on hover or by the arrow keys.

const VIRIDIS = ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59", "#b4de2c", "#fde725"]
  .map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const SVG = "http://www.w3.org/2000/svg";

// Elements are created, never parsed, so that tags in names are plain text.
function make(tag, attributes = {}, ...children) {
  const element = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
const SVG_TAGS = new Set(["svg", "g", "path", "rect", "text", "line", "circle", "defs", "linearGradient", "stop"]);

function viridis(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const mixed = VIRIDIS[low].map((part, i) => Math.round(part + (at - low) * (VIRIDIS[low + 1][i] - part)));
  return `rgb(${mixed.join(",")})`;
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// The part of the colour scale that contrasts with the background.
const ordered = (share) => viridis(isDark() ? 0.25 + 0.75 * share : 0.82 * share);

function show(value) {
  if (value === null || Number.isNaN(value)) return "not computable";
  if (value === 0 || (Math.abs(value) >= 0.001 && Math.abs(value) < 1e6)) return String(Number(value.toPrecision(4)));
  return value.toExponential(2);
}

function ticks(low, high, count, whole = false) {
  const rough = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

// Adds tooltips to rows of points {x, y, text}: the arrow keys move between points, the mouse selects the nearest.
function readable(svg, rows, size) {
  const tip = document.getElementById("tip"), announced = document.getElementById("announced");
  const cursor = make("rect", { class: "cursor", width: size[0], height: size[1], visibility: "hidden" });
  svg.append(cursor);
  let at = null;
  const show = ([r, c], spoken) => {
    at = [r, c];
    const point = rows[r][c];
    cursor.setAttribute("x", point.x - size[0] / 2);
    cursor.setAttribute("y", point.y - size[1] / 2);
    cursor.setAttribute("visibility", "visible");
    tip.textContent = point.text();
    if (spoken) announced.textContent = tip.textContent;
    tip.hidden = false;
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const scale = Math.min(box.width / view.width, box.height / view.height);
    const left = box.left + (box.width - scale * view.width) / 2 + point.x * scale;
    const top = box.top + (box.height - scale * view.height) / 2 + point.y * scale;
    tip.style.left = `${Math.max(4, Math.min(left + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, top - tip.offsetHeight - 12)}px`;
  };
  const hide = () => { cursor.setAttribute("visibility", "hidden"); tip.hidden = true; };
  svg.addEventListener("pointermove", (event) => {
    const matrix = svg.getScreenCTM();
    const x = (event.clientX - matrix.e) / matrix.a, y = (event.clientY - matrix.f) / matrix.d;
    let best = null, least = 900;
    rows.forEach((row, r) => row.forEach((point, c) => {
      const away = (point.x - x) ** 2 + (point.y - y) ** 2;
      if (away < least) [best, least] = [[r, c], away];
    }));
    if (best) show(best, false); else hide();
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] }[event.key];
    if (event.key === "Escape") return hide();
    if (!move || !rows.length) return;
    event.preventDefault();
    const r = at ? Math.min(Math.max(at[0] + move[0], 0), rows.length - 1) : 0;
    const c = at ? Math.min(Math.max(at[1] + move[1], 0), rows[r].length - 1) : 0;
    show([r, c], true);
  });
}

function frame(width, height, title) {
  return make("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img",
    "aria-label": `${title}. Use the arrow keys to read values.` });
}

function label(x, y, text, attributes = {}) {
  return make("text", { x, y, "text-anchor": "middle", ...attributes }, text);
}

// A colour bar at the right edge.
function colorbar(svg, x, top, height, low, high, color, title, whole) {
  for (let i = 0; i < 60; i++) {
    svg.append(make("rect", { x, y: top + height - (i + 1) * height / 60, width: 10, height: height / 60 + 0.6, fill: color(i / 59) }));
  }
  const shown = high > low ? ticks(low, high, 5, whole) : [low];
  for (const tick of shown) {
    const y = top + height - (high > low ? (tick - low) / (high - low) : 0.5) * height;
    svg.append(label(x + 13, y + 3, show(tick), { class: "small", "text-anchor": "start" }));
  }
  svg.append(label(0, 0, title, { class: "small", transform: `translate(${x + 48},${top + height / 2}) rotate(90)` }));
}

// {title, rows, cols, value(r, c), text(r, c), xlabel, ylabel, clabel, dots}: the first row is at the bottom.
function heatMap({ title, rows, cols, value, text, xlabel, ylabel, clabel, dots }) {
  const longest = (names) => Math.max(...names.map((name) => name.length));
  const left = 26 + Math.min(120, 5 * longest(rows)), bottom = 24 + Math.min(110, 4.9 * longest(cols));
  const width = 300, height = Math.min(300, Math.max(150, 22 * rows.length));
  const full = [left + width + 66, height + bottom + 12];
  const svg = frame(...full, title), top = 8;
  const cell = [width / cols.length, height / rows.length];
  let low = 0, high = 1;
  rows.forEach((_, r) => cols.forEach((_, c) => {
    const v = value(r, c);
    if (v < low) low = v;
    if (v > high) high = v;
  }));
  const levels = new Map(), points = [];
  const x = (c) => left + c * cell[0], y = (r) => top + height - (r + 1) * cell[1];
  rows.forEach((_, r) => {
    points.push(cols.map((_, c) => ({ x: x(c + 0.5), y: y(r) + cell[1] / 2, text: () => text(r, c) })));
    cols.forEach((_, c) => {
      const v = value(r, c), level = Number.isNaN(v) ? "missing" : Math.round(255 * (v - low) / (high - low));
      levels.set(level, (levels.get(level) ?? "") + `M${x(c).toFixed(2)} ${y(r).toFixed(2)}h${(cell[0] + 0.4).toFixed(2)}v${(cell[1] + 0.4).toFixed(2)}h-${(cell[0] + 0.4).toFixed(2)}z`);
    });
  });
  for (const [level, d] of levels) {
    const look = level === "missing" ? { class: "missing" } : { fill: viridis(level / 255) };
    svg.append(make("path", { d, ...look, "shape-rendering": "crispEdges", "data-level": level }));
  }
  if (dots) {
    rows.forEach((_, r) => {
      const values = cols.map((_, c) => value(r, c)), best = Math.max(...values.filter((v) => !Number.isNaN(v)));
      if (best > -Infinity) svg.append(make("circle", { cx: x(values.indexOf(best) + 0.5), cy: y(r) + cell[1] / 2, r: Math.min(2.6, cell[0] / 3, cell[1] / 3), fill: "#fff", stroke: "#000", "stroke-width": 0.7 }));
    });
  }
  const every = (count, room) => Math.ceil(count / (room / 10.5));
  const short = (name) => (name.length > 22 ? `…${name.slice(-21)}` : name);
  rows.forEach((name, r) => {
    if (r % every(rows.length, height) === 0) svg.append(label(left - 4, y(r) + cell[1] / 2 + 3, short(name), { class: "small", "text-anchor": "end" }));
  });
  cols.forEach((name, c) => {
    if (c % every(cols.length, width) === 0) svg.append(label(0, 0, short(name), { class: "small", "text-anchor": "end", transform: `translate(${x(c + 0.5) + 3},${top + height + 6}) rotate(-90)` }));
  });
  svg.append(label(left + width / 2, full[1] - 4, xlabel));
  svg.append(label(0, 0, ylabel, { transform: `translate(11,${top + height / 2}) rotate(-90)` }));
  colorbar(svg, left + width + 8, top, height, low, high, viridis, clabel);
  readable(svg, points, cell);
  return svg;
}

const MARKS = [
  (x, y) => `M${x - 3} ${y}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z`,
  (x, y) => `M${x - 2.8} ${y - 2.8}h5.6v5.6h-5.6z`,
  (x, y) => `M${x} ${y - 3.6}l3.6 6.2h-7.2z`,
  (x, y) => `M${x} ${y - 3.8}l3.8 3.8l-3.8 3.8l-3.8 -3.8z`,
];

// {title, lines, xlabel, ylabel, whole, scale}: a line is {name, points: [{x, value, low, high, text}]} with `place`, its
// index among named lines, or `share`, its position on an ordered scale. `scale` is {label, low, high} for the latter,
// whose bands are not drawn. `domain` is the smallest range of the horizontal axis; `range` limits how far bands extend
// the vertical one.
function lineChart({ title, lines, xlabel, ylabel, whole, scale, domain, range = [-Infinity, Infinity] }) {
  const left = 52, top = 10, width = scale ? 320 : 380, height = 215, bottom = 40;
  const svg = frame(left + width + (scale ? 66 : 14), top + height + bottom, title);
  const all = lines.flatMap((line) => line.points), finite = all.filter((p) => Number.isFinite(p.value));
  const values = finite.map((p) => p.value), low = Math.min(range[0], ...values), high = Math.max(range[1], ...values);
  const bars = scale ? [] : finite.flatMap((p) => [p.low, p.high]).filter((v) => Number.isFinite(v));
  const ends = [...values, ...bars.map((v) => Math.min(Math.max(v, low), high))];
  const at = all.map((p) => p.x);
  let [x0, x1] = [Math.min(domain?.[0] ?? Infinity, ...at), Math.max(domain?.[1] ?? -Infinity, ...at)];
  let [y0, y1] = ends.length ? [Math.min(...ends), Math.max(...ends)] : [0, 1];
  if (y0 > 0 && y0 < 0.5 * y1) y0 = 0;
  if (!(x1 > x0)) [x0, x1] = [x0 - 0.5, x0 + 0.5];
  if (y1 - y0 < 1e-9 * Math.max(Math.abs(y0), 1e-9)) [y0, y1] = [y0 - 0.5 * (Math.abs(y0) || 1), y1 + 0.5 * (Math.abs(y1) || 1)];
  const x = (v) => left + 6 + (v - x0) / (x1 - x0) * (width - 12), y = (v) => top + height - 4 - (v - y0) / (y1 - y0) * (height - 10);
  for (const tick of ticks(y0, y1, 6)) {
    svg.append(make("path", { class: "grid", d: `M${left} ${y(tick)}h${width}` }), label(left - 5, y(tick) + 4, show(tick), { "text-anchor": "end" }));
  }
  for (const tick of ticks(x0, x1, 7, whole)) {
    svg.append(make("path", { class: "axis", d: `M${x(tick)} ${top + height}v4` }), label(x(tick), top + height + 16, show(tick)));
  }
  svg.append(make("path", { class: "axis", d: `M${left} ${top}v${height}h${width}` }));
  svg.append(label(left + width / 2, top + height + 34, xlabel), label(0, 0, ylabel, { transform: `translate(12,${top + height / 2}) rotate(-90)` }));
  const points = [];
  for (const line of lines) {
    const group = make("g", scale ? {} : { class: `c${line.place % 6}` });
    if (scale) group.style.setProperty("--ink", ordered(line.share));
    let d = "", pen = "M";
    for (const p of line.points) {
      if (Number.isFinite(p.value)) { d += `${pen}${x(p.x).toFixed(1)} ${y(p.value).toFixed(1)}`; pen = "L"; } else pen = "M";
    }
    const barred = line.points.filter((p) => Number.isFinite(p.low) && Number.isFinite(p.high));
    if (barred.length > 1 && !scale) {
      const up = barred.map((p) => `${x(p.x).toFixed(1)} ${y(p.high).toFixed(1)}`), down = barred.map((p) => `${x(p.x).toFixed(1)} ${y(p.low).toFixed(1)}`);
      const inset = `inset(${top}px 0 ${bottom}px 0) view-box`;
      group.append(make("path", { class: "band", d: `M${up.join("L")}L${down.reverse().join("L")}z`, "clip-path": inset }));
    }
    const dash = scale ? "" : DASHES[Math.floor(line.place / 6) % 4];
    group.append(make("path", { class: `line${line.strong ? " strong" : scale ? " faint" : ""}`, d, "stroke-dasharray": dash || null }));
    if (line.points.length <= 60) {
      const mark = scale ? (a, b) => `M${a - 1.6} ${b}a1.6 1.6 0 1 0 3.2 0a1.6 1.6 0 1 0 -3.2 0z` : MARKS[line.place % 4];
      group.append(make("path", { class: "mark", d: line.points.filter((p) => Number.isFinite(p.value)).map((p) => mark(x(p.x), y(p.value))).join("") }));
    }
    svg.append(group);
    const shown = line.points.filter((p) => Number.isFinite(p.value));
    if (shown.length) points.push(shown.map((p) => ({ x: x(p.x), y: y(p.value), text: p.text })));
  }
  if (scale) colorbar(svg, left + width + 8, top, height, scale.low, scale.high, ordered, scale.label, scale.whole);
  readable(svg, points, [11, 11]);
  return svg;
}

function legend(lines) {
  return make("div", { class: "legend" }, ...lines.map((line) => make("span", { class: `c${line.place % 6}` },
    make("svg", { viewBox: "0 0 28 10", "aria-hidden": "true" },
      make("path", { class: "line", d: "M0 5h28", "stroke-dasharray": DASHES[Math.floor(line.place / 6) % 4] || null }),
      make("path", { class: "mark", d: MARKS[line.place % 4](14, 5) })), line.name)));
}
