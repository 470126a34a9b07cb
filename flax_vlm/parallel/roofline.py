"""How fast a program can be at best: what each part of a chip has to do, over what that part can do.

A step takes at least as long as the slowest of three: its products at the chip's bfloat16 peak, what moves between
memory and chip, and what chips send each other. A program that hides all else behind one of them meets its roof; good
ones get to a half or two thirds of it. Sizes and speeds are those of Google's pages and of "How to Scale Your Model"
(jax-ml.github.io/scaling-book), in bytes and seconds.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One device."""

    flops: float  # a second, bfloat16
    memory: float  # bytes
    bandwidth: float  # bytes a second, memory
    links: float  # bytes a second that it sends over all its links together


# By the beginning of `device_kind`.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1228e9, 6 * 45e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 4 * 45e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2765e9, 6 * 90e9),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1640e9, 4 * 90e9),
}


def find_chip(device_kind: str) -> Chip:
    """Raises ValueError for a device whose speed is not known here."""
    found = [kind for kind in CHIPS if device_kind.startswith(kind)]
    if not found:
        raise ValueError(f"nothing is known of the speed of {device_kind!r}: expected one of {', '.join(CHIPS)}")
    return CHIPS[max(found, key=len)]


class Roofline(NamedTuple):
    """Seconds that each part of a chip needs at least."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def binds(self) -> str:
        """The part that all else waits for."""
        return max(zip(self, self._fields, strict=True))[1]


def roofline(chip: Chip, flops: float, moved: float, sent: float) -> Roofline:
    """Of what one chip computes, moves between memory and itself, and sends to others."""
    return Roofline(flops / chip.flops, moved / chip.bandwidth, sent / chip.links)
