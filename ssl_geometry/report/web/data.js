"use strict";
// Unpacks the records and selects rows. A row is an index `i` below `report.rows`.

class Report {
  static async read(packed) {
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Report(new Uint8Array(await new Response(stream).arrayBuffer()));
  }

  static async embedded(base64) {
    const text = atob(base64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return Report.read(bytes);
  }

  constructor(bytes) {
    const length = new DataView(bytes.buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
    Object.assign(this, header);
    let at = 4 + length;
    for (const [name, width] of Object.entries(header.columns)) {
      this[name] = numbers(bytes.subarray(at, at + width * header.rows), width, header.rows, name);
      at += width * header.rows;
    }
    this.series = header.series.map(([run, model, other, metric, view, split, protocol], id) => (
      { id, run, model, other, metric, view, split, protocol, from: id ? header.ends[id - 1] : 0, to: header.ends[id] }));
    for (const series of this.series) {
      const place = series.from < series.to ? this.places[this.place[series.from]] : [null, null, null, null];
      series.layered = place[0] !== null;
      series.paired = place[2] !== null;
      const run = this.runs[series.run].label;
      const called = (model) => (model === null || run.split("/").pop() === model ? run : `${run}: ${model}`);
      series.name = called(series.model);
      series.partner = series.paired ? called(series.other) : null;
      series.against = series.other === series.model ? "itself" : series.other === "init" ? "its own initialisation" : series.other;
    }
  }

  // The rows of series as objects, for drawing.
  *of(series) {
    for (const one of series) {
      for (let i = one.from; i < one.to; i++) yield this.row(i, one);
    }
  }

  row(i, series) {
    const [layer, depth, layerOther, depthOther] = this.places[this.place[i]];
    const [epoch, step] = this.times[this.time[i]];
    return { series, layer, depth, layerOther, depthOther, epoch, step, value: this.value[i], low: this.low[i],
      high: this.high[i], n: this.n[i] < 0 ? null : this.n[i] };
  }

  epochs(series) {
    const found = new Set();
    for (const one of series) {
      for (let i = one.from; i < one.to; i++) found.add(this.times[this.time[i]][0] ?? 0);
    }
    return [...found].sort((a, b) => a - b);
  }

  // The rows of one series at its last epoch up to `epoch`.
  upTo(series, epoch) {
    let last = -Infinity;
    for (let i = series.from; i < series.to; i++) {
      const here = this.times[this.time[i]][0] ?? 0;
      if (here <= epoch && here > last) last = here;
    }
    return [...this.of([series])].filter((row) => (row.epoch ?? 0) === last);
  }

  number(value) {
    return this.rounded ? Number(value.toPrecision(5)) : value;
  }

  plain(row) {
    const { run, model, other, metric, view, split, protocol } = row.series;
    const number = (value) => (Number.isNaN(value) ? null : this.number(value));
    return { run: this.runs[run].label, model, model_other: other, metric, layer: row.layer, layer_other: row.layerOther,
      depth: row.depth, depth_other: row.depthOther, view, split, epoch: row.epoch, step: row.step,
      value: number(row.value), low: number(row.low), high: number(row.high), n: row.n, protocol };
  }

  csv(series) {
    const cell = (value) => {
      const text = value === null ? "" : String(value);
      return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const lines = [];
    for (const row of this.of(series)) {
      const plain = this.plain(row);
      if (!lines.length) lines.push(Object.keys(plain).join(","));
      lines.push(Object.values(plain).map(cell).join(","));
    }
    return lines.join("\n") + "\n";
  }

  json(series) {
    const rows = [...this.of(series)].map((row) => this.plain(row));
    const used = new Set(series.map((one) => one.protocol));
    const protocols = Object.fromEntries(Object.entries(this.protocols).filter(([hash]) => used.has(hash)));
    return JSON.stringify({ runs: this.runs, protocols, records: rows });
  }
}

// A column is stored as planes of bytes, the lowest first; with three bytes, they are the upper ones of a float32.
function numbers(planes, width, rows, name) {
  const cell = width === 3 ? 4 : width;
  const bytes = new Uint8Array(cell * rows);
  for (let k = 0; k < width; k++) {
    const from = k * rows, to = k + cell - width;
    for (let i = 0; i < rows; i++) bytes[i * cell + to] = planes[from + i];
  }
  const kind = { place: Uint32Array, time: Uint32Array, n: Int32Array }[name] ?? (cell === 8 ? Float64Array : Float32Array);
  return new kind(bytes.buffer);
}

function download(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
