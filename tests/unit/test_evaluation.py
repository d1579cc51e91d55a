"""Validation in the precision that was chosen, by its name; tests in float32."""

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.methods import Method, SimCLR, Supervised


@pytest.mark.parametrize(
    ("precision", "chosen", "dtype", "suffix"),
    [
        ("32-true", "float32", torch.float32, ""),
        ("32-true", "training", torch.float32, ""),
        ("bf16-mixed", "float32", torch.float32, ""),
        ("bf16-mixed", "training", torch.bfloat16, "_bf16-mixed"),
        ("64-true", "training", torch.float64, ""),
    ],
)
@pytest.mark.parametrize("kind", [SimCLR, Supervised])
def test_validation_is_in_the_chosen_precision_and_says_so(
    kind: type[Method], precision: str, chosen: str, dtype: torch.dtype, suffix: str
) -> None:
    seen: dict[str, list[torch.dtype]] = {"val": [], "test": []}
    features: dict[str, list[Tensor]] = {"val": [], "test": []}

    class Watched(kind):  # type: ignore[misc,valid-type]
        def evaluate(self, x: Tensor, batch: dict, split: str) -> None:  # type: ignore[type-arg]
            features[split].append(x)
            super().evaluate(x, batch, split)

    torch.manual_seed(0)
    method = Watched(backbone="resnet10", width=0.25, image_size=16, eval_precision=chosen)
    data = DataModule("digits", limit_train=200, limit_test=50, measure_size=50, batch_size=50)
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen[split].append(output.dtype)

    method.backbone.conv1.register_forward_hook(note)
    names = {"knn", "acc"} if kind is Supervised else {"knn"}
    split = "val"
    logged = trainer.validate(method, data, verbose=False)[0]
    assert logged.keys() == {f"val/{name}{suffix}" for name in names}
    assert set(seen["val"]) == {dtype}, "the bank as well as the images that it votes on"
    split = "test"
    assert trainer.test(method, data, verbose=False)[0].keys() == {f"test/{name}" for name in names}
    assert set(seen["test"]) == {torch.float64 if precision == "64-true" else torch.float32}
    assert {x.dtype for x in features["val"] + features["test"]} == {torch.float32}

    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    method.eval()
    exact, chosen_features = method.features(images), method.features(images, chosen)
    assert torch.equal(exact, chosen_features) is not bool(suffix)
    torch.testing.assert_close(chosen_features, exact, rtol=0.05, atol=0.05)
