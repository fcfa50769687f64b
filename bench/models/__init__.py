"""Small real models with real data that need no download: used by the demo and by benchmarks.

`CASES[name](samples, seed)` is one of them as a task: `samples` calibration samples, picked by `seed`, and held-out
ones.
"""

from __future__ import annotations

from collections.abc import Callable

from .cases import Case, chargpt, resnet8, vit
from .data import digits
from .networks import ResNet8
from .photographs import efficientnet
from .training import trained_resnet8

CASES: dict[str, Callable[..., Case]] = {
    "resnet8": resnet8, "vit": vit, "chargpt": chargpt, "efficientnet": efficientnet,
}  # fmt: skip

__all__ = ["CASES", "Case", "ResNet8", "digits", "trained_resnet8"]
