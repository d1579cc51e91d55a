"""The numbers in a page are those of the records; what cannot be shown is reported in one line."""

import base64
import gzip
import json
import re
import threading
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from ssl_geometry.errors import UserError
from ssl_geometry.records import COLUMNS, Protocol, RecordStore, read_records, record
from ssl_geometry.report.__main__ import main
from ssl_geometry.report.models import prediction_scatter
from ssl_geometry.report.page import EXACT, ROUNDED, pack, render, smallest_loss, write_page
from ssl_geometry.report.run_records import MOST_SHOWN, RunRecords, first_choice, read_run
from ssl_geometry.report.serve import Server
from ssl_geometry.report.upload import Sent, upload

PROTOCOL = Protocol({"metric": "CKA", "note": "</script><script>alert(1)</script>"})
LAYERS = 5


def make_run(directory: Path, epochs: int = 3, seed: int = 0, layers: int = LAYERS, **config: Any) -> Path:
    """Records of CKA, a probe and the loss, of random numbers."""
    numbers = np.random.default_rng(seed)
    store, name = RecordStore(directory / "records"), directory.name
    for epoch in range(epochs):
        common: dict[str, Any] = {"run": name, "model": name, "epoch": epoch, "step": 7 * epoch, "split": "measure"}
        pairs, probes = [], []
        for i in range(layers):
            place = {"layer": f"layer{i}", "depth": i / (layers - 1), "view": "clean", "protocol": PROTOCOL.hash}
            accuracy = float(numbers.random())
            probes.append(record(**common, **place, metric="ridge_probe", value=accuracy, low=accuracy - 0.1, n=64))
            for j in range(layers):
                for other in (name, "init"):
                    value = float("nan") if i == j == 0 else float(numbers.normal())
                    pair = {"layer_other": f"layer{j}", "depth_other": j / (layers - 1), "model_other": other}
                    bar = {"low": value - 1e-3, "high": value + 1e-3, "n": 256 + i}
                    pairs.append(record(**common, **place, **pair, metric="cka", value=value, **bar))
        store.write(f"cka/epoch={epoch:05d}", pairs, [PROTOCOL])
        store.write(f"ridge_probe/epoch={epoch:05d}", probes)
        loss = {"metric": "train/loss", "split": "train", "value": float(numbers.random())}
        store.write(f"scalars/epoch={epoch:05d}", [record(**common | loss)])
    settings = {"seed_everything": seed, "model": {"class_path": "my.Net", "init_args": {"lr": 0.1}}, **config}
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    (directory / "run.json").write_text(json.dumps({"status": "finished", "results": {"test/knn": 0.5}}))
    return directory


def unpack(packed: bytes) -> tuple[dict[str, Any], pd.DataFrame]:
    """What the page's script makes of it, in a second hand."""
    data = gzip.decompress(packed)
    length = int.from_bytes(data[:4], "little")
    header, at, columns = json.loads(data[4 : 4 + length]), 4 + length, {}
    for name, width in header["columns"].items():
        planes = np.frombuffer(data, np.uint8, width * header["rows"], at).reshape(width, -1)
        at += planes.size
        cell = np.zeros((header["rows"], 4 if width == 3 else width), np.uint8)
        cell[:, -width:] = planes.T
        kind = {"n": "<i4", "place": "<u4", "time": "<u4"}.get(name, "<f8" if width == 8 else "<f4")
        columns[name] = np.ascontiguousarray(cell).view(kind).reshape(-1)
    series = np.repeat(np.arange(len(header["series"])), np.diff([0, *header["ends"]]))
    rows = []
    for i, number in enumerate(series):
        run, model, other, metric, view, split, protocol = header["series"][number]
        layer, depth, layer_other, depth_other = header["places"][columns["place"][i]]
        epoch, step = header["times"][columns["time"][i]]
        rows.append(
            {
                "run": header["runs"][run]["label"], "model": model, "model_other": other, "metric": metric,
                "layer": layer, "layer_other": layer_other, "depth": depth, "depth_other": depth_other, "view": view,
                "split": split, "epoch": epoch, "step": step, "value": float(columns["value"][i]),
                "low": float(columns["low"][i]), "high": float(columns["high"][i]),
                "n": None if columns["n"][i] < 0 else int(columns["n"][i]), "protocol": protocol,
            }
        )  # fmt: skip
    return header, pd.DataFrame(rows)[COLUMNS]


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    keys = ["run", "metric", "model_other", "epoch", "step", "layer", "layer_other"]
    frame = frame.sort_values(keys, ignore_index=True)
    numbers = ["depth", "depth_other", "epoch", "step", "value", "low", "high", "n"]
    return frame.astype(dict.fromkeys(numbers, float) | {c: object for c in COLUMNS if c not in numbers})


@pytest.mark.parametrize(("width", "tolerance"), [(EXACT, 0), (ROUNDED, 2**-16)])
def test_numbers_in_the_page_are_those_of_the_records(tmp_path: Path, width: int, tolerance: float) -> None:
    runs = [make_run(tmp_path / f"run{seed}", seed=seed) for seed in range(2)]
    _, shown = unpack(pack([read_run(run) for run in runs], width))
    expected = read_records(*runs)
    pd.testing.assert_frame_equal(ordered(shown), ordered(expected), rtol=tolerance, atol=0, check_exact=not tolerance)


def described_run(name: str, method: str, day: int, **options: Any) -> RunRecords:
    config = {"model.class_path": method, "model.init_args.seed": day, "data.seed": day}
    return RunRecords(Path(name), pd.DataFrame(), config | options, {"started": f"2026-11-{day:02d}"}, {})


@pytest.mark.parametrize(
    ("runs", "shown"),
    [
        pytest.param([("a", "A", 1, {}), ("b", "A", 2, {}), ("c", "B", 1, {})], "abc", id="few: all"),
        pytest.param(
            [
                (name, method, day, {})
                for method, names in (("A", "abc"), ("B", "def"))
                for day, name in enumerate(names)
            ],
            "cf",
            id="seeds of two recipes: the latest of each",
        ),
        pytest.param(
            [(f"a{i}", "A", i, {"model.init_args.lr": i}) for i in range(1, 10)] + [("b", "B", 1, {})],
            ["a1", "a2", "a3", "a4", "a5", "b"],
            id="many recipes: every method, six at most",
        ),
        pytest.param(
            [(f"results{i}", None, 1, {}) for i in range(9)], [f"results{i}" for i in range(6)], id="no config"
        ),
    ],
)
def test_what_a_page_of_many_runs_shows_first(runs: list[Any], shown: Any) -> None:
    described = [described_run(name, method, day, **options) for name, method, day, options in runs]
    if runs[0][1] is None:
        described = [RunRecords(run.directory, run.frame, {}, {}, {}) for run in described]
    chosen = first_choice(described)
    assert [runs[place][0] for place in chosen] == list(shown)
    assert len(chosen) <= MOST_SHOWN


def test_runs_are_in_natural_order_and_metrics_carry_their_label(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"seed_{seed}", epochs=1) for seed in (10, 2, 1)]
    header, _ = unpack(pack([read_run(folder) for folder in folders]))
    assert [run["label"] for run in header["runs"]] == ["seed_1", "seed_2", "seed_10"] == header["chosen"]
    assert header["metrics"]["ridge_probe"] == {
        "label": "Accuracy of ridge regression (share)",
        "section": "probes",
        "bars": None,
    }
    assert "test/knn" in header["metrics"], "which run.json names, not the records"


def test_the_page_holds_what_was_packed_and_may_load_nothing(tmp_path: Path) -> None:
    packed = pack([read_run(make_run(tmp_path / "run"))])
    page = render(packed)
    (data,) = re.findall(r'<script type="application/octet-stream"[^>]*>(.*?)</script>', page, re.S)
    assert base64.b64decode(data) == packed
    assert not re.search(r"(src|href)=.?(https?:)?//", page)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe" not in policy
    assert "alert(1)" not in page, "texts of users are in the packed data alone"


def test_many_runs_stay_below_the_limit_and_the_page_reports_what_was_left_out(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / f"run{seed}", epochs=4, seed=seed)) for seed in range(10)]
    messages: list[str] = []
    limit = len(render(b"")) + 2e4
    packed = smallest_loss(runs, limit, messages.append)
    assert len(render(packed)) <= limit
    header, shown = unpack(packed)
    assert header["rounded"]
    assert header["thinned"] == 2
    assert messages == [
        f"to stay below {limit / 1e6:g} MB, numbers are rounded to 4 significant digits, "
        "and 2 measurements of each metric are shown"
    ]
    assert sorted(shown["epoch"].unique()) == [0, 3]
    with pytest.raises(UserError, match=r"--max_mb .*: 1 run\(s\) do not fit"):
        smallest_loss(runs[:1], len(render(b"")) + 1000, messages.append)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1", 200), ("localhost:{port}", 200), ("evil.example", 403), ("", 403)],
)
def test_a_page_is_served_to_this_machine_by_its_own_names_alone(host: str, status: int) -> None:
    with Server("127.0.0.1", 0, lambda: 1, lambda: b"", lambda packed, version: "") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        connection = HTTPConnection("127.0.0.1", port)
        connection.putrequest("GET", "/version", skip_host=True)
        connection.putheader("Host", host.format(port=port))
        connection.endheaders()
        assert connection.getresponse().status == status
        server.shutdown()


@pytest.mark.parametrize("tasks", [1, 2, 4, 5])
def test_no_empty_panel_is_left_next_to_predictions(tasks: int) -> None:
    titles = {f"task {number}": f"task {number}" for number in range(tasks)}
    rows = [{"task": task, "model": "a", "value": 1.0, "predicted": 0.9} for task in titles]
    figure = prediction_scatter(pd.DataFrame(rows), {"a": "SimCLR"}, titles)
    assert sum(axes.axison for axes in figure.axes) == tasks


def test_a_config_may_hold_what_json_has_not(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", temperature=float("nan"), lr=[float("inf")]))
    header, _ = unpack(pack([run]))
    assert header["runs"][0]["config"]["temperature"] == "nan"
    assert header["runs"][0]["config"]["model.init_args.lr"] == 0.1


class TestMistakes:
    def test_no_such_run(self, tmp_path: Path) -> None:
        make_run(tmp_path / "simclr", epochs=1)
        with pytest.raises(UserError, match=r"simlcr: no such run; did you mean '.*simclr'\?"):
            read_run(tmp_path / "simlcr")

    def test_a_folder_of_runs(self, tmp_path: Path) -> None:
        make_run(tmp_path / "demo" / "simclr", epochs=1)
        with pytest.raises(UserError, match=r"demo: no records here; .*simclr"):
            read_run(tmp_path / "demo")

    @pytest.mark.parametrize("damage", ["cut", "text", "empty"])
    def test_a_damaged_part_is_named_and_the_rest_is_shown(
        self, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = make_run(tmp_path / "run")
        whole = read_records(run)
        part = run / "records" / "cka" / "epoch=00001.parquet"
        part.write_bytes({"cut": part.read_bytes()[:100], "text": b"no table", "empty": b""}[damage])
        rest = whole.query("metric != 'cka' or epoch != 1").reset_index(drop=True)
        assert 0 < len(rest) < len(whole)
        pd.testing.assert_frame_equal(read_records(run), rest)
        pd.testing.assert_frame_equal(read_run(run).frame, rest)
        assert len(RecordStore(run / "records").rows()) == len(rest)
        line = r"^left out: .*cka/epoch=00001.parquet: damaged \(.*\); remove it, or copy it again$"
        assert len(caplog.messages) == 3
        assert all(re.match(line, message) for message in caplog.messages)

        monkeypatch.chdir(tmp_path)
        main(["run"])
        assert (tmp_path / "report.html").exists()
        with pytest.raises(UserError, match=r"cka/epoch=00001.parquet: damaged .*; remove it"):
            read_records(run, strict=True)
        with pytest.raises(SystemExit, match="2"):
            main(["run", "--strict"])

    def test_a_run_of_damaged_parts_alone(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", epochs=1)
        for part in run.glob("records/**/*.parquet"):
            part.write_bytes(b"no table")
        with pytest.raises(UserError, match=r"RUN .*run: no part of its records can be read"):
            read_run(run)

    def test_a_place_that_cannot_be_written_to(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"--out .*: cannot be written \(Is a directory\)"):
            write_page(tmp_path, "page")


def test_a_damaged_protocol_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path / "a")
    (run / "records" / "protocols" / "0123456789.json").write_text('{"cut')
    with caplog.at_level("WARNING"):
        found = read_run(run)
    assert list(found.protocols) == [PROTOCOL.hash]
    assert "left out: " in caplog.text
    assert "0123456789.json" in caplog.text
    with pytest.raises(UserError, match=r"0123456789\.json: cannot be read"):
        read_run(run, strict=True)


@pytest.mark.parametrize(
    ("name", "text"), [("run.json", "5"), ("config.yaml", "[1]"), ("config.yaml", "model: 5")], ids=str
)
def test_a_run_whose_description_is_damaged_is_not_sent(tmp_path: Path, name: str, text: str) -> None:
    run = make_run(tmp_path / "a")
    (run / "run.json").write_text("{}")
    (run / name).write_text(text)
    with pytest.raises(UserError, match=rf"^RUN .*: {name} is damaged"):
        upload(run, None)


def test_nothing_is_sent_where_wandb_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(UserError, match=r"^--to_wandb: WANDB_MODE=disabled switches W&B off; unset it, or set"):
        upload(run, None)
    assert not (run / "wandb").exists()


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (Sent(72, None), "72 numbers and figures sent"),
        (Sent(0, None), "W&B has everything already"),
        (
            Sent(72, Path("a/wandb/offline-1")),
            "offline, 72 numbers and figures written; `wandb sync a/wandb/offline-1`",
        ),
    ],
)
def test_what_was_sent_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sent: Sent, words: str
) -> None:
    monkeypatch.setattr("ssl_geometry.report.upload.upload", lambda *_: sent)
    main([str(make_run(tmp_path / "a")), "--to_wandb"])
    assert words in capsys.readouterr().out
