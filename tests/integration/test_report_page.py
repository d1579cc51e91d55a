"""The report as a reader meets it: in a browser, by keyboard, from a file and from its own server."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ssl_geometry.records import RecordStore, record
from ssl_geometry.report.__main__ import main
from tests.processes import HANG_SECONDS
from tests.unit.test_page import make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
EVIL = '<img src=x onerror="document.title=1">'
SECTIONS = ["runs", "training", "cka", "invariance", "probes", "neighbors", "spectra", "other", "configs"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Reader:
    """A window that notes what must not happen."""

    def __init__(self, browser: Any, address: str, scheme: str = "light", width: int = 1300) -> None:
        self.page = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}).new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.set_default_timeout(1000 * HANG_SECONDS)
        self.page.goto(address)
        self.page.wait_for_selector("html[data-ready]")

    def section(self, name: str) -> Any:
        """The section, scrolled to, its figures drawn."""
        found = self.page.locator(f"section#{name}")
        found.scroll_into_view_if_needed()
        for figure in found.locator("figure").all():
            figure.scroll_into_view_if_needed()
            figure.locator("svg, table").first.wait_for()
        return found


def all_metrics(run: Path) -> Path:
    """Add what other monitors and commands write, and what no one knows yet."""
    numbers = np.random.default_rng(1)
    common = {"run": run.name, "model": run.name, "split": "measure", "n": 99}
    for epoch in range(3):
        rows = []
        for i, layer in enumerate(("stem", "layer1.0", EVIL)):
            place: dict[str, Any] = {**common, "epoch": epoch, "step": 7 * epoch, "layer": layer, "depth": i / 2}
            for metric, view in (
                ("invariance", "own"), ("invariance", "crop"), ("neighbors", "semantic"), ("neighbors", "policy"),
                ("rankme", "clean"), ("tomorrow", "clean"), ("mutual_knn", "crop"),
            ):  # fmt: skip
                value = float(numbers.random())
                bar = {"low": value - 0.1, "high": value + 0.1}
                rows.append(record(**place, metric=metric, view=view, value=value, **bar))
            for level in (0.0, 0.25, 0.5, 0.75, 1.0):
                rows.append(record(**place, metric="neighbors_quantile", view="semantic", low=level, value=3 + level))
        RecordStore(run / "records").write(f"more/epoch={epoch:05d}", rows)
    single = record(**common, metric="transfer/dtd", value=0.5, epoch=2)
    RecordStore(run / "records").write("transfer", [single])
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with every kind of records; names, layers and options that are HTML."""
    folder = tmp_path_factory.mktemp("page")
    runs = [all_metrics(make_run(folder / "one", lr=0.1)), make_run(folder / EVIL.replace("/", ""), epochs=2, lr=EVIL)]
    main([*map(str, runs), "-o", str(folder / "report.html")])
    return folder / "report.html"


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_section_is_drawn_without_network_and_without_errors(
    browser: Any, page: Path, scheme: str, tmp_path: Path
) -> None:
    reader = Reader(browser, page.as_uri(), scheme)
    assert reader.page.locator("main > section").evaluate_all("parts => parts.map(part => part.id)") == SECTIONS
    for name in SECTIONS:
        section = reader.section(name)
        section.screenshot(path=tmp_path / f"{name}-{scheme}.png")
        assert (tmp_path / f"{name}-{scheme}.png").stat().st_size > 5000
        assert section.locator("figure, table").count() > 0
    assert reader.problems == []
    assert reader.requests == [page.as_uri()]
    background = reader.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


@in_a_browser
def test_overlap_of_views_stands_next_to_the_manifolds_and_that_of_layers_next_to_cka(
    browser: Any, tmp_path: Path
) -> None:
    run = all_metrics(make_run(tmp_path / "one"))
    place = {"run": "one", "model": "one", "model_other": "two", "metric": "mutual_knn", "view": "clean", "epoch": 2}
    pairs = [
        record(**place, layer=f"layer{i}", depth=i, layer_other=f"layer{j}", depth_other=j, value=0.5)
        for i in range(2)
        for j in range(2)
    ]
    RecordStore(run / "records").write("pairs", pairs)
    main([str(run), "-o", str(tmp_path / "report.html")])
    reader = Reader(browser, (tmp_path / "report.html").as_uri())
    for section, title in (
        ("cka", "Shared nearest neighbours (share): one and two"),
        ("neighbors", "Shared nearest neighbours (share): against depth"),
    ):
        reader.page.locator(f"#{section}-metric").select_option("mutual_knn")
        titles = [caption.strip() for caption in reader.section(section).locator("figcaption").all_inner_texts()]
        assert any(caption.startswith(title) for caption in titles), titles
    assert not any(" and two" in caption for caption in titles)
    assert reader.problems == []


@in_a_browser
def test_curves_say_with_whom_and_their_bands_do_not_rule_the_axis(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    rows = []
    for epoch in range(2):
        at: dict[str, Any] = {"run": "one", "model": "one", "view": "own", "epoch": epoch, "metric": "invariance"}
        rows += [record(**at, layer=f"layer{i}", depth=i, value=0.4 + i / 5, low=-3, high=4) for i in range(2)]
    RecordStore(run / "records").write("more", rows)
    main([str(run), "-o", str(tmp_path / "report.html")])
    reader = Reader(browser, (tmp_path / "report.html").as_uri(), width=390)
    titles = reader.section("cka").locator("figcaption").all_inner_texts()
    assert any(title.startswith("CKA (unbiased) with its own initialisation: against depth") for title in titles)
    for figure, (low, high) in {"views: against depth": (-0.1, 1.1), "over training": (0.4, 0.6)}.items():
        drawn = reader.section("invariance").locator("figure", has_text=figure)
        heights = [float(tick) for tick in drawn.locator("svg text[text-anchor=end]").all_text_contents()]
        assert heights, figure
        assert low <= min(heights) <= max(heights) <= high
    tables = reader.section("training").locator(".scroll").all()
    assert all(table.evaluate("box => box.scrollWidth <= box.clientWidth") for table in tables)
    assert reader.problems == []


@in_a_browser
@pytest.mark.parametrize("networks", ["ab", "abc", "abcdef"])
def test_every_pair_of_a_comparison_can_be_seen(browser: Any, tmp_path: Path, networks: str) -> None:
    """Of a few networks all are shown at once; of many, the choice of each shows every pair that it is part of."""
    pairs = list(combinations_with_replacement(networks, 2))
    rows = [
        record(run="all", model=a, model_other=b, metric="cka", view="clean", epoch=2, n=9, value=0.5 + (i - j) / 9,
               layer=f"layer{i}", depth=i, layer_other=f"layer{j}", depth_other=j)
        for a, b in pairs
        for i in range(2)
        for j in range(2)
    ]  # fmt: skip
    RecordStore(tmp_path / "all" / "records").write("pairs", rows)
    main([str(tmp_path / "all"), "-o", str(tmp_path / "report.html")])
    reader = Reader(browser, (tmp_path / "report.html").as_uri())
    choices = [f"all: {name}" for name in networks] if len(networks) > 4 else [""]
    seen: set[str] = set()
    for choice in choices:
        if choice:
            reader.page.locator("#cka-run").select_option(choice)
        titles = reader.section("cka").locator("figcaption").all_inner_texts()
        maps = {title.strip() for title in titles if title.startswith("CKA (unbiased): all: ")}
        assert len(maps) == (len(networks) if choice else len(pairs))
        seen |= maps
    for a, b in pairs:
        assert any(title.startswith(f"CKA (unbiased): all: {a} and {'itself' if a == b else b}") for title in seen), (
            seen
        )
    lines = reader.page.locator("#cka .legend > span").all_inner_texts()
    if networks == "abc":
        assert lines == ["all: a, with b", "all: a, with c", "all: b, with c"]
    reader.page.locator("section#cka").screenshot(path=tmp_path / "cka.png")
    assert reader.problems == []


@in_a_browser
def test_names_that_are_html_are_text(browser: Any, page: Path) -> None:
    reader = Reader(browser, page.as_uri())
    for name in SECTIONS:
        reader.section(name)
    assert reader.page.locator("img").count() == 0
    assert reader.page.title() == "Layer geometry: report"
    assert EVIL in reader.page.locator("#runs").inner_text()
    reader.section("cka").locator("summary").first.click()
    assert "</script><script>alert(1)" in reader.page.locator("#cka pre").inner_text()
    assert reader.problems == []


@in_a_browser
def test_the_epoch_slider_changes_the_map_by_keyboard(browser: Any, page: Path) -> None:
    reader = Reader(browser, page.as_uri())
    figure = reader.section("cka").locator("figure", has_text="one and itself")
    at_first = figure.locator("path[data-level]").evaluate_all("paths => paths.map(path => path.outerHTML).join()")
    assert "epoch 2" in figure.inner_text()
    slider = reader.page.locator("#cka-epoch")
    slider.focus()
    slider.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "epoch 1"
    figure.scroll_into_view_if_needed()
    figure.get_by_text("epoch 1, n = 256 to 260").wait_for()
    assert at_first != figure.locator("path[data-level]").evaluate_all("all => all.map(path => path.outerHTML).join()")
    assert reader.problems == []


@in_a_browser
def test_a_figure_is_read_by_keyboard(browser: Any, page: Path) -> None:
    reader = Reader(browser, page.as_uri())
    reader.page.keyboard.press("Tab")
    assert reader.page.evaluate("document.activeElement.textContent") == "Skip to the figures"
    figure = reader.section("cka").locator("figure", has_text="one and its own initialisation").locator("svg[role=img]")
    figure.focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowRight"):
        figure.press(key)
    announced = reader.page.locator("#announced").inner_text()
    (value,) = (
        row["value"]
        for row in RecordStore(page.parent / "one" / "records").read().to_dict("records")
        if (row["metric"], row["epoch"], row["model_other"], row["layer"], row["layer_other"])
        == ("cka", 2, "init", "layer1", "layer1")
    )
    assert "layer1 × layer1" in announced
    assert f"{value:.4g}" in announced
    assert "n = 257" in announced


@in_a_browser
def test_paper_shows_every_figure_in_light_colours(browser: Any, page: Path) -> None:
    reader = Reader(browser, page.as_uri(), "dark")
    drawn = reader.page.locator("figure svg[role=img], figure table")
    figures = reader.page.locator("figure").count()
    assert drawn.count() < figures, "only those near the window"
    seen: list[tuple[int, str]] = []
    reader.page.expose_function("onPaper", lambda count, theme: seen.append((count, theme)))
    reader.page.evaluate(
        """addEventListener("beforeprint", () => onPaper(
            document.querySelectorAll("figure svg[role=img], figure table").length,
            document.documentElement.dataset.theme))"""
    )
    paper = reader.page.pdf()
    assert seen == [(figures, "light")]
    assert len(re.findall(rb"/Type /Page\b", paper)) > 3
    assert reader.page.evaluate("document.documentElement.dataset.theme") is None
    reader.page.emulate_media(media="print")
    assert not any(control.is_visible() for control in reader.page.locator("button, select, input, nav").all())
    assert reader.problems == []


@in_a_browser
def test_a_phone_does_not_scroll_sideways(browser: Any, page: Path) -> None:
    reader = Reader(browser, page.as_uri(), width=390)
    for name in SECTIONS:
        reader.section(name)
        assert reader.page.evaluate("document.documentElement.scrollWidth") <= 390, name
    assert reader.problems == []


@in_a_browser
def test_of_many_runs_one_is_shown_in_detail_until_the_reader_asks(browser: Any, tmp_path: Path) -> None:
    runs = []
    for number in range(5):
        runs.append(make_run(tmp_path / f"seed_{number + 7}", epochs=2, model={"class_path": f"my.Net{number}"}))
    main([*map(str, runs), "-o", str(tmp_path / "report.html")])
    reader = Reader(browser, (tmp_path / "report.html").as_uri())
    titles = reader.page.locator("#cka figcaption")
    few = titles.count()
    assert "seed_7 and itself" in titles.first.inner_text(), "natural order"
    assert not any("seed_8 and" in title for title in titles.all_inner_texts())
    reader.page.locator("#cka-run").select_option("seed_8")
    assert titles.count() == few
    assert "seed_8 and itself" in titles.first.inner_text()
    reader.page.locator("#cka-run").select_option("every run")
    assert titles.count() == 1 + 5 * (few - 1), "one figure compares the runs"
    assert reader.problems == []


@in_a_browser
def test_options_that_differ_and_downloads(browser: Any, page: Path, tmp_path: Path) -> None:
    reader = Reader(browser, page.as_uri())
    names = reader.page.locator("#configs tbody th")
    assert set(names.all_inner_texts()) == {"lr"}
    reader.page.locator("#all-options").press("Space")
    config = yaml.safe_load((page.parent / "one" / "config.yaml").read_text())
    assert {"seed_everything", "model.class_path", "lr"} <= set(names.all_inner_texts())
    assert config["lr"] == 0.1
    with reader.page.expect_download() as waiting:
        reader.page.locator("#all-csv").click()
    waiting.value.save_as(tmp_path / "records.csv")
    lines = (tmp_path / "records.csv").read_text().splitlines()
    records = [RecordStore(run / "records").read() for run in page.parent.iterdir() if run.is_dir()]
    assert len(lines) - 1 == sum(map(len, records))
    values = sorted(round(float(value), 12) for frame in records for value in frame["value"].dropna())
    column = lines[0].split(",").index("value")
    plain = [line.split(",")[column] for line in lines[1:] if '"' not in line]
    assert set(map(float, filter(None, plain))) <= {value for frame in records for value in frame["value"]}
    assert len(plain) > len(values) / 2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str], Path]]:
    run = make_run(tmp_path / "run", epochs=2)
    command = [sys.executable, "-m", "ssl_geometry.report", str(run), "--serve", "--port", "0"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Ctrl-C is ignored by what a shell starts in the background, and so by the children of these tests there.
    process = subprocess.Popen(command, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout is not None
    address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
    assert address, process.stderr and process.stderr.read()
    yield address[0], process, run
    process.kill()
    process.wait()


@in_a_browser
def test_a_served_page_takes_new_records_and_keeps_its_place(
    browser: Any, server: tuple[str, subprocess.Popen[str], Path]
) -> None:
    address, process, run = server
    reader = Reader(browser, address)
    reader.section("cka")
    slider = reader.page.locator("#cka-epoch")
    slider.press("ArrowLeft")
    place = reader.page.evaluate("scrollY")
    make_run(run, epochs=3)
    reader.page.locator('#cka-epoch[max="2"]').wait_for()
    assert slider.get_attribute("aria-valuetext") == "epoch 0", "where the reader put it"
    assert abs(reader.page.evaluate("scrollY") - place) < 50
    slider.press("End")
    reader.section("cka").locator("figure").first.get_by_text("epoch 2, n = 256 to 260").wait_for()
    assert reader.problems == []
    assert all(request.startswith(address) for request in reader.requests)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 0
    assert output.strip() == "stopped"
    assert "Traceback" not in errors


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", epochs=1)
    for args, said in [
        ([str(tmp_path / "rum")], "no such run; did you mean"),
        ([str(tmp_path / "run"), "-o", str(tmp_path)], "cannot be written"),
        ([str(tmp_path / "run"), "--max_mb=0.01"], "do not fit"),
        ([str(tmp_path / "run"), "--portt=1"], "unknown option '--portt'; did you mean '--port'"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert said in errors[-1], errors
    assert os.listdir(tmp_path) == ["run"]
