"""Tasks: a trained model, calibration batches picked by a seed, and what is held out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import digits, stdlib, windows
from .training import trained_chargpt, trained_resnet8, trained_vit

BATCH = 64


class Case(NamedTuple):
    """A model and its data. Batches are (inputs, labels) or, without labels, inputs."""

    model: nn.Module
    calibration: list
    held_out: list
    evaluate: Callable[[nn.Module], dict[str, float]]  # on what is held out: "loss" and "accuracy"


def resnet8(samples: int = 256, seed: int = 0) -> Case:
    return _digit_case(trained_resnet8(), samples, seed)


def vit(samples: int = 256, seed: int = 0) -> Case:
    return _digit_case(trained_vit(), samples, seed)


def chargpt(samples: int = 64, seed: int = 0) -> Case:
    learned, rest = stdlib()
    calibration = windows(learned, samples, torch.Generator().manual_seed(seed))
    held_out = windows(rest, 128, torch.Generator().manual_seed(0))
    return _labelled(trained_chargpt(), calibration, held_out)


def _digit_case(model: nn.Module, samples: int, seed: int) -> Case:
    x, y, *held_out = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:samples]
    return _labelled(model, (x[order], y[order]), held_out)


def _labelled(model: nn.Module, calibration: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> Case:
    parts = [list(zip(x.split(BATCH), y.split(BATCH), strict=True)) for x, y in (calibration, held_out)]

    def evaluate(other: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            pairs = [(other(x).flatten(0, -2).double(), y.flatten()) for x, y in parts[1]]
        logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
        right = (logits.argmax(-1) == labels).double().mean()
        return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": float(right)}

    return Case(model, *parts, evaluate)
