// The page: selection of runs, sections, colours, and updates from a server.

class Page {
  constructor(report) {
    this.state = {};
    this.watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const card = this.cards.get(entry.target);
        if (!card) continue;
        card.near = entry.isIntersecting;
        if (card.near && card.stale) card.paint();
      }
    }, { rootMargin: "400px" });
    this.cards = new Map();
    this.heights = new Map();  // of figures as they were drawn, so that a rebuilt page keeps its scroll position
    this.take(report);
  }

  take(report) {
    this.report = report;
    METRICS = report.metrics;
    if (!this.chosen) this.chosen = new Set(report.chosen);
    this.build();
  }

  watch(card) {
    if (this.heights.has(card.title)) card.element.style.minHeight = `${this.heights.get(card.title)}px`;
    this.cards.set(card.element, card);
    this.watcher.observe(card.element);
  }

  get shown() {
    return this.report.series.filter((one) => one.to > one.from && this.chosen.has(this.report.runs[one.run].label));
  }

  build() {
    const { report } = this, main = document.getElementById("content");
    const focused = document.activeElement?.id, scrolled = scrollY;
    for (const card of this.cards.values()) this.heights.set(card.title, card.element.offsetHeight);
    this.watcher.disconnect();
    this.cards.clear();
    document.getElementById("about").textContent = `${report.runs.length} run${report.runs.length > 1 ? "s" : ""}, ${report.rows.toLocaleString("en")} values, `
      + `${Object.keys(report.protocols).length} protocols. All values are rows of the records; this page measures nothing.`;
    const warnings = [report.rounded ? "numbers are rounded to 4 significant digits" : "", report.thinned ? `at most ${report.thinned} measurements of each metric are shown, including the first and the last` : ""].filter(Boolean);
    const warning = warnings.length ? make("p", { class: "warning", id: "left-out" }, `To keep this page small, ${warnings.join(", and ")}. The run directories have all values in full precision.`) : null;
    this.bodies = new Map();
    this.names = unique(this.shown.map((one) => one.name));
    const sections = [...SECTIONS, { id: "configs", title: "Configurations" }].filter(({ id }) => id === "configs" || this.of(id).length);
    main.replaceChildren(...[warning, this.summary(), ...sections.map((section) => {
      const body = make("div");
      this.bodies.set(section.id, body);
      const part = make("section", { id: section.id, "aria-label": section.title }, make("h2", {}, section.title), section.about ? make("p", {}, section.about) : null, body);
      if (section.id === "configs") this.configs(body);
      return part;
    })].filter(Boolean));
    const nav = document.getElementById("contents");
    nav.replaceChildren(...[{ id: "runs", title: "Runs" }, ...sections].map(({ id, title }) => make("a", { href: `#${id}` }, title)));
    for (const section of sections) if (section.id !== "configs") this.fill(section);
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
    scrollTo({ top: scrolled, behavior: "instant" });
  }

  of(id) {
    return this.shown.filter((one) => sectionOf(one) === id);
  }

  fill(section) {
    const body = this.bodies.get(section.id), focused = document.activeElement?.id;
    for (const figure of body.querySelectorAll("figure")) {
      this.watcher.unobserve(figure);
      this.cards.delete(figure);
    }
    const part = make("div");
    fillSection(this, section, part, this.of(section.id));
    body.replaceChildren(...part.childNodes);
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  }

  // One row per run: its method, progress and final results.
  summary() {
    const { report } = this;
    const facts = report.runs.map((run, number) => this.facts(run, number));
    const names = unique(facts.flatMap((row) => Object.keys(row)));
    const choose = (number) => {
      const { label } = report.runs[number];
      return make("input", { type: "checkbox", id: `show-${number}`, "aria-label": `show ${label}`, checked: this.chosen.has(label),
        onchange: (event) => { if (event.target.checked) this.chosen.add(label); else this.chosen.delete(label); this.build(); } });
    };
    const every = (text, labels) => make("button", { type: "button", onclick: () => { this.chosen = new Set(labels); this.build(); } }, text);
    return make("section", { id: "runs", "aria-label": "Runs" }, make("h2", {}, "Runs"),
      make("div", { class: "controls" }, every("Show all", report.runs.map((run) => run.label)), every("Show none", []),
        make("span", {}, `${this.chosen.size} of ${report.runs.length} shown in the figures${report.chosen.length < report.runs.length ? "; initially the latest run of each recipe (runs that differ only by their seed are one recipe)" : ""}`)),
      make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "table of runs" }, make("table", {},
        make("thead", {}, make("tr", {}, ...["show", "run", ...names].map((name) => make("th", { scope: "col" }, name)))),
        make("tbody", {}, ...report.runs.map((run, number) => make("tr", {}, make("td", {}, choose(number)), make("th", { scope: "row" }, run.label),
          ...names.map((name) => {
            const [value, note] = facts[number][name] ?? ["", ""];
            return make("td", {}, value, note ? make("small", {}, ` ${note}`) : null);
          })))))));
  }

  facts(run, number) {
    const { report } = this, { config, facts } = run;
    const mine = report.series.filter((one) => one.run === number && one.to > one.from), epochs = report.epochs(mine);
    const found = {};
    const put = (name, value, note = "") => { if (value !== undefined && value !== null && value !== "") found[name] = [String(value), note]; };
    put("method", config["model.class_path"]?.split(".").pop());
    put("backbone", config["model.init_args.backbone"]);
    put("data", config["data.dataset"]);
    put("epochs", epochs.length ? epochs.at(-1) : null, config["trainer.max_epochs"] ? `of ${config["trainer.max_epochs"]}` : "");
    put("seed", config.seed_everything);
    put("status", facts.status);
    for (const [name, value] of Object.entries(facts.results ?? {})) put(named(name), typeof value === "number" ? show(value) : value);
    if (typeof facts.images_per_second === "number") put("images/s", Math.round(facts.images_per_second).toLocaleString("en"));
    for (const metric of unique(mine.map((one) => one.metric)).filter((metric) => /_probe$/.test(metric))) {
      const rows = mine.filter((one) => one.metric === metric).flatMap((one) => report.upTo(one, Infinity)).filter((row) => Number.isFinite(row.value));
      if (!rows.length) continue;
      const best = rows.reduce((a, b) => (b.value > a.value ? b : a));
      put(`best layer: ${named(metric)}`, show(best.value), `${best.layer}, n = ${best.n}`);
    }
    return found;
  }

  // Options of the runs; by default those that differ.
  configs(body) {
    const runs = this.report.runs.filter((run) => this.chosen.has(run.label));
    const state = (this.state.configs ??= { all: runs.length < 2 });
    const text = (value) => (value === undefined ? "" : typeof value === "string" ? value : JSON.stringify(value));
    const rows = new Map();
    for (const run of runs) {
      const versions = Object.fromEntries(Object.entries(run.facts.versions ?? {}).map(([name, value]) => [`version of ${name}`, value]));
      for (const name of Object.keys({ ...run.config, git: 1, started: 1, host: 1, ...versions })) rows.set(name, null);
      run.options = { ...run.config, ...versions, git: run.facts.git, started: run.facts.started, host: run.facts.host };
    }
    const draw = () => {
      const kept = [...rows.keys()].map((name) => [name, runs.map((run) => text(run.options[name]))]).map(([name, values]) => ({ name, values, differs: unique(values).length > 1 }))
        .filter((row) => state.all || row.differs);
      place.replaceChildren(kept.length ? make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "option"), ...runs.map((run) => make("th", { scope: "col" }, run.label)))),
        make("tbody", {}, ...kept.map((row) => make("tr", row.differs && state.all ? { class: "differs" } : {}, make("th", { scope: "row" }, row.name), ...row.values.map((value) => make("td", {}, value)))))) : "no option differs");
    };
    const place = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "table of options" });
    const toggle = make("input", { type: "checkbox", id: "all-options", checked: state.all, onchange: (event) => { state.all = event.target.checked; draw(); } });
    body.append(make("div", { class: "controls" }, make("label", { for: "all-options" }, toggle, "all options, not only those that differ")), place);
    draw();
  }
}

function themes(page) {
  const button = document.getElementById("theme"), names = ["automatic", "light", "dark"];
  let now = 0;
  const redraw = () => page.cards.forEach((card) => card.refresh());
  button.addEventListener("click", () => {
    now = (now + 1) % 3;
    if (now) document.documentElement.dataset.theme = names[now]; else delete document.documentElement.dataset.theme;
    button.textContent = `Colours: ${names[now]}`;
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

// Printing draws every figure, visible or not, in light colours.
function printing(page) {
  const root = document.documentElement;
  let theme = null;
  const before = () => {
    if (theme !== null) return;
    theme = root.dataset.theme ?? "";
    root.dataset.theme = "light";
    page.cards.forEach((card) => card.paint());
  };
  const after = () => {
    if (theme === null) return;
    if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
    theme = null;
    page.cards.forEach((card) => card.refresh());
  };
  addEventListener("beforeprint", before);
  addEventListener("afterprint", after);
  matchMedia("print").addEventListener("change", (event) => (event.matches ? before() : after()));
}

// Poll the server for new records, and show them without moving the page.
function listen(page, version) {
  const status = document.getElementById("live"), wait = 2000;
  const ask = async () => {
    try {
      const answer = await fetch("version", { cache: "no-store" });
      const newest = await answer.text();
      if (!answer.ok) throw new Error(newest);
      if (newest !== version) {
        const data = await fetch("data", { cache: "no-store" });
        if (!data.ok) throw new Error(await data.text());
        page.take(await Report.read(new Uint8Array(await data.arrayBuffer())));
      }
      version = newest;
      status.textContent = `live: up to date at ${new Date().toLocaleTimeString()}`;
    } catch (error) {
      status.textContent = `live: no answer from the server (${error.message})`;
    }
    setTimeout(ask, wait);
  };
  ask();
}

async function start() {
  const data = document.getElementById("data");
  try {
    const page = new Page(await Report.embedded(data.textContent.trim()));
    const { report } = page;
    document.getElementById("all-csv").addEventListener("click", () => download("records.csv", page.report.csv(page.report.series), "text/csv"));
    document.getElementById("all-json").addEventListener("click", () => download("records.json", page.report.json(page.report.series), "application/json"));
    themes(page);
    printing(page);
    if (data.dataset.version) listen(page, data.dataset.version);
    document.documentElement.dataset.ready = report.rows;
  } catch (error) {
    document.getElementById("loading").textContent = `The records could not be read (${error.message}); this page needs a browser of 2023 or newer.`;
    throw error;
  }
}
start();
