"""Counter-based random numbers: a hash of (seed, epoch, sample index, view, stream), not a generator with a state."""

import hashlib

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def uniform(
    index: Int64[Tensor, " B"], *, seed: int, epoch: int, view: int, stream: str | int, n: int
) -> Float[Tensor, "B n"]:
    """Random numbers that depend on the arguments alone: no state, the same on every device.

    The counter ``index * odd + number * odd`` starts at a 64-bit hash of (seed, epoch, view, stream) and goes through
    the finaliser of SplitMix64.

    Args:
        index: sample indices, int64 (B,).
        seed: seed of the run.
        epoch: epoch.
        view: number of the view.
        stream: what the numbers are for: the name of an operation.
        n: how many numbers for each sample.

    Returns:
        float32 (B, n), uniform in [0, 1) with 24 random bits.

    References:
        Steele, Lea & Flood, *Fast splittable pseudorandom number generators*, 2014; Stafford's mix 13.

    Example:
        >>> both = uniform(torch.tensor([7, 8]), seed=0, epoch=3, view=1, stream="crop", n=2)
        >>> one = uniform(torch.tensor([8]), seed=0, epoch=3, view=1, stream="crop", n=2)
        >>> torch.equal(both[1:], one)
        True
    """
    counter = torch.arange(n, device=index.device) * PER_NUMBER + stream_key(seed, epoch, view, stream)
    return hashed(index[:, None] * PER_SAMPLE + counter)


PER_SAMPLE, PER_NUMBER = -0x61C8864680B583EB, -0x3B314601E57A13AD


def stream_key(seed: int, epoch: int, view: int, stream: str | int) -> int:
    """Where the counter of these numbers starts: 64 bits, signed."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{view}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def hashed(bits: Int64[Tensor, "B n"]) -> Float[Tensor, "B n"]:
    """Counters -> uniform numbers."""
    # int64 multiplication wraps around; a right shift copies the sign, which the mask takes away again.
    bits = (bits ^ (bits >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    bits = (bits ^ (bits >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    bits = bits ^ (bits >> 31 & 0x1FFFFFFFF)
    return (bits >> 40 & 0xFFFFFF).float() * 2.0**-24
