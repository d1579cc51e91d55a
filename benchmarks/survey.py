"""One model's whole survey over the bare forward passes that it needs: clean images and all augmented copies.

    python benchmarks/survey.py                      # ResNet-50, 32 px, as on CIFAR-10
    python benchmarks/survey.py --backbone resnet18 --width 0.25

Floor: the same number of forward passes of the backbone, in the same batches, on pictures that are ready. The survey
adds the making of copies, taps and pooling, nearest neighbours, NNK and the metrics of five augmentation manifolds.
Both are timed in turns; medians.
"""

import argparse
import statistics
import time

import torch

from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.measure import Neighborhoods, Occasion, Spectrum, Subject, measure_together
from ssl_geometry.measure.engine import measuring
from ssl_geometry.measure.neighbors import SETTINGS
from ssl_geometry.methods import Method
from ssl_geometry.survey_options import LAYERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    data = DataModule(
        "digits", image_size=options.image_size, measure_size=options.images, eval_batch_size=options.batch
    )
    data.setup()
    method = Method(backbone=options.backbone, width=options.width, image_size=options.image_size).to(options.device)
    subject = Subject.of(method)
    measurements = [
        Neighborhoods(layers=list(LAYERS), k=50, copies=options.copies),
        Spectrum(layers=list(LAYERS), copies=options.copies),
    ]
    for measurement in measurements:
        measurement.prepare(subject, data)
    views = 1 + options.copies * len(SETTINGS)
    ready = torch.rand(options.batch, 3, options.image_size, options.image_size, device=options.device)

    def wait() -> float:
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def floor() -> float:
        started = wait()
        with measuring(method):
            for _ in range(views * len(data.loader("measure"))):
                method.backbone(ready)
        return wait() - started

    def whole() -> float:
        started = wait()
        measure_together(measurements, Occasion(subject, data, "benchmark"))
        return wait() - started

    times: dict[str, list[float]] = {"bare forward passes": [], "survey": []}
    for _ in range(options.repeats):
        times["bare forward passes"].append(floor())
        times["survey"].append(whole())
    medians = {name: statistics.median(values) for name, values in times.items()}
    forwards = views * options.images
    print(f"{options.backbone} x {options.width:g}, {options.image_size} px, {options.images} images x {views} views")
    print(f"on {options.device}, {torch.get_num_threads()} threads; medians of {options.repeats}")
    for name, seconds in medians.items():
        ratio = seconds / medians["bare forward passes"]
        print(f"{name:>20}: {seconds:8.2f} s  {forwards / seconds:9.1f} images/s  {ratio:5.2f} of the floor")


if __name__ == "__main__":
    main()
