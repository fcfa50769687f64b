"""DAQ's quantizer of activations (Hong et al. 2020, arXiv 2012.11230) as a readable reference.

Each channel of each sample is rounded around its own mean, with the step that is best for a normal distribution of
its own standard deviation, measured as it comes: nothing is calibrated and nothing learned. A scale a channel cannot
leave the sum of an integer product, so no kernel computes with this; `calibrate_activations_(observer="gauss")` is
what of it does: one fixed scale, for a layer or a group of a weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measuring.observers import STEPS
from ..numbers import check_flag, check_number
from ..scheme import BLOCK


def gauss_quantize(
    x: Tensor, bits: int, *, granularity: str = "channel", wide: bool = True, std_bits: int | None = None
) -> Tensor:
    """Activations [batch, channels, height, width] rounded to 2^bits levels, as floats.

    granularity  "channel", or "group": 32 channels share their mean and deviation
    wide         the step of one bit less: real activations have heavier tails than the normal distribution that the
                 steps are made for, and more is lost by clipping them than by coarser steps
    std_bits     rounds the deviations of each sample too, around their mean over its channels

    Activations whose least value is exactly 0 come from a ReLU: deviations are then those of the positive values, and
    the levels 0, 1, ... 2^bits - 1 steps.

    >>> gauss_quantize(torch.tensor([-1.0, -0.5, 0.5, 1.0]).view(1, 1, 2, 2), 3).flatten()
    tensor([-1.1811, -0.3937,  0.3937,  1.1811])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x={x!r}; wanted a tensor")
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; wanted floats [batch, channels, height, width]")
    if granularity not in ("channel", "group"):
        raise ValueError(f"granularity={granularity!r}; wanted 'channel' or 'group'")
    check_flag("wide", wide)
    for name, value, optional in (("bits", bits, False), ("std_bits", std_bits, True)):
        wanted = f"a whole number from {1 + wide} to {8 + wide} with wide={wide}"
        check_number(name, value, wanted, lambda v: v - wide in STEPS, whole=True, optional=optional)
    if not x.numel():
        return x
    channels = 1 if granularity == "channel" else BLOCK
    # [batch, groups, values]; the last group's filling counts for nothing
    values = F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % channels)).unflatten(1, (-1, channels)).flatten(2)
    real = torch.ones_like(x, dtype=torch.bool)
    real = F.pad(real, (0, 0, 0, 0, 0, -x.shape[1] % channels)).unflatten(1, (-1, channels)).flatten(2)
    rectified = bool(x.min() == 0)
    mean, std = _moments(values, real & (values > 0) if rectified else real)
    if std_bits is not None:
        around, spread = _moments(std.transpose(1, 2), torch.ones_like(std, dtype=torch.bool).transpose(1, 2))
        lowest = torch.where(std > 0, std, torch.inf).amin(1, keepdim=True)  # no deviation is rounded to nothing
        rounded = _mid_rise(std - around, STEPS[std_bits - wide] * spread, std_bits) + around
        std = torch.where(std > 0, rounded.maximum(lowest), 0)
    step = STEPS[bits - wide] * std
    if rectified:
        back = torch.where(step > 0, (values / step).round().clamp(0, 2**bits - 1) * step, values)
    else:
        back = _mid_rise(values - mean, step, bits) + mean
    return back.unflatten(2, (channels, -1)).flatten(1, 2)[:, : x.shape[1]].reshape(x.shape).to(x.dtype)


def _moments(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the last dimension of what is counted; 0 where there is nothing."""
    count = counted.sum(-1, keepdim=True).clamp(min=1)
    mean = (values * counted).sum(-1, keepdim=True) / count
    return mean, (((values - mean) * counted).square().sum(-1, keepdim=True) / count).sqrt()


def _mid_rise(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """The nearest of 2^bits odd multiples of half a step; 0 where the step is 0."""
    top = 2 ** (bits - 1) - 0.5
    return torch.where(step > 0, ((x / step).floor() + 0.5).clamp(-top, top) * step, 0)
