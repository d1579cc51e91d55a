"""Published checkpoints: the table, downloads, and readers that run no code of a file."""

import argparse
import csv
import hashlib
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress

from ssl_geometry.errors import UserError
from ssl_geometry.models.zoo import TABLE, Checkpoint, cached, download, fetch, load_checkpoint, verify
from ssl_geometry.models.zoo.load import _from_torch
from ssl_geometry.models.zoo.pickles import read_pickle
from ssl_geometry.models.zoo.tensorbundle import is_bundle, read_bundle
from ssl_geometry.runs.networks import load_networks, network_names

FIXTURES = Path(__file__).parents[1] / "fixtures"
SOURCES = Path(__file__).parents[3] / "shared" / "data" / "zoo_sources.csv"


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SOURCES.exists(), reason="the list of sources lies beside the working copy, not in it")
def test_the_table_is_that_of_the_sources() -> None:
    with SOURCES.open() as file:
        sources = {row["model"]: row for row in csv.DictReader(file)}
    assert list(TABLE) == list(sources)
    for name, row in TABLE.items():
        source = sources[name]
        assert (row.family, row.architecture) == (source["family"], source["architecture"])
        assert row.epochs == (int(source["epochs"]) if source["epochs"] else None)
        assert row.top1 == float(source["imagenet_linear_top1"])
        assert row.normalize == source["input_normalisation"]
        assert (row.container, row.prefix) == (source["container_key"], source["key_prefix_of_the_backbone"])
        under_prefix = [drop for drop in source["keys_to_drop"].split("|") if not drop.startswith("module.")]
        assert list(row.drops) == under_prefix
        kinds = {"torch": ("pth", "torchvision"), "haiku": ("pickle of JAX/Haiku arrays",)}
        assert source["format"] in kinds.get(row.format, ("pth (converted from TensorFlow)",))
        if source["url"].startswith("http"):
            # Dropbox gives the file itself with ?dl=1; storage.cloud.google.com asks for a login, the other does not
            public = source["url"].replace("storage.cloud.google.com", "storage.googleapis.com")
            assert row.urls == (public,) or row.urls == (f"{public}?dl=1",)
        else:
            assert name in ("supervised", "simclr-v2")


@pytest.mark.parametrize(
    "environment",
    [{}, {"XDG_CACHE_HOME": "/cache"}, {"TORCH_HOME": "~/torch"}, {"TORCH_HOME": "/t", "XDG_CACHE_HOME": "/c"}],
)
def test_the_cache_lies_in_torch_hubs_folder(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_GEOMETRY_CACHE", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, folder in environment.items():
        monkeypatch.setenv(name, folder)
    assert download.cache_folder() == Path(torch.hub.get_dir()) / "ssl_geometry"
    monkeypatch.setenv("SSL_GEOMETRY_CACHE", "/mine")
    assert download.cache_folder() == Path("/mine")


def test_files_are_named_without_the_query() -> None:
    assert TABLE["infomin"].file_names == ("InfoMin_800.pth",)
    assert TABLE["simclr-v2"].file_names == ("model.ckpt-250228.index", "model.ckpt-250228.data-00000-of-00001")
    for row in TABLE.values():
        assert all(Path(name).name == name and name for name in row.file_names)


# -- downloads ---------------------------------------------------------------------------------------------------------

CONTENT = np.random.default_rng(0).bytes(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``CONTENT`` in ways that go right and wrong; ``asked`` is what was asked for."""

    asked: list[tuple[str, str | None]]
    cut_at: int | None = None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        given = self.headers.get("Range")
        self.server.asked.append((self.path, given))
        start = int(given.removeprefix("bytes=").removesuffix("-")) if given else 0
        match self.path:
            case "/redirect":
                self.answer(302, b"", Location="/file")
            case "/to-a-file":
                self.answer(302, b"", Location="file:///etc/hostname")
            case "/page":
                self.answer(200, b"hello", **{"Content-Type": "text/html; charset=utf-8"})
            case "/unmarked-page":
                self.answer(200, b"\n <!DOCTYPE html><html></html>")
            case "/no-ranges":
                self.answer(200, CONTENT)
            case "/missing":
                self.answer(404, b"<html>no</html>")
            case _ if start >= len(CONTENT):
                self.answer(416, b"")
            case _:
                self.answer(206 if given else 200, CONTENT[start:], self.server.cut_at)

    def answer(self, status: int, body: bytes, cut_at: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut_at])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("SSL_GEOMETRY_CACHE", str(tmp_path / "cache"))
    server = Server(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def row(server: Server, path: str = "/file", sha256: str | None = None) -> Checkpoint:
    url = f"http://127.0.0.1:{server.server_port}{path}"
    return Checkpoint("some", "contrastive", None, 0.0, (url,), sha256=sha256)


def files(checkpoint: Checkpoint, tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "cache" / checkpoint.name
    return {path.name: path.read_bytes() for path in folder.glob("*")} if folder.exists() else {}


@pytest.mark.parametrize(("path", "name"), [("/file", "file"), ("/redirect", "redirect")])
def test_a_download_is_whole_and_its_hash_is_kept(server: Server, tmp_path: Path, path: str, name: str) -> None:
    checkpoint = row(server, path)
    assert cached(checkpoint) == []
    assert fetch(checkpoint).read_bytes() == CONTENT
    assert files(checkpoint, tmp_path) == {name: CONTENT, f"{name}.sha256": f"{DIGEST}\n".encode()}
    asked = len(server.asked)
    assert fetch(checkpoint) == cached(checkpoint)[0]
    assert len(server.asked) == asked, "what is in the cache is not asked for again"


def test_a_cut_download_is_continued(server: Server, tmp_path: Path) -> None:
    checkpoint = row(server)
    server.cut_at = 1_200_000
    with pytest.raises(UserError, match="1,200,000 bytes are kept, run again to continue"):
        fetch(checkpoint)
    assert files(checkpoint, tmp_path) == {"file.partial": CONTENT[:1_200_000]}
    server.cut_at = None
    assert fetch(checkpoint).read_bytes() == CONTENT
    assert server.asked == [("/file", None), ("/file", "bytes=1200000-")]


def test_an_interrupted_download_is_continued(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    checkpoint = row(server)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(checkpoint)
    (kept,) = files(checkpoint, tmp_path).values()
    assert 0 < len(kept) < len(CONTENT)
    assert fetch(checkpoint).read_bytes() == CONTENT
    assert server.asked[-1] == ("/file", f"bytes={len(kept)}-")


def partial(checkpoint: Checkpoint, tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "cache" / checkpoint.name / f"{checkpoint.file_names[0]}.partial"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def test_a_server_without_ranges_sends_it_again(server: Server, tmp_path: Path) -> None:
    checkpoint = row(server, "/no-ranges")
    partial(checkpoint, tmp_path, b"something else" * 1000)
    assert fetch(checkpoint).read_bytes() == CONTENT


def test_a_partial_file_that_is_too_long_is_begun_again(server: Server, tmp_path: Path) -> None:
    checkpoint = row(server)
    partial(checkpoint, tmp_path, b"x" * (len(CONTENT) + 1))
    assert fetch(checkpoint).read_bytes() == CONTENT


@pytest.mark.parametrize("path", ["/page", "/unmarked-page"])
def test_a_web_page_is_no_checkpoint(server: Server, tmp_path: Path, path: str) -> None:
    checkpoint = row(server, path)
    with pytest.raises(UserError, match=r"is a web page, not a checkpoint .* give some:FILE") as error:
        fetch(checkpoint)
    assert "\n" not in str(error.value)
    assert files(checkpoint, tmp_path) == {}


def test_a_wrong_hash_never_takes_the_place_of_a_file(server: Server, tmp_path: Path) -> None:
    checkpoint = row(server, sha256="0badc0de")
    with pytest.raises(UserError, match=rf"SHA-256 of http.* is {DIGEST}, expected 0badc0de"):
        fetch(checkpoint)
    assert files(checkpoint, tmp_path) == {}
    assert fetch(row(server, sha256=DIGEST[:8])).read_bytes() == CONTENT


def test_a_file_that_changed_is_refused(server: Server, tmp_path: Path) -> None:
    checkpoint = row(server)
    file = fetch(checkpoint)
    changed = CONTENT[:-1] + b"?"
    file.write_bytes(changed)
    with pytest.raises(UserError, match=rf"is {hashlib.sha256(changed).hexdigest()}, expected {DIGEST}"):
        fetch(checkpoint)
    file.write_bytes(CONTENT)
    assert verify(file) == DIGEST


@pytest.mark.parametrize(("path", "words"), [("/missing", "404"), ("/to-a-file", "could not download")])
def test_a_failed_download_is_one_line(server: Server, tmp_path: Path, path: str, words: str) -> None:
    checkpoint = row(server, path)
    with pytest.raises(UserError, match=words) as error:
        fetch(checkpoint)
    assert "\n" not in str(error.value)
    assert not cached(checkpoint)


def test_no_server_and_no_other_kind_of_address(server: Server) -> None:
    checkpoint = Checkpoint("some", "contrastive", None, 0.0, ("http://127.0.0.1:9/x",))
    with pytest.raises(UserError, match=r"could not download .*refused"):
        fetch(checkpoint)
    with pytest.raises(UserError, match="only http and https"):
        fetch(Checkpoint("some", "contrastive", None, 0.0, ("file:///etc/hostname",)))


def test_of_two_processes_one_downloads_and_the_other_waits(server: Server, tmp_path: Path) -> None:
    checkpoint = row(server)
    path = partial(checkpoint, tmp_path, b"")
    code = (
        "import fcntl, os, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); "
        "input(); f.write(b'theirs'); f.flush(); os.replace(sys.argv[1], sys.argv[1].removesuffix('.partial'))"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(fetch, checkpoint)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            other.communicate("\n")
            assert waiting.result().read_bytes() == b"theirs"


# -- TensorFlow --------------------------------------------------------------------------------------------------------

NORM = ("gamma", "beta", "moving_mean", "moving_variance")
WRITTEN = [
    ("base_model/conv2d/kernel", (3, 3, 3, 2), "f4"),
    ("base_model/conv2d/kernel/Momentum", (3, 3, 3, 2), "f4"),
    *((f"base_model/batch_normalization{n}/{part}", (2,), "f4") for n in ("", "_1", "_10") for part in NORM),
    ("half", (2, 3), "f2"),
    ("double", (1,), "f8"),
    ("global_step", (), "i8"),
]
"""The tensors of ``tests/fixtures/tensorflow.ckpt``, as TensorFlow wrote them."""
INDEX = FIXTURES / "tensorflow.ckpt.index"
DATA = FIXTURES / "tensorflow.ckpt.data-00000-of-00001"


def test_a_checkpoint_that_tensorflow_wrote(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(INDEX, "folder/model.ckpt-1.index")
        archive.write(DATA, "folder/model.ckpt-1.data-00000-of-00001")
        archive.writestr("../../outside", "nothing is extracted")
        archive.writestr("folder/hub/variables/variables.index", "the same once more, as a module of TensorFlow Hub")
    for file in (INDEX, tmp_path / "x.zip"):
        assert is_bundle(file)
        tensors, others = read_bundle(file, lambda name: name != "words")
        assert others == ["words"]
        assert set(tensors) == {name for name, _, _ in WRITTEN}
        for number, (name, shape, dtype) in enumerate(WRITTEN):
            expected = (number + np.arange(np.prod(shape, dtype=int)).reshape(shape) / 64).astype(dtype)
            assert tensors[name].dtype == expected.dtype
            np.testing.assert_array_equal(tensors[name], expected)
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_a_damaged_tensorflow_checkpoint_is_one_line(tmp_path: Path) -> None:
    index, data = tmp_path / "m.index", tmp_path / "m.data-00000-of-00001"
    index.write_bytes(INDEX.read_bytes())
    with pytest.raises(UserError, match=r"m\.data-00000-of-00001 is missing next to it"):
        read_bundle(index, lambda name: name == "half")
    data.write_bytes(DATA.read_bytes()[:100])
    with pytest.raises(UserError, match="half is cut short"):
        read_bundle(index, lambda name: name == "half")
    with pytest.raises(UserError, match="words is of a type"):
        read_bundle(index, lambda name: name == "words")
    for damaged in (INDEX.read_bytes()[:-1], b"", INDEX.read_bytes()[40:], bytes(60) + INDEX.read_bytes()[-48:]):
        index.write_bytes(damaged)
        with pytest.raises(UserError, match="not a whole TensorFlow checkpoint"):
            read_bundle(index, lambda name: name == "half")


# -- pickles -----------------------------------------------------------------------------------------------------------


def test_a_pickle_that_dill_haiku_and_jax_wrote() -> None:
    content = read_pickle(FIXTURES / "haiku.pkl")
    assert content["step"] == 300000
    np.testing.assert_array_equal(content["rng"], [0, 0])
    state = content["experiment_state"].as_dict()
    kernel = (1 + np.arange(6).reshape(1, 1, 2, 3) / 64).astype("f4")
    for where in ("res_net50/~/initial_conv", "device"):
        np.testing.assert_array_equal(state["online_params"][where]["w"], kernel)
        assert state["online_params"][where]["w"].dtype == np.float32
    averages = state["online_state"]["res_net50/~/initial_batchnorm/~/mean_ema"]
    assert averages["counter"] == 7
    np.testing.assert_array_equal(averages["average"].ravel(), np.float32([3, 3.015625, 3.03125]))


def test_arrays_of_every_order_of_bytes_come_back(tmp_path: Path) -> None:
    arrays = [np.arange(6, dtype=kind).reshape(2, 3) for kind in (">f4", "<f8", ">i8", "u1")]
    arrays += [np.asfortranarray(arrays[1]), np.array([True, False]), np.float32(3.5), np.array(2.0)]
    for protocol in (2, 4):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(arrays, protocol=protocol))
        for found, expected in zip(read_pickle(tmp_path / "x.pkl"), arrays, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_the_state_of_a_type_gives_its_order_of_bytes_alone(tmp_path: Path) -> None:
    forged = np.dtype("f8")
    has_object = (3, "<", None, None, None, -1, -1, 63)  # flags: numbers that NumPy would take for pointers
    kind = b"cnumpy\ndtype\n(Vf8\nI00\nI01\ntR" + pickle.dumps(has_object, protocol=0)[:-1] + b"b"
    (tmp_path / "x.pkl").write_bytes(
        b"cnumpy.core.multiarray\nscalar\n(" + kind + b"c_codecs\nencode\n(V" + 8 * b"A" + b"\nVlatin1\ntRtR."
    )
    found = read_pickle(tmp_path / "x.pkl")
    assert found == np.frombuffer(8 * b"A", forged)[0]
    assert not found.dtype.hasobject


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def attacks(tmp_path: Path) -> dict[str, Any]:
    made = tmp_path / "made"
    return {
        "posix.system": Calls(os.system, f"touch {made}"),
        "builtins.eval": Calls(eval, f"open({str(made)!r}, 'w')"),
        "builtins.exec": Calls(exec, f"open({str(made)!r}, 'w')"),
        "builtins.getattr": Calls(getattr, "", "format"),
        "io.open": Calls(open, str(made), "w"),
        "builtins.__import__": Calls(__import__, "antigravity"),
    }


@pytest.mark.parametrize("attack", list(attacks(Path())))
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_code_of_a_pickle_runs(tmp_path: Path, attack: str, protocol: int) -> None:
    file, payload = tmp_path / "x.pkl", attacks(tmp_path)[attack]
    file.write_bytes(pickle.dumps({"experiment_state": [payload]}, protocol=protocol))
    with pytest.raises(UserError, match=rf"holds {attack}, which is not plain data; nothing of it was loaded"):
        read_pickle(file)
    torch.save({"state_dict": {"x": payload}}, file)
    with pytest.raises(UserError, match=r"(system|eval|exec|getattr|open|__import__), which is not plain data"):
        _from_torch(TABLE["moco-v2"], file)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pkl"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"c_codecs\nencode\n(Vx\nVzlib\ntR.", "bytes as zlib"),
        (b"cnumpy\ndtype\n(VO\ntR.", "arrays of type O"),
        (b"cnumpy\ndtype\n(Vi4,O\ntR.", "arrays of type i4,O"),
        (b"cjax\neval\n(Vx\ntR.", "jax.eval"),
        (b"chaiku._src.data_structures\nos.system\n(Vx\ntR.", "haiku._src.data_structures.os.system"),
        (b"cbyol.x\nos.system\n(Vx\ntR.", "byol.x.os.system"),
        (b"cnumpy._core.multiarray\n_reconstruct\n", "not a whole checkpoint"),
        (b"", "not a whole checkpoint"),
    ],
)
def test_a_pickle_is_taken_by_no_side_door(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "x.pkl").write_bytes(text)
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        read_pickle(tmp_path / "x.pkl")


# -- torch -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_a_training_script_s_command_line_and_numbers_are_data(tmp_path: Path, legacy: bool) -> None:
    state = {"module.encoder_q.conv1.weight": torch.ones(1), "module.queue": torch.ones(2)}
    beside = {"args": argparse.Namespace(lr=0.1, schedule=[1]), "acc": np.float64(3.0), "n": np.int64(2), "epoch": 200}
    torch.save({"state_dict": state, **beside}, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    text = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(
        text.replace(b"numpy._core.multiarray", b"numpy.core.multiarray") if legacy else text
    )
    read = _from_torch(TABLE["moco-v2"], tmp_path / "x.pth")
    assert list(read.weights) == ["conv1.weight"]
    assert read.dropped == 1


def test_a_torch_file_that_is_cut_or_another_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save({"state_dict": {"module.encoder_q.x": torch.ones(1000)}}, file)
    whole = file.read_bytes()
    for damaged in (whole[:1000], whole[:-1000], b"", b"<html>"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="not a whole, plain checkpoint") as error:
            _from_torch(TABLE["moco-v2"], file)
        assert "\n" not in str(error.value)
    file.write_bytes(whole)
    with pytest.raises(UserError, match="no state dict under 'model': not the checkpoint infomin"):
        _from_torch(TABLE["infomin"], file)
    torch.save({"state_dict": {"module.encoder_q.x": 3}}, file)
    with pytest.raises(UserError, match=r"module\.encoder_q\.x is a int, expected a tensor"):
        _from_torch(TABLE["moco-v2"], file)
    with pytest.raises(UserError, match="no such file"):
        load_checkpoint(torch.nn.Identity(), TABLE["moco-v2"], tmp_path / "none.pth")


# -- names -------------------------------------------------------------------------------------------------------------


def test_networks_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine.ckpt").touch()
    specs = {
        "a": "a=x/y",
        "byol": "byol",
        "dino": f"dino:{tmp_path}/file.pth",
        "resnet18": "torchvision:resnet18",
        "vit_small_patch16_224.dino": "timm:vit_small_patch16_224.dino",
        "random": "random",
        "random-3": "random:3",
        "random-resnet10-32-1": "random:resnet10@32:1",
        "simclr": "runs/lr=0.1/simclr",
        "last": "runs/last/checkpoints/epoch=3.ckpt",
        "mine": f"{tmp_path}/mine.ckpt",
        "seeds": "seeds=runs/a,runs/b",
    }
    named = network_names(list(specs.values()))
    assert list(named) == list(specs)
    assert named["simclr"] == "runs/lr=0.1/simclr"
    assert named["seeds"] == "runs/a,runs/b"


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (["byol", "byol:x.pkl"], ["--models byol byol:x.pkl", "each name once"]),
        (["a="], ["--models a=", "NAME=PATH"]),
        (["..=b"], ["--models ..: expected the name of one folder"]),
        (["<b>=b"], ["--models <b>: expected the name of one folder"]),
        (["=b"], ["--models =b", "NAME=PATH"]),
        (["byoll"], ["--models byoll", "did you mean 'byol'"]),
        (["dino_vits16"], ["did you mean 'dino-vits16'"]),
        (["byol:no/such.pkl"], ["byol", "no/such.pkl", "no such file"]),
        (["byol:"], ["byol", "no such file"]),
        (["torchvision:resnet19"], ["torchvision:resnet19", "'resnet18'"]),
        (["timm:vit_small_patch16_225"], ["timm:vit_small_patch16_225", "vit_small_patch16_224"]),
        (["timm:convnext_tiny"], ["timm:convnext_tiny is unknown; timm has it, but only ResNets", "docs/zoo.md"]),
        (["random:convnext_atto@64"], ["'convnext_atto' is unknown; timm has it, but only ResNets", "docs/zoo.md"]),
        (["random:timm:resnet18"], ["random:timm:resnet18", "without timm: or torchvision:"]),
        (["random:zzz"], ["'zzz' is unknown; expected one of the ResNets", "resnet101)", "docs/zoo.md"]),
        (["random:resnet19"], ["resnet19", "'resnet18'"]),
        (["random:resnet10@big"], ["random:resnet10@big", "@PIXELS"]),
        (["random:vit_tiny_patch16_224@50"], ["50", "multiple of 16"]),
        (["random:1"], ["at least one run or checkpoint"]),
        (["x=random:resnet10@32", "y=random:one"], ["one", "unknown"]),
    ],
)
def test_a_mistaken_name_is_one_line(models: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_networks(models)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
