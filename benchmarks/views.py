"""Views a second of the SimCLR policy: ours, torchvision v2 image by image, kornia in batches; side by side in one run.

Every contender starts from the same uint8 images and ends at float32 views of the same size, with the same operations and
ranges. Rounds are interleaved, so that a busy machine slows all alike; the table gives medians. The floor is one read of the
uint8 images and one write of them as float32, ``images / 255``.
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


CONTENDERS = {
    "ours": ours,
    "torchvision v2, per image": torchvision_v2,
    "kornia, batched": kornia_batched,
    "floor: images / 255": lambda size, blur: lambda images: images / 255,
}


def views_per_second(images: Tensor, size: int, blur: bool, rounds: int) -> dict[str, float]:
    """Medians over interleaved rounds."""
    makers = {name: contender(size, blur) for name, contender in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for round_ in range(rounds + 1):
        for name, make in makers.items():
            repeat = 1 if name.startswith("torchvision") else 5
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
    parser.add_argument("--only", choices=["32", "224"], help="one size only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else platform.machine()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, kornia {kornia.__version__}"
    print(f"{device}, {os.cpu_count()} cores, {args.threads} threads; {versions}; {datetime.date.today()}\n")
    print("| size | policy | " + " | ".join(CONTENDERS) + " | ours / fastest rival |")
    print("|---|---|" + "---:|" * (len(CONTENDERS) + 1))
    for size, source, batch in ((32, 32, args.batch[0]), (224, 256, args.batch[1])):
        if args.only in (None, str(size)):
            images = torch.randint(0, 256, (batch, 3, source, source), dtype=torch.uint8, device=args.device)
            for blur in (False, True):
                rate = views_per_second(images, size, blur, args.rounds)
                rivals = [value for name, value in rate.items() if name[:4] not in ("ours", "floo")]
                cells = [f"{value:,.0f}" for value in rate.values()]
                policy = "crop, flip, color, gray" + (", blur" if blur else "")
                print(f"| {source} → {size} | {policy} | {' | '.join(cells)} | {rate['ours'] / max(rivals):.1f} |")


if __name__ == "__main__":
    main()
