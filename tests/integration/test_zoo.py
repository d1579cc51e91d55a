"""Every published checkpoint in the layout of its file, and networks without a run in the commands."""

import argparse
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from ssl_geometry import zoo
from ssl_geometry.compare import compare
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.errors import UserError
from ssl_geometry.methods import Published
from ssl_geometry.models import build_backbone
from ssl_geometry.models.zoo import TABLE, Checkpoint, load_checkpoint
from ssl_geometry.models.zoo.tensorbundle import read_bundle
from ssl_geometry.probe import probe
from ssl_geometry.records import read_records
from ssl_geometry.report.probes import PIXELS
from ssl_geometry.runs.networks import load_networks

State = dict[str, Tensor]


# -- files in the layouts that were published --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> dict[str, State]:
    """Architecture to random weights, with statistics of batch norm that are not those of a new network."""
    torch.manual_seed(5)
    vit = timm.create_model("vit_small_patch16_224", num_classes=0)
    states = {"resnet50": torchvision.models.resnet50().state_dict(), "vit_small_patch16_224": vit.state_dict()}
    for state in states.values():
        for value in state.values():
            if value.is_floating_point() and value.ndim <= 1:
                value.uniform_(0.5, 1.5)
            elif not value.is_floating_point():
                value.fill_(7)
    return states


@pytest.fixture(scope="module")
def backbones() -> dict[str, nn.Module]:
    return {name: build_backbone(name, image_size=224) for name in ("resnet50", "vit_small_patch16_224")}


def without_fc(state: Mapping[str, Tensor]) -> State:
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def moco(state: State) -> Any:
    """A query encoder with its head, a key encoder, the queue, and what the training script kept."""
    head = {"fc.0.weight": torch.ones(3, 2), "fc.0.bias": torch.ones(3), "fc.2.weight": torch.ones(2, 3)}
    key = {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.0.weight": torch.zeros(3, 2)}
    both = under("module.encoder_q.", {**without_fc(state), **head}) | under("module.encoder_k.", key)
    queue = {"module.queue": torch.zeros(2, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {
        "epoch": 200,
        "arch": "resnet50",
        "state_dict": both | queue,
        "optimizer": {"state": {}, "param_groups": []},
    }


def contrast(state: State) -> Any:
    """PyContrast: the encoder beside its heads, and the options as they were parsed."""
    heads = ("module.head.0.weight", "module.head_jig.fc.weight", "module.jigsaw.fc.weight")
    other = {name: torch.ones(2, 2) for name in (*heads, "module.encoder_ema.conv1.weight")}
    model = under("module.encoder.", {**without_fc(state), "fc.weight": torch.ones(2, 2)}) | other
    options = argparse.Namespace(arch="resnet50", lr_decay_epochs=[120, 160], learning_rate=0.03)
    return {"opt": options, "model": model, "model_ema": {}, "epoch": 200, "loss": np.float64(3.0)}


def deepcluster(state: State) -> Any:
    heads = {"projection_head.0.weight": torch.ones(2, 2), "projection_head.1.running_mean": torch.ones(2)}
    prototypes = {"prototypes.weight": torch.ones(2, 2), "prototypes.prototypes0.weight": torch.ones(2, 2)}
    return under("module.", without_fc(state) | heads | prototypes)


def separius(state: State) -> Any:
    """The usual conversion of SimCLR v2, in its own order and names."""
    renamed: State = {}
    for name, value in state.items():
        layer, _, part = name.rpartition(".")
        stage, _, inner = layer.partition(".")
        if layer == "conv1":
            layer = "net.0.0"
        elif layer == "bn1":
            layer = "net.0.1.0"
        elif stage.startswith("layer"):
            block, _, inner = inner.partition(".")
            known = {"downsample.0": "projection.shortcut", "downsample.1": "projection.bn.0"}
            known |= {f"conv{i + 1}": f"net.{2 * i}" for i in range(3)}
            known |= {f"bn{i + 1}": f"net.{2 * i + 1}.0" for i in range(3)}
            layer = f"net.{stage[-1]}.blocks.{block}.{known[inner]}"
        renamed[f"{layer}.{part}"] = value
    return {"resnet": renamed, "head": {"layers.0.weight": torch.ones(2, 2)}}


LAYOUTS = {
    "supervised": dict,
    "simclr-v1": lambda state: {"state_dict": state},
    "simclr-v2": separius,
    "dino": without_fc,
    "dino-vits16": dict,
    **dict.fromkeys(("insdis", "pirl", "infomin"), contrast),
    **dict.fromkeys(("moco-v1", "moco-v2", "pcl-v1", "pcl-v2"), moco),
    **dict.fromkeys(("sela-v2", "deepcluster-v2", "swav"), deepcluster),
}
"""All of them but BYOL's, as torch files (those of SimCLR converted)."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_checkpoint_is_read_from_its_layout(
    name: str, trained: dict[str, State], backbones: dict[str, nn.Module], tmp_path: Path
) -> None:
    row = TABLE[name]
    file = tmp_path / row.file_names[0].replace(".zip", ".pth").replace(".index", ".pth")
    torch.save(LAYOUTS[name](trained[row.architecture]), file, _use_new_zipfile_serialization=name != "moco-v1")
    assert_restored(row, file, backbones[row.architecture], trained[row.architecture])


def assert_restored(row: Checkpoint, file: Path, backbone: nn.Module, state: State) -> None:
    """The backbone has the weights of the file, bit for bit; the file is removed."""
    with torch.no_grad():
        for value in backbone.state_dict().values():
            value.zero_()  # nothing is left of another file
    expected = without_fc(state)
    loaded = load_checkpoint(backbone, row, file)
    file.unlink()
    assert loaded.used >= sum(not name.endswith("num_batches_tracked") for name in expected)
    restored = backbone.state_dict()
    assert set(restored) == set(expected)
    for name, value in expected.items():
        counted = name.endswith("num_batches_tracked") and row.format != "torch"
        assert counted or torch.equal(restored[name], value), name
    if backbone.num_features == 384:  # the features, too, are those of the original
        original = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    else:
        original = torchvision.models.resnet50().eval()
        original.fc = nn.Identity()
    original.load_state_dict(expected)
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(backbone.eval()(images), original(images))


# -- BYOL --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def haiku(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Classes under the names of Haiku, BYOL and optax, so that a pickle names them."""

    class FlatMapping(dict):
        def __reduce__(self) -> Any:
            return FlatMapping, (dict(self),)

    class State(tuple):
        __slots__ = ()

        def __new__(cls, *values: Any) -> Any:
            return super().__new__(cls, values)

        def __getnewargs__(self) -> Any:
            return tuple(self)

    made = {}
    for module, name, cls in (
        ("haiku._src.data_structures", "FlatMapping", FlatMapping),
        ("byol.byol_experiment", "_ByolExperimentState", State),
        ("optax._src.transform", "TraceState", type("TraceState", (State,), {"__slots__": ()})),
    ):
        cls.__module__, cls.__qualname__, cls.__name__ = module, name, name
        parts = module.split(".")
        for length in range(1, len(parts) + 1):
            path = ".".join(parts[:length])
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        setattr(sys.modules[module], name, cls)
        made[name.lstrip("_")] = cls
    return types.SimpleNamespace(**made)


def haiku_path(layer: str) -> str:
    """A layer's name in Haiku's ResNet."""
    kind = "batchnorm" if layer.split(".")[-1].startswith("bn") or layer.endswith("downsample.1") else "conv"
    if "." not in layer:
        return f"res_net50/~/initial_{kind}"
    stage, block, inner = layer.split(".", 2)
    last = f"shortcut_{kind}" if inner.startswith("downsample") else f"{kind}_{int(inner[-1]) - 1}"
    return f"res_net50/~/block_group_{int(stage[-1]) - 1}/~/block_{block}/~/{last}"


def byol(state: State, haiku: types.SimpleNamespace) -> Any:
    params: dict[str, Any] = {}
    averages: dict[str, Any] = {}
    for name, value in without_fc(state).items():
        layer, _, part = name.rpartition(".")
        path, array = haiku_path(layer), value.numpy()
        if array.ndim == 4:
            params[path] = haiku.FlatMapping(w=np.ascontiguousarray(array.transpose(2, 3, 1, 0)))
        elif part in ("weight", "bias"):
            params.setdefault(path, {})["scale" if part == "weight" else "offset"] = array.reshape(1, 1, 1, -1)
        elif part.startswith("running"):
            ema = array.reshape(1, 1, 1, -1)
            kind = "mean_ema" if part == "running_mean" else "var_ema"
            averages[f"{path}/~/{kind}"] = {"counter": np.int32(9), "hidden": ema * 0, "average": ema}
    initial = [path for path in params if "initial" in path]
    params |= {path: params.pop(path) for path in initial}  # they come last in the published file
    heads = {"projector/linear": {"w": np.ones((2, 2), "f4"), "b": np.ones(2, "f4")}}
    heads |= {"predictor/linear_1": {"w": np.ones((2, 2), "f4")}, "classifier": {"w": np.ones((2, 2), "f4")}}
    norms = {"projector/batch_norm/~/mean_ema": {"counter": np.int32(9), "average": np.ones((1, 2), "f4")}}
    online, statistics = haiku.FlatMapping(params | heads), haiku.FlatMapping(averages | norms)
    momentum = [haiku.TraceState(haiku.FlatMapping(classifier={"w": np.ones(2, "f4")}))]
    everything = haiku.ByolExperimentState(online, haiku.FlatMapping(), statistics, haiku.FlatMapping(), momentum)
    return {"experiment_state": everything, "step": np.int64(300_000), "rng": np.zeros(2, "u4")}


def test_byol_is_read_from_its_pickle(
    haiku: types.SimpleNamespace, trained: dict[str, State], backbones: dict[str, nn.Module], tmp_path: Path
) -> None:
    file = tmp_path / "pretrain_res50x1.pkl"
    content = byol(trained["resnet50"], haiku)
    file.write_bytes(pickle.dumps(content, protocol=2))
    assert b"haiku._src.data_structures\nFlatMapping" in file.read_bytes()
    assert_restored(TABLE["byol"], file, backbones["resnet50"], trained["resnet50"])
    path, other = "res_net50/~/initial_conv", "res_net50/~/final_conv"
    kernel = content["experiment_state"][0][path]
    state = haiku.ByolExperimentState(haiku.FlatMapping({path: kernel, other: kernel}), {}, {}, {}, [])
    content = {"experiment_state": state}
    file.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match=r"264 missing \(bn1\.weight, .*, 1 unexpected \(final_conv/w\)"):
        load_checkpoint(backbones["resnet50"], TABLE["byol"], file)
    file.write_bytes(pickle.dumps({"experiment_state": {"x": 1}}, protocol=2))
    with pytest.raises(UserError, match="no online_params and online_state: not the checkpoint byol"):
        load_checkpoint(backbones["resnet50"], TABLE["byol"], file)


# -- SimCLR as TensorFlow wrote it -------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def common(a: bytes, b: bytes) -> int:
    return next((number for number, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    """A LevelDB block whose keys share their beginnings, restarted every 16."""
    out, restarts, before = b"", [], b""
    for number, (key, value) in enumerate(entries):
        shared = 0 if number % 16 == 0 else common(before, key)
        restarts += [len(out)] if number % 16 == 0 else []
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def bundle(tensors: Mapping[str, np.ndarray], in_a_block: int = 50) -> tuple[bytes, bytes]:
    """The index and the data of a TensorBundle."""
    rows, data = [(b"", b"\x08\x01")], bytearray()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        dims = b"".join(b"\x12" + varint(len(dim)) + dim for dim in (b"\x08" + varint(side) for side in array.shape))
        entry = b"\x08" + varint({"f": 1, "i": 9}[array.dtype.kind]) + b"\x12" + varint(len(dims)) + dims
        entry += b"\x20" + varint(len(data)) + b"\x28" + varint(array.nbytes) + b"\x35" + bytes(4)
        rows.append((name.encode(), entry))
        data += array.tobytes()
    table, handles = b"", []
    for start in range(0, len(rows), in_a_block):
        part = block(rows[start : start + in_a_block])
        handles.append((rows[min(start + in_a_block, len(rows)) - 1][0], varint(len(table)) + varint(len(part))))
        table += part + bytes(5)
    places = []
    for part in (block([]), block(handles)):
        places.append(varint(len(table)) + varint(len(part)))
        table += part + bytes(5)
    return table + b"".join(places).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57), bytes(data)


def simclr(state: State) -> dict[str, np.ndarray]:
    """SimCLR's names: layers are numbered as they were created, the shortcut of a block before its convolutions."""
    order = ["conv1"]
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for number in range(blocks):
            start = f"layer{stage}.{number}"
            order += [f"{start}.downsample.0"] * (number == 0) + [f"{start}.conv{i}" for i in (1, 2, 3)]
    tensors: dict[str, np.ndarray] = {"global_step": np.array(225_206, "i8")}
    for number, layer in enumerate(order):
        norm = layer.replace("conv", "bn").replace("downsample.0", "downsample.1")
        end = f"_{number}" if number else ""
        tensors[f"base_model/conv2d{end}/kernel"] = state[f"{layer}.weight"].numpy().transpose(2, 3, 1, 0)
        tensors[f"base_model/conv2d{end}/kernel/Momentum"] = np.zeros(3, "f4")
        given = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
        for theirs, ours in given.items():
            tensors[f"base_model/batch_normalization{end}/{theirs}"] = state[f"{norm}.{ours}"].numpy()
    others = ("ema_model/base_model/conv2d/kernel", "head_supervised/linear_layer/dense/kernel")
    return tensors | {name: np.ones((2, 2), "f4") for name in (*others, "head_contrastive/nl_0/dense/kernel")}


def test_simclr_is_read_as_tensorflow_wrote_it(
    trained: dict[str, State], backbones: dict[str, nn.Module], tmp_path: Path
) -> None:
    index, data = bundle(simclr(trained["resnet50"]))
    (tmp_path / "model.ckpt-250228.data-00000-of-00001").write_bytes(data)
    (tmp_path / "model.ckpt-250228.index").write_bytes(index)
    with zipfile.ZipFile(tmp_path / "ResNet50_1x.zip", "w") as archive:
        archive.writestr("ResNet50_1x/model.ckpt-225206.index", index)
        archive.write(
            tmp_path / "model.ckpt-250228.data-00000-of-00001", "ResNet50_1x/model.ckpt-225206.data-00000-of-00001"
        )
    for name in ("simclr-v1", "simclr-v2"):
        file = tmp_path / TABLE[name].file_names[0]
        assert_restored(TABLE[name], file, backbones["resnet50"], trained["resnet50"])


def test_a_network_of_selective_kernels_is_not_taken_for_simclr_v2(
    trained: dict[str, State], backbones: dict[str, nn.Module], tmp_path: Path
) -> None:
    tensors = {name: value for name, value in simclr(trained["resnet50"]).items() if "conv2d_52" not in name}
    tensors["base_model/conv2d_53/kernel"] = np.ones((1, 1, 2, 2), "f4")
    index, data = bundle(tensors)
    (tmp_path / "m.index").write_bytes(index)
    (tmp_path / "m.data-00000-of-00001").write_bytes(data)
    assert len(read_bundle(tmp_path / "m.index", lambda name: "conv2d_53" in name)[0]) == 1
    with pytest.raises(UserError, match=r"1 missing \(layer4\.2\.conv3\.weight\), 1 unexpected \(base_model/conv2d_53"):
        load_checkpoint(backbones["resnet50"], TABLE["simclr-v2"], tmp_path / "m.index")


# -- strictness --------------------------------------------------------------------------------------------------------


def test_another_architecture_and_missing_keys_are_one_line(
    trained: dict[str, State], backbones: dict[str, nn.Module], tmp_path: Path
) -> None:
    file, net, row = tmp_path / "x.pth", backbones["resnet50"], TABLE["dino"]
    torch.save(torchvision.models.resnet18().state_dict(), file)
    with pytest.raises(
        UserError, match=r"dino: .*x\.pth: \d+ missing \(.*, …\), \d+ misshaped .*of another arch"
    ) as error:
        load_checkpoint(net, row, file)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    state = without_fc(trained["resnet50"])
    wrong: dict[str, State] = {
        r"1 missing \(bn1\.weight\)": {name: value for name, value in state.items() if name != "bn1.weight"},
        r"1 unexpected \(layer5\.x\)": {**state, "layer5.x": torch.ones(1)},
        r"1 misshaped \(bn1\.weight is 65, expected 64\)": {**state, "bn1.weight": torch.ones(65)},
    }
    for words, content in wrong.items():
        torch.save(content, file)
        with pytest.raises(UserError, match=words):
            load_checkpoint(net, row, file)
    tracked = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(tracked, file)
    assert load_checkpoint(net, row, file).used == len(tracked)


# -- networks without a run --------------------------------------------------------------------------------------------


def test_torchvision_and_timm_give_their_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    original = torchvision.models.resnet18().eval()
    torch.save(original.state_dict(), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    _, network, epochs, *_ = load_networks(["torchvision:resnet18"])["resnet18"]
    assert isinstance(network, Published)
    assert (epochs, network.learns_from_labels) == (0, True)
    assert (network.clean_view.size, network.clean_view.center_crop) == (224, 0.875)
    assert network.clean_view.spec["normalize"][0] == [0.485, 0.456, 0.406]
    images = torch.rand(1, 3, 224, 224)
    original.fc = nn.Identity()
    with torch.no_grad():
        # another memory format adds up in another order
        torch.testing.assert_close(network.backbone(images), original(images), rtol=1e-3, atol=1e-3)
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(value, original.state_dict()[name])

    create, made = timm.create_model, []

    def pretrained(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        made.append((name, create(name, pretrained=False, **kwargs).eval()))
        return made[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", pretrained)
        unknown = load_networks(["timm:vit_small_patch16_224.dino"]).popitem()[1].method
        made.clear()
        _, network, epochs, *_ = load_networks(["timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"]).popitem()[1]
    assert network.learns_from_labels, "its weights were published with a classifier of ImageNet"
    assert unknown.learns_from_labels is None
    (name, vit), *_ = [(name, net) for name, net in made if "." in name]
    assert name == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    view = network.clean_view.spec
    assert (view["normalize"], view["center_crop"]) == ([[0.5] * 3, [0.5] * 3], 0.9)
    with torch.no_grad():
        assert torch.equal(network.backbone(images), vit(images))
    assert epochs == 0


def test_a_download_of_torchvision_or_timm_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no route\nto host")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr(timm, "create_model", refuse)
    for spec in ("torchvision:resnet18", "timm:vit_tiny_patch16_224"):
        with pytest.raises(UserError, match=f"{spec}: could not load .*no route") as error:
            load_networks([spec])
        assert "\n" not in str(error.value)


def test_a_published_network_is_remade_and_not_trained(tmp_path: Path) -> None:
    networks = load_networks(["a=random:vit_tiny_patch16_224@64:1", "random:resnet10@32", "random:3"])
    assert list(networks) == ["a", "random-resnet10-32", "random-3"]
    assert {model.epochs for model in networks.values()} == {None}
    network, twin = networks["a"].method, networks["random-3"].method
    assert twin.init_args == network.init_args
    name = "backbone.patch_embed.proj.weight"
    assert not torch.equal(twin.state_dict()[name], network.state_dict()[name])
    again = load_networks(["b=random:vit_tiny_patch16_224@64:1"])["b"].method
    for name, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False)
    with pytest.raises(UserError, match="it has no loss"):
        trainer.fit(networks["random-resnet10-32"].method, DataModule(dataset="digits", measure_size=64))


IMAGES = ["--data.dataset=digits", "--data.measure_size=64", "--data.eval_batch_size=32"]


def test_compare_takes_networks_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ssl_geometry.runs.networks.from_zoo", lambda name, file: small(name))
    models = ["random:resnet10@32", "byol"]
    layers = ["--cka.layers", "[layer1.0, layer4.0]", "--invariance.views=[own, color]", "--cka.gram_size=32"]
    out = compare(["--models", *models, *layers, *IMAGES, "--device", "cpu"])
    assert out == Path("runs/compare/random-resnet10-32-byol")
    frame = read_records(out)
    assert set(frame["model"]) == {"random-resnet10-32", "byol"}
    assert dict(frame.groupby("model")["epoch"].first()) == {"random-resnet10-32": 0, "byol": 1000}
    assert set(frame[frame["metric"] == "invariance"]["view"]) == {"color"}, "nobody knows byol's views"
    assert frame["value"].notna().all()
    assert (out / "figures" / "invariance_and_classes.png").exists()


def small(name: str) -> Published:
    torch.manual_seed(len(name))
    return Published("resnet10", 32, "imagenet", family=TABLE[name].family, source=name)


def test_probe_takes_an_untrained_network_alone(tmp_path: Path) -> None:
    few = ["--evaluations=[knn]", "--k=[5]", "--train_images=200", "--probes.layers", "post_residual"]
    out = probe(["--models", "random:resnet10@32", "--out", str(tmp_path / "p"), *few, *IMAGES, "--device", "cpu"])
    frame = read_records(out)
    assert set(frame["model"]) == {"random-resnet10-32", PIXELS}


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SSL_GEOMETRY_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "60")  # no name is cut
    return tmp_path


def test_the_command_lists_and_checks_the_cache(
    cache: Path, trained: dict[str, State], capsys: pytest.CaptureFixture[str]
) -> None:
    zoo.main(["list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in TABLE)
    zoo.main(["check"])
    assert "holds none of these" in capsys.readouterr().out
    file = cache / "dino-vits16" / "dino_deitsmall16_pretrain.pth"
    file.parent.mkdir()
    torch.save(trained["vit_small_patch16_224"], file)
    zoo.main(["check"])
    assert "fine  dino-vits16: 150 tensors loaded, 0 left out, 384 finite features" in capsys.readouterr().out
    zoo.main(["list"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "dino-vits16" in line]
    assert " MB" in line
    zoo.main(["fetch", "dino-vits16"])
    assert str(file) in capsys.readouterr().out
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SystemExit) as exit_:
        zoo.main(["check", "dino-vits16", "swav"])
    assert exit_.value.code == 1
    told = capsys.readouterr()
    assert "fail  dino-vits16" in told.out
    assert "expected" in told.out
    assert "fail  swav: not in the cache" in told.out
    assert "2 of 2" in told.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["download"], ["error: download: expected one of list, fetch, check"]),
        (["fetch", "byoll"], ["byoll", "'byol'"]),
        (["fetch"], ["name the checkpoints"]),
        (["lst"], ["lst"]),
        ([], ["action"]),
    ],
)
def test_a_mistake_is_one_line(
    cache: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        zoo.main(args)
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert all(word in line for word in words), line
