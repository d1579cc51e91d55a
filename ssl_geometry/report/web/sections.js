// What the page shows: which metrics stand in which section, and the figures of each.

const SECTIONS = [
  { id: "training", title: "Training and evaluation", about: "Logged while training: over optimiser steps." },
  { id: "cka", title: "Centred kernel alignment",
    about: "Similarity of the layers of two networks, 0 to 1 (an unbiased estimate can be slightly below 0). White dots: the most similar layer of the other network." },
  { id: "invariance", title: "Invariance to augmentations, and class structure",
    about: "CKA of a layer under two augmented views of the same images, by augmentation; and its CKA with the labels." },
  { id: "probes", title: "Probes", about: "Accuracy of classifiers on the frozen features of each layer." },
  { id: "neighbors", title: "Neighbourhoods and manifolds", about: "NNK neighbourhoods: means over images with 95 % bands, by kind of manifold." },
  { id: "spectra", title: "Spectra", about: "Rank, decay and uniformity of each layer's features." },
  { id: "other", title: "Other measurements", about: "All other records." },
];
let METRICS = {};  // label with its unit, section, and limits of error bars of each metric: the builder's catalogue
const named = (metric) => METRICS[metric]?.label ?? metric;
const sectionOf = (one) => (one.metric === "mutual_knn" && one.paired ? "cka" : METRICS[one.metric].section);  // of layers, or of views
const DEPTH = "depth of the layer (0 = stem, 1 = end of the backbone)";
const MANY_FIGURES = 12, MANY_LINES = 6;  // more are shown when the reader asks
const unique = (values) => [...new Set(values)];
const images = (rows) => {
  const n = unique(rows.map((row) => row.n).filter((n) => n !== null)).sort((a, b) => a - b);
  return n.length ? `n = ${n.length > 1 ? `${n[0].toLocaleString("en")} to ` : ""}${n.at(-1).toLocaleString("en")}` : "n not recorded";
};

function describe(row, more = "") {
  const bar = Number.isFinite(row.low) && Number.isFinite(row.high) ? ` [${show(row.low)}, ${show(row.high)}]` : "";
  const layers = row.layerOther !== null ? `${row.layer} × ${row.layerOther}` : row.layer ?? "";
  const when = row.epoch === null ? "" : `epoch ${row.epoch}`;
  return [row.series.name, layers, more, `${show(row.value)}${bar}`, [when, row.n === null ? "" : `n = ${row.n.toLocaleString("en")}`].filter(Boolean).join(", ")]
    .filter(Boolean).join("\n");
}

// A figure that is drawn when it comes near the window. `draw` gives {svg, note, legend, body}.
class Card {
  constructor(page, title, series, draw) {
    Object.assign(this, { page, title, series, draw, near: false, stale: true });
    this.caption = make("figcaption", {}, title, make("small"));
    this.place = make("div");
    const hashes = unique(series.map((one) => one.protocol)).filter((hash) => hash !== null);
    const texts = () => hashes.map((hash) => `${hash}\n${JSON.stringify(page.report.protocols[hash] ?? "no text in the run directory", null, 1)}`).join("\n\n");
    const details = make("details", { ontoggle: (event) => { if (event.target.open && event.target.children.length < 2) event.target.append(make("pre", { tabindex: 0 }, texts())); } },
      make("summary", {}, hashes.length ? `protocol ${hashes.slice(0, 3).join(", ")}${hashes.length > 3 ? ` and ${hashes.length - 3} more` : ""}` : "logged, without a protocol"));
    const save = make("button", { type: "button", class: "small", "aria-label": `CSV of ${title}`,
      onclick: () => download(`${title.replace(/[^\w]+/g, "-").toLowerCase()}.csv`, page.report.csv(series), "text/csv") }, "CSV");
    this.element = make("figure", {}, this.caption, this.place, make("div", { class: "foot" }, details, save));
    page.watch(this);
  }

  refresh() {
    this.stale = true;
    if (this.near) this.paint();
  }

  paint() {
    this.stale = false;
    const { svg, note, lines, body, title } = this.draw();
    this.caption.replaceChildren(title ?? this.title, make("small", {}, note ?? ""));
    const focused = this.place.contains(document.activeElement);
    this.place.replaceChildren(...[svg ?? body, lines ? legend(lines) : null].filter(Boolean));
    if (focused && svg) svg.focus();
    this.element.classList.toggle("table", Boolean(body));
  }
}

// ---- figures -------------------------------------------------------------------------------------------------------

// The map of one series (layers of two networks), or of several (layers and augmentations), at an epoch.
function mapFigure(report, series, epoch) {
  const rows = series.flatMap((one) => report.upTo(one, epoch));
  const paired = series[0].paired, column = (row) => (paired ? row.layerOther : row.series.view);
  const order = (name, at) => [...new Map([...rows].sort((a, b) => (at(a) ?? 0) - (at(b) ?? 0)).map((row) => [name(row), 1])).keys()];
  const down = order((row) => row.layer, (row) => row.depth), across = paired ? order(column, (row) => row.depthOther) : unique(rows.map(column));
  const cells = new Map(rows.map((row) => [`${row.layer}\n${column(row)}`, row]));
  const cell = (r, c) => cells.get(`${down[r]}\n${across[c]}`);
  const { name, against, metric, other, model } = series[0];
  const title = `${named(metric)}: ${name}${paired ? ` and ${against}` : ""}`;
  const when = rows[0]?.epoch;
  return { title, note: `${when === null ? "" : `epoch ${when}, `}${images(rows)}`, svg: heatMap({ title, rows: down, cols: across,
    value: (r, c) => cell(r, c)?.value ?? NaN, text: (r, c) => (cell(r, c) ? describe(cell(r, c), paired ? "" : across[c]) : "not measured"), dots: paired && other !== model && metric !== "nnk_jaccard",
    xlabel: paired ? (against === "itself" ? "layer" : `layer of ${against}`) : "augmentation of both views", ylabel: "layer", clabel: named(metric) }) };
}

// Of pairs of layers, each layer with its match: the layer of the same name, else of the nearest depth.
function matchedLayers(rows) {
  if (!rows.length || rows[0].layerOther === null) return rows;
  const best = new Map();
  for (const row of rows) {
    const away = row.layer === row.layerOther ? -1 : Math.abs(row.depth - row.depthOther), key = `${row.layer}\n${row.epoch}\n${row.step}`;
    if (!(best.get(key)?.away <= away)) best.set(key, { row, away });
  }
  return [...best.values()].map((found) => found.row);
}

const onDepth = (row, i) => ({ x: row.depth ?? i, value: row.value, low: row.low, high: row.high, text: () => describe(row) });
const byDepth = (a, b) => (a.depth ?? 0) - (b.depth ?? 0);

// Runs compared at one epoch: one line per run, with its band.
function comparedFigure(report, series, epoch) {
  const lines = series.map((one) => ({ name: one.label, place: one.place, rows: matchedLayers(report.upTo(one, epoch)).sort(byDepth) }));
  const rows = lines.flatMap((line) => line.rows), barred = rows.some((row) => Number.isFinite(row.low));
  const epochs = unique(rows.map((row) => row.epoch)).filter((e) => e !== null);
  for (const line of lines) line.points = line.rows.map(onDepth);
  return { lines, note: `${epochs.length > 1 ? "each run's last epoch up to" : "epoch"} ${Math.max(...epochs, 0)}, ${images(rows)}${barred ? "; band: 95 %" : ""}`,
    svg: lineChart({ title: `${named(series[0].metric)} against depth`, lines, domain: [0, 1], range: METRICS[series[0].metric].bars ?? undefined, xlabel: DEPTH, ylabel: named(series[0].metric) }) };
}

// One run during training: one line per epoch over depth, or one line per layer over epochs.
function trainingFigure(report, one, against, epoch) {
  const rows = matchedLayers([...report.of([one])]), along = against === "depth" ? (row) => row.depth ?? 0 : (row) => row.epoch ?? 0;
  const across = against === "depth" ? (row) => row.epoch ?? 0 : (row) => row.depth ?? 0;
  const groups = new Map();
  for (const row of rows) {
    const key = against === "depth" ? across(row) : row.layer;
    groups.set(key, [...(groups.get(key) ?? []), row]);
  }
  const marks = rows.map(across), low = Math.min(...marks), high = Math.max(...marks);
  const last = Math.max(...[...groups.keys()].filter((key) => key <= epoch), -1);
  const lines = [...groups].map(([key, members]) => ({ name: key, share: high > low ? (across(members[0]) - low) / (high - low) : 0.5, strong: against === "depth" && key === last,
    points: members.sort((a, b) => along(a) - along(b)).map((row) => ({ ...onDepth(row), x: along(row) })) })).sort((a, b) => a.share - b.share);
  const scale = { label: against === "depth" ? "epoch" : "depth of the layer", low, high, whole: against === "depth" };
  return { note: `one line ${against === "depth" ? `per epoch, epoch ${last} is thick` : "per layer"}; ${images(rows)}`,
    svg: lineChart({ title: `${named(one.metric)} of ${one.label}`, lines, scale, whole: against !== "depth", domain: against === "depth" ? [0, 1] : undefined, xlabel: against === "depth" ? DEPTH : "epoch", ylabel: named(one.metric) }) };
}

// The distribution of a metric over images: its median and quartiles.
function distributionFigure(report, series, epoch) {
  const lines = series.map((one) => {
    const layers = new Map();
    for (const row of report.upTo(one, epoch)) layers.set(row.layer, [...(layers.get(row.layer) ?? []), row]);
    const at = (rows, level) => rows.reduce((a, b) => (Math.abs(a.low - level) <= Math.abs(b.low - level) ? a : b));
    return { name: one.label, place: one.place, points: [...layers.values()].map((rows) => {
      const [quarter, half, more] = [0.25, 0.5, 0.75].map((level) => at(rows, level));
      return { x: half.depth ?? 0, value: half.value, low: quarter.value, high: more.value, n: half.n,
        text: () => `${one.name}\n${half.layer}\nmedian ${show(half.value)}, half of the images in [${show(quarter.value)}, ${show(more.value)}]\nepoch ${half.epoch}, n = ${half.n}` };
    }).sort((a, b) => a.x - b.x) };
  });
  const metric = series[0].metric.replace(/_quantile$/, "");
  return { lines, note: `median; band: the middle half of the images; ${images(lines.flatMap((line) => line.points))}`,
    svg: lineChart({ title: `Distribution of ${named(metric)} over images`, lines, domain: [0, 1], xlabel: DEPTH, ylabel: named(metric) }) };
}

// Metrics without layers, over training.
function scalarFigure(report, series) {
  const steps = series.every((one) => report.row(one.from, one).step !== null);
  const lines = series.map((one) => ({ name: one.label, place: one.place, points: [...report.of([one])].map((row) => ({ ...onDepth(row), x: (steps ? row.step : row.epoch) ?? 0,
    text: () => describe(row, steps ? `step ${row.step}` : "") })).sort((a, b) => a.x - b.x) }));
  return { lines, note: lines.every((line) => line.points.length === 1) ? "one value per run" : "",
    svg: lineChart({ title: named(series[0].metric), lines, whole: true, xlabel: steps ? "optimiser step" : "epoch", ylabel: named(series[0].metric) }) };
}

const LONG = 400, NUMBERS = new Set(["epoch", "value", "95 %", "n"]);
function tableFigure(report, series) {
  const rows = [...report.of(series)];
  const cells = (row) => [row.series.name, row.series.against && row.series.other !== null ? row.series.against : "", named(row.series.metric), row.layer ?? "", row.layerOther ?? "", row.series.view ?? "", row.series.split ?? "", row.epoch ?? "",
    show(row.value), Number.isFinite(row.low) ? `${show(row.low)} – ${show(row.high)}` : "", row.n ?? ""];
  const head = ["run", "with", "metric", "layer", "other layer", "view", "split", "epoch", "value", "95 %", "n"];
  const kept = head.map((_, i) => rows.slice(0, LONG).some((row) => cells(row)[i] !== ""));
  const only = (list) => list.filter((_, i) => kept[i]);
  return { note: rows.length > LONG ? `the first ${LONG} of ${rows.length.toLocaleString("en")} rows; the CSV has all` : `${rows.length} row${rows.length > 1 ? "s" : ""}`,
    body: make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "table" }, make("table", {}, make("thead", {}, make("tr", {}, ...only(head).map((name) => make("th", { scope: "col", class: NUMBERS.has(name) ? "number" : null }, name)))),
      make("tbody", {}, ...rows.slice(0, LONG).map((row) => make("tr", {}, ...only(cells(row)).map((cell, i) => make("td", { class: NUMBERS.has(only(head)[i]) ? "number" : null }, String(cell))))))))};
}

// ---- a section -----------------------------------------------------------------------------------------------------

function chooser(text, id, options, chosen, change) {
  const select = make("select", { id, onchange: (event) => change(event.target.value) }, ...options.map(([value, name]) => make("option", { value, selected: value === chosen }, name)));
  return make("label", { for: id }, text, select);
}

// Runs, views and partners that share a figure get one line each; a run that is alone in it keeps its colour.
function placed(page, series) {
  const alone = unique(series.map((one) => one.name)).length === series.length;
  const views = unique(series.map((one) => one.view)).length > 1, others = unique(series.map((one) => one.other)).length > 1;
  return series.map((one, place) => ({ ...one, place: alone ? page.names.indexOf(one.name) : place, label: [one.name, views ? one.view : null, others && one.other !== null ? `with ${one.against}` : null].filter(Boolean).join(", ") }));
}

function fillSection(page, section, body, all) {
  const { report } = page, state = (page.state[section.id] ??= {});
  const layered = all.filter((one) => one.layered), flat = all.filter((one) => !one.layered);
  const figures = make("div", { class: "figures" }), controls = make("div", { class: "controls" });
  body.append(controls, figures);
  const cards = [];
  const add = (title, series, draw) => { const card = new Card(page, title, series, draw); cards.push(card); figures.append(card.element); };
  const metrics = unique(layered.map((one) => one.metric).filter((metric) => !metric.endsWith("_quantile")));
  const rest = (metric) => (/_(std|random|fit|l2|gradient_norm|learning_rate|weight_decay)(_|$)/.test(metric) ? 1 : 0);
  metrics.sort((a, b) => rest(a) - rest(b));
  if (!metrics.includes(state.metric)) state.metric = metrics[0];
  const ofMetric = layered.filter((one) => one.metric === state.metric), paired = ofMetric.some((one) => one.paired);
  const key = paired ? (one) => one.against ?? "" : (one) => one.view ?? "";
  const choices = unique(ofMetric.map(key)).filter((choice) => !(paired && choice === "itself"));
  const groups = [["", "all together"], ...choices.map((choice) => [choice, choice])];
  const epochs = report.epochs(ofMetric), lines = ofMetric.filter((one) => one.against !== "itself").length;
  const pairsOnly = paired && choices.length > 1 && epochs.length < 2 && lines <= MANY_LINES;  // a comparison
  if (state.choice !== "" && !choices.includes(state.choice)) state.choice = pairsOnly ? "" : choices[0] ?? null;
  const again = () => page.fill(section);
  const runs = unique(ofMetric.map((one) => one.name));
  const maps = ofMetric.filter((one) => one.paired).length, curves = 2 * ofMetric.filter((one) => report.epochs([one]).length > 1).length;
  if (state.run === undefined) state.run = runs.length > 2 && maps + curves > MANY_FIGURES ? runs[0] : "";
  if (!runs.includes(state.run)) state.run = "";
  const single = (one) => !state.run || one.name === state.run || one.partner === state.run;  // a pair is of both
  if (metrics.length > 1) controls.append(chooser("metric", `${section.id}-metric`, metrics.map((metric) => [metric, named(metric)]), state.metric, (value) => { state.metric = value; again(); }));
  if (choices.length > 1) controls.append(chooser(paired ? "curves: compared with" : "view", `${section.id}-choice`, groups, state.choice, (value) => { state.choice = value; again(); }));
  if (runs.length > 1) controls.append(chooser("maps and training of", `${section.id}-run`, [["", "every run"], ...runs.map((name) => [name, name])], state.run, (value) => { state.run = value; again(); }));
  const epoch = () => epochs[state.epoch ?? epochs.length - 1] ?? 0;
  if (state.epoch >= epochs.length) state.epoch = null;
  if (epochs.length > 1) {
    const output = make("output", { for: `${section.id}-epoch` });
    const slider = make("input", { type: "range", id: `${section.id}-epoch`, min: 0, max: epochs.length - 1, step: 1 });
    const showEpoch = () => { output.textContent = `epoch ${epoch()}`; slider.setAttribute("aria-valuetext", output.textContent); };
    slider.value = state.epoch ?? epochs.length - 1;
    slider.addEventListener("input", () => {
      state.epoch = Number(slider.value) === epochs.length - 1 ? null : Number(slider.value);  // the end: follow a run that goes on
      showEpoch();
      cards.forEach((card) => card.refresh());
    });
    showEpoch();
    controls.append(make("label", { class: "epochs", for: slider.id }, "epoch", slider), output);
  }
  const shown = placed(page, ofMetric.filter((one) => !(paired && one.against === "itself") && (!state.choice || key(one) === state.choice)));
  if (paired) for (const one of ofMetric.filter(single)) add(`${named(one.metric)}: ${one.name} and ${one.against}`, [one], () => mapFigure(report, [one], epoch()));
  if (section.id === "invariance" && state.metric === "invariance") {
    for (const name of unique(ofMetric.filter(single).map((one) => one.name))) {
      const mine = ofMetric.filter((one) => one.name === name);
      if (mine.length > 1) add(`${named(state.metric)}: ${name}`, mine, () => mapFigure(report, mine, epoch()));
    }
  }
  const chosen = !state.choice ? "" : paired ? ` with ${state.choice}` : choices.length > 1 ? `, ${state.choice}` : "";  // the partner is always named
  const what = `${named(state.metric)}${chosen}`;
  if (shown.length) add(`${what}: against depth`, shown, () => comparedFigure(report, shown, epoch()));
  const distribution = placed(page, layered.filter((one) => one.metric === `${state.metric}_quantile` && (!state.choice || key(one) === state.choice)));
  if (distribution.length) add(`${what}: distribution over images`, distribution, () => distributionFigure(report, distribution, epoch()));
  for (const one of shown.filter(single)) {
    if (report.epochs([one]).length < 2) continue;
    const who = `${named(one.metric)}: ${one.label}${chosen}`;
    add(`${who}, against depth`, [one], () => trainingFigure(report, one, "depth", epoch()));
    add(`${who}, over training`, [one], () => trainingFigure(report, one, "epoch"));
  }
  const numbers = [];
  for (const metric of unique(flat.map((one) => one.metric))) {
    const series = placed(page, flat.filter((one) => one.metric === metric));
    if (series.some((one) => one.to - one.from > 1)) add(named(metric), series, () => scalarFigure(report, series));
    else numbers.push(...series);
  }
  if (numbers.length) add("Single values", numbers, () => tableFigure(report, numbers));
}
