"""Results of so many bytes that with AVX-512 they go to memory past the caches, and elsewhere memory is asked for
early: the same bits as those of few rows or one sample."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .test_conv import problem

# channels in, out, groups, kernel, stride, padding, dilation, height, width; samples that together have 4 MiB of
# results. Planes of 64 x 62 pixels are whole lines, those of 63 x 63 are not.
CASES = {
    "a panel of half its columns": (3, (16, 112, 1, (1, 1), (1, 1), (0, 0), (1, 1), 64, 62)),
    "pixels that are no whole lines": (3, (16, 100, 1, (1, 1), (1, 1), (0, 0), (1, 1), 64, 62)),
    "rows that begin anywhere": (3, (16, 96, 1, (3, 3), (1, 1), (1, 1), (1, 1), 64, 62)),
    "planes that are no whole lines": (3, (4, 96, 1, (3, 3), (2, 1), (1, 1), (1, 1), 125, 63)),
    "groups that begin within a line": (4, (4, 80, 2, (1, 1), (1, 1), (0, 0), (1, 1), 64, 62)),
    "depthwise, more than eight blocks": (2, (144, 144, 144, (3, 3), (1, 1), (1, 1), (1, 1), 64, 62)),
    "depthwise, bands that begin anywhere": (2, (96, 96, 96, (3, 3), (1, 1), (1, 1), (1, 1), 152, 62)),
    "depthwise, some channels more than blocks": (7, (40, 40, 40, (3, 3), (1, 1), (1, 1), (1, 1), 64, 62)),
    "depthwise, every other pixel": (3, (96, 96, 96, (5, 5), (2, 2), (2, 2), (1, 1), 125, 127)),
}


@pytest.fixture(autouse=True)
def compiled(path: SimpleNamespace) -> None:
    if path.name == "plain":
        pytest.skip("torch's own products may depend on how many rows there are")


def again(op: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """Into memory that has been written to before: fresh pages are left to the caches."""
    for _ in range(2):
        op(*args)
    return op(*args)


@pytest.mark.parametrize(
    "activation,symmetric,threads", [("relu6", True, 1), ("relu6", True, 3), ("relu6", False, 3), ("silu", True, 3)]
)
@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("case", CASES)
def test_samples_together_give_the_bits_of_each(
    path: SimpleNamespace, case: str, act_bits: int | None, activation: str, symmetric: bool, threads: int
) -> None:
    samples, shape = CASES[case]
    weight, _, _ = problem(path, shape, 4, 0, symmetric)
    x, bias = torch.randn(samples, shape[0], *shape[7:]), torch.randn(shape[1])

    def conv(x: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor([0.02]) if act_bits else None
        args = (4, 0, shape[3], *shape[4:7], shape[2], act_bits, scale, None, activation)
        return path.conv2d_activated(x, *weight, bias, *args)

    torch.set_num_threads(threads)
    for order in (torch.contiguous_format, torch.channels_last):
        each = [conv(sample.contiguous(memory_format=order)) for sample in x.split(1)]
        assert torch.equal(again(conv, x.contiguous(memory_format=order)), torch.cat(each))


@pytest.mark.sanitize
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("n", [1040, 1033])
def test_rows_together_give_the_bits_of_each(path: SimpleNamespace, n: int, activation: str, threads: int) -> None:
    torch.set_num_threads(threads)
    q, scales, zeros, _ = path.quantize(torch.randn(n, 512), 4, 128, True)
    x, args = torch.randn(64, 512), (q, scales, zeros, torch.randn(n), 4, 128, 8, None, None, activation)
    parts = [path.linear_activated(part, *args) for part in x.split(16)]
    assert torch.equal(again(path.linear_activated, x, *args), torch.cat(parts))
