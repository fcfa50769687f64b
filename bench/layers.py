"""The convolutions of three well-known networks at 224 x 224, as data: every distinct one, and how often it occurs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Layer(NamedTuple):
    """A square convolution, padded by half its kernel; `size` is its input's height and width."""

    cin: int
    cout: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def depthwise(self) -> bool:
        return self.groups > 1

    def __str__(self) -> str:
        channels = f"{self.cin} dw" if self.depthwise else f"{self.cin}>{self.cout}"
        return f"{channels} {self.size}x{self.size} k{self.kernel}" + (f" s{self.stride}" if self.stride > 1 else "")


# Stages of inverted residual blocks: expansion, kernel, stride of the first block, channels, blocks.
MOBILENET_V2 = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 3, 2, 32, 3), (6, 3, 2, 64, 4), (6, 3, 1, 96, 3),
                (6, 3, 2, 160, 3), (6, 3, 1, 320, 1))  # fmt: skip
EFFICIENTNET_LITE0 = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3),
                      (6, 5, 2, 192, 4), (6, 3, 1, 320, 1))  # fmt: skip


def inverted_residuals(stages: Iterable[tuple[int, int, int, int, int]]) -> Iterator[Layer]:
    """Sandler et al. 2018 (arXiv 1801.04381): expand by 1x1, filter each channel, project by 1x1."""
    yield Layer(3, 32, 224, stride=2)
    cin, size = 32, 112
    for expansion, kernel, first_stride, cout, blocks in stages:
        for block in range(blocks):
            wide, stride = cin * expansion, 1 if block else first_stride
            if expansion > 1:
                yield Layer(cin, wide, size, 1)
            yield Layer(wide, wide, size, kernel, stride, wide)
            size //= stride
            yield Layer(wide, cout, size, 1)
            cin = cout
    yield Layer(cin, 1280, size, 1)


def resnet18() -> Iterator[Layer]:
    """He et al. 2015 (arXiv 1512.03385), two blocks of two convolutions a stage."""
    yield Layer(3, 64, 224, 7, 2)
    cin, size = 64, 56
    for cout in (64, 128, 256, 512):
        stride = cout // cin
        yield Layer(cin, cout, size, stride=stride)
        if stride > 1:
            yield Layer(cin, cout, size, 1, stride)
        size //= stride
        yield from (Layer(cout, cout, size) for _ in range(3))
        cin = cout


NETWORKS: dict[str, Counter[Layer]] = {
    "resnet18": Counter(resnet18()),
    "mobilenet_v2": Counter(inverted_residuals(MOBILENET_V2)),
    "efficientnet_lite0": Counter(inverted_residuals(EFFICIENTNET_LITE0)),
}
