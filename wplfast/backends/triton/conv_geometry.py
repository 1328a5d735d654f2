"""How a convolution's Fisher is cut up for the kernels: boxes of positions in three dimensions, blocks of groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from .split import OCTET

#: Groups narrower than this share one tile, whose blocks beside the diagonal are then dropped.
PACKED_WIDTH = 64


@dataclass(frozen=True)
class Geometry:
    """A convolution over 3 spatial dimensions, outermost first; ``images`` of one sample are summed."""

    images: int
    size: tuple[int, ...]
    positions: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def taps(self) -> int:
        """Return the number of filter taps."""
        return prod(self.kernel)

    @property
    def n_steps(self) -> int:
        """Return how many terms a sample's gradient sums."""
        return self.images * prod(self.positions)

    @property
    def pointwise(self) -> bool:
        """Tell whether position l sees input l and nothing else: a linear layer."""
        plain = set(self.kernel) == set(self.stride) == {1} and set(self.padding) == {0}
        return plain and self.size == self.positions

    def sizes(self) -> tuple[int, ...]:
        """Return the numbers in the order in which kernels take them."""
        return (
            self.images, *self.positions, *self.size, *self.kernel[1:], *self.stride, *self.padding, *self.dilation
        )  # fmt: skip


#: Names of :meth:`Geometry.sizes` in the kernels' signatures.
SIZES = (
    "images", "l0", "l1", "l2", "s0", "s1", "s2", "k1", "k2",
    "stride0", "stride1", "stride2", "pad0", "pad1", "pad2", "dilation0", "dilation1", "dilation2",
)  # fmt: skip


def geometry(
    inputs: Tensor,
    grad_outputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Geometry:
    """Return the geometry with 3 spatial dimensions; where there are fewer, a sample's images become one of them."""
    images = inputs.shape[1]
    size, positions = tuple(inputs.shape[2:-1]), tuple(grad_outputs.shape[2:-1])
    missing = 3 - len(size)
    if missing:
        size, positions, images = (images, *size), (images, *positions), 1
    ones = (1,) * (missing - 1)

    def filled(values: Sequence[int], neutral: int) -> tuple[int, ...]:
        return (neutral,) * missing + tuple(values)

    return Geometry(
        images, ones + size, ones + positions, filled(kernel, 1), filled(stride, 1), filled(padding, 0),
        filled(dilation, 1),
    )  # fmt: skip


def choose_box(positions: Sequence[int], steps: int) -> tuple[int, int]:
    """Return height and width, ``steps`` positions together, of the box that covers the inner plane in fewest steps."""
    widths = [1 << power for power in range(steps.bit_length())]

    def boxes(width: int) -> int:
        return -(-positions[1] * width // steps) * -(-positions[2] // width)

    width = min(widths, key=lambda width: (boxes(width), -width))
    return steps // width, width


@dataclass(frozen=True)
class Blocks:
    """How channels lie in the operands: groups at pitches, ``groups`` of them for each block of the Fisher."""

    groups: int
    out_pitch: int
    in_pitch: int


def choose_blocks(groups: int, group_out: int, group_in: int) -> Blocks:
    """Return blocks whose columns start on 16-byte boundaries; padded pitches only where nothing else does that.

    Wide groups are blocks of their own. Narrow ones share a tile: the products between different groups are wasted,
    but tiles are loaded in full rows, and tensor cores have no smaller tile that would save much.
    """
    most = min(groups, max(1, PACKED_WIDTH // max(group_out, group_in)))
    if groups * group_out % OCTET == 0 and groups * group_in % OCTET == 0:
        for packed in range(most, 0, -1):
            if packed * group_out % OCTET == 0 and packed * group_in % OCTET == 0:
                return Blocks(packed, group_out, group_in)
    group_out, group_in = -(-group_out // OCTET) * OCTET, -(-group_in // OCTET) * OCTET
    return Blocks(min(groups, max(1, PACKED_WIDTH // max(group_out, group_in))), group_out, group_in)
