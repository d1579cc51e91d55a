"""Views a second of the SimCLR policy: ours, torchvision v2 image by image, kornia in batches; side by side in one run.

Every contender starts from the same uint8 images and ends at float32 views of the same size, with the same operations
and ranges. Rounds are interleaved, so that a busy machine slows all alike; the table gives medians. The floor is one
read of the uint8 images and one write of them as float32, ``images / 255``.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable

import kornia
import kornia.augmentation as K
import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2

from ssl_geometry.data.views import View

Make = Callable[[Tensor], Tensor]


def ours(size: int, blur: bool) -> Make:
    view = View({"simclr": {"blur": blur}}, size=size)

    def make(images: Tensor) -> Tensor:
        index = torch.arange(len(images), device=images.device)
        return view(images, index, seed=0, epoch=0, view=0)

    return make


def torchvision_v2(size: int, blur: bool) -> Make:
    ops = [
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomResizedCrop(size, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
    ]
    if blur:
        ops.append(v2.RandomApply([v2.GaussianBlur(kernel(size), (0.1, 2.0))], p=0.5))
    transform = v2.Compose(ops)
    return lambda images: torch.stack([transform(image) for image in images])


def kornia_batched(size: int, blur: bool) -> Make:
    options = {"same_on_batch": False}
    ops = [
        K.RandomResizedCrop((size, size), scale=(0.08, 1.0), **options),
        K.RandomHorizontalFlip(**options),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8, **options),
        K.RandomGrayscale(p=0.2, **options),
    ]
    if blur:
        ops.append(K.RandomGaussianBlur((kernel(size),) * 2, (0.1, 2.0), p=0.5, **options))
    transform = K.ImageSequential(*ops)
    return lambda images: transform(images / 255)


def kernel(size: int) -> int:
    return View("blur", size=size).ops["blur"].radius * 2 + 1


OURS, TORCHVISION, KORNIA = "ours", "torchvision v2, per image", "kornia, batched"
CONTENDERS = {
    OURS: ours,
    TORCHVISION: torchvision_v2,
    KORNIA: kornia_batched,
    "floor: images / 255": lambda size, blur: lambda images: images / 255,
}


def views_per_second(images: Tensor, size: int, blur: bool, rounds: int) -> dict[str, float]:
    """Medians over interleaved rounds."""
    makers = {name: contender(size, blur) for name, contender in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for round_ in range(rounds + 1):
        for name, make in makers.items():
            repeat = 1 if name == TORCHVISION else 3
            synchronize(images)
            start = time.perf_counter()
            for _ in range(repeat):
                make(images)
            synchronize(images)
            if round_ > 0:  # the first warms up
                seconds[name].append((time.perf_counter() - start) / repeat)
    return {name: len(images) / statistics.median(taken) for name, taken in seconds.items()}


def synchronize(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where images lie and views are made")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds; the table gives medians")
    parser.add_argument("--batch", type=int, nargs=2, default=[256, 64], help="batch at 32 px and at 224 px")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else platform.machine()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, kornia {kornia.__version__}"
    print(f"{device}, {os.cpu_count()} cores, {args.threads} threads; {versions}; {datetime.date.today()}\n")
    print("| size | policy | " + " | ".join(CONTENDERS) + " | ours / fastest rival |")
    print("|---|---|" + "---:|" * (len(CONTENDERS) + 1))
    for size, source, batch in ((32, 32, args.batch[0]), (224, 256, args.batch[1])):
        images = torch.randint(0, 256, (batch, 3, source, source), dtype=torch.uint8, device=args.device)
        for blur in (False, True):
            rates = views_per_second(images, size, blur, args.rounds)
            rival = max(rates[name] for name in (TORCHVISION, KORNIA))
            policy = "crop, flip, color, gray" + (", blur" if blur else "")
            cells = " | ".join(f"{rate:,.0f}" for rate in rates.values())
            print(f"| {source} → {size} | {policy} | {cells} | {rates[OURS] / rival:.1f} |")


if __name__ == "__main__":
    main()
