"""Which options and which checkpoints a run can be resumed with, and which runs are seeds of one recipe."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ssl_geometry.errors import UserError

TRAINER_OPTIONS = (
    "accumulate_grad_batches",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_train_batches",
    "overfit_batches",
    "precision",
    "sync_batchnorm",
)
"""Options of the trainer that change what is trained; its length is not among them, a run may be made longer."""
FREE_OPTIONS = {
    "data.download",
    "data.eval_batch_size",
    "data.limit_test",
    "data.measure_size",
    "data.num_workers",
    "data.root",
    "data.storage",
    "model.channels_last",
    "model.compile",
    "model.eval_precision",
}
"""Options of the method and the data that change where and how fast it is trained, or what is measured on the way."""
SEEDS = {"seed_everything", "data.seed", "model.seed"}
"""Options that runs of one recipe may differ in."""
GROUPS = ("model", "data", "trainer", "cka", "invariance", "probes", "neighbors", "spectrum")
"""Groups of options in the configuration of a run."""
CONTENT = {
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "global_step": int,
    "pytorch-lightning_version": str,
}
"""What training needs of a checkpoint."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The options that change what is trained and are not as they were, with both values.

    Options that only one of the two knows are left out: another version of the software has them.

    Args:
        before: the configuration that the run was trained with.
        now: the one that it is to be continued with.

    Returns:
        Such as ``--model.lr 0.3 (now 3.0)``; none where training would go on the same.

    Example:
        >>> before = {"data": {"batch_size": 64, "num_workers": 2}, "seed_everything": 0}
        >>> differences(before, {"data": {"batch_size": 32, "num_workers": 4}, "seed_everything": 0})
        ['--data.batch_size 64 (now 32)']
    """
    old, new = _trained_with(before), _trained_with(now)
    if old.get("model") != new.get("model"):  # the options of one method mean nothing for another
        return [f"--model {old.get('model')} (now {new.get('model')})"]
    return [f"--{name} {old[name]} (now {new[name]})" for name in old if name in new and old[name] != new[name]]


def well_formed(config: Mapping[str, Any]) -> bool:
    """Whether the groups of a configuration that was read from a file are groups.

    Example:
        >>> well_formed({"model": {"class_path": "x.Y"}, "data": None}), well_formed({"model": 5})
        (True, False)
    """
    groups = [config.get(name) or {} for name in GROUPS]
    return all(isinstance(group, dict) for group in groups) and isinstance(groups[0].get("init_args") or {}, dict)


def _trained_with(config: Mapping[str, Any]) -> dict[str, Any]:
    model, data, trainer = (config.get(group) or {} for group in ("model", "data", "trainer"))
    options = {
        "model": model.get("class_path"),
        **{f"model.{name}": value for name, value in (model.get("init_args") or {}).items()},
        **{f"data.{name}": value for name, value in data.items()},
        **{f"trainer.{name}": trainer[name] for name in TRAINER_OPTIONS if name in trainer},
        "seed_everything": config.get("seed_everything"),
    }
    if "dataset" in data:
        options["data.dataset"] = Path(data["dataset"]).name  # a folder of images may have moved
    return {name: value for name, value in options.items() if name not in FREE_OPTIONS}


def recipe(config: Mapping[str, Any]) -> str:
    """All options that change what is trained, and for how long, but for the seed: runs that share them are its seeds.

    Example:
        >>> one, two = ({"seed_everything": seed, "data": {"batch_size": 64, "num_workers": seed}} for seed in (0, 1))
        >>> recipe(one) == recipe(two), recipe(one) == recipe({"data": {"batch_size": 32}})
        (True, False)
    """
    return json.dumps(_recipe(config), sort_keys=True, default=str)


def unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The options in which two runs are not of one recipe, with both values; those that both know.

    Example:
        >>> one, two = ({"seed_everything": seed, "data": {"batch_size": 64 + seed}} for seed in (0, 1))
        >>> unlike(one, two)
        ['--data.batch_size 64 and 65']
    """
    a, b = _recipe(one), _recipe(other)
    if a["model"] != b["model"]:  # the options of one method mean nothing for another
        return [f"--model {a['model']} and {b['model']}"]
    return [f"--{name} {a[name]} and {b[name]}" for name in a if name in b and a[name] != b[name]]


def _recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    trainer = config.get("trainer") or {}
    length = {f"trainer.{name}": trainer.get(name) for name in ("max_epochs", "max_steps", "max_time")}
    return {name: value for name, value in _trained_with(config).items() if name not in SEEDS} | length


class Progress(NamedTuple):
    """How far training had come."""

    epochs: int
    """Completed epochs; -1 before anything was measured."""
    step: int
    """Completed optimiser steps."""


def progress(checkpoint: Mapping[str, Any], path: Path) -> Progress:
    """How far training had come when a checkpoint was written.

    Args:
        checkpoint: as it was read.
        path: where from, for the error message.

    Returns:
        Its completed epochs and steps.

    Raises:
        UserError: training cannot go on from it: weights alone, or a file of another program.
    """
    wrong = [name for name, kind in CONTENT.items() if not isinstance(checkpoint.get(name), kind)]
    epochs: Any = checkpoint.get("loops")
    for key in ("fit_loop", "epoch_progress", "current", "processed"):
        epochs = epochs.get(key) if isinstance(epochs, dict) else None
    if not wrong:
        whole = {
            "state_dict": all(isinstance(value, Tensor) for value in checkpoint["state_dict"].values()),
            "pytorch-lightning_version": re.match(r"\d+\.\d+", checkpoint["pytorch-lightning_version"]),
            "loops": _is_count(epochs) and _counts_are_whole(checkpoint["loops"]["fit_loop"]),
            "global_step": _is_count(checkpoint["global_step"]),
            "optimizer_states": _are_states(checkpoint, "optimizer_states", {"state": dict, "param_groups": list}),
            "lr_schedulers": _are_states(checkpoint, "lr_schedulers", {"last_epoch": int, "base_lrs": list}),
        }
        wrong = [name for name, is_whole in whole.items() if not is_whole]
    if wrong:
        raise UserError(
            f"--resume {path}: training cannot continue from this file, its {', '.join(wrong)} "
            f"{'is' if len(wrong) == 1 else 'are'} missing or damaged: name a checkpoint that fit has written"
        )
    return Progress(epochs, checkpoint["global_step"])


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # True is an int


def _counts_are_whole(fit_loop: Mapping[str, Any]) -> bool:
    """Whether Lightning can read its counters of epochs, batches and steps."""

    def is_whole(value: Any) -> bool:
        if not isinstance(value, dict):
            return True
        if not {"current", "total"} & set(value):
            return all(map(is_whole, value.values()))
        return all(
            isinstance(value.get(key), dict) and all(map(_is_count, value[key].values()))
            for key in ("current", "total")
        )

    return all(is_whole(value) for name, value in fit_loop.items() if str(name).endswith("progress"))


def _are_states(checkpoint: Mapping[str, Any], name: str, parts: Mapping[str, type]) -> bool:
    """Whether there are states to go on with; how many, and what is in them, is known of this package's methods."""
    states = checkpoint[name]
    if not all(isinstance(state, dict) for state in states):
        return False
    if not _is_ours(_method_of(checkpoint).get("class_path")):
        return True
    return bool(states) and all(isinstance(state.get(part), kind) for state in states for part, kind in parts.items())


def _is_ours(class_path: Any) -> bool:
    return str(class_path).startswith("ssl_geometry.")


def _method_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    method = checkpoint.get("method")
    return method if isinstance(method, dict) else {}


def check_network(checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint of another network than the run's.

    Args:
        checkpoint: as it was read.
        config: of the run; a class of the user's own is known by its name alone, as it may change its options.
        path: where the checkpoint is from, for the error message.

    Raises:
        UserError: another method, or other options of it.
    """
    model, method = config.get("model") or {}, _method_of(checkpoint)
    expected, found = model.get("class_path"), method.get("class_path")
    if not expected or not (found or _is_ours(expected)):  # a LightningModule does not name its class
        return
    other = []
    if str(found).rpartition(".")[2] != str(expected).rpartition(".")[2]:
        other = [f"--model {found or 'unknown'} (the run: {expected})"]
    elif _is_ours(found):
        ours, theirs = (_plain(which.get("init_args")) for which in (model, method))
        other = [
            f"--model.{name} {theirs[name]} (the run: {value})"
            for name, value in ours.items()
            if value is not None  # else the data decide it, such as the number of classes
            and theirs.get(name, value) != value
            and f"model.{name}" not in {*FREE_OPTIONS, *SEEDS}
        ]
    if other:
        raise UserError(f"--resume {path}: holds another network than this run, {', '.join(other[:3])}")


def _plain(options: Any) -> dict[str, Any]:
    """Options as a file of configuration has them: tuples are lists there."""
    plain = json.loads(json.dumps(options or {}, default=str))
    return plain if isinstance(plain, dict) else {}
