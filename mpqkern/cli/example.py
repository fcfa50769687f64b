"""A network and data as small as can be, for the examples of the help pages."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def net() -> nn.Module:
    """For images [N, 3, 8, 8], with weights drawn at random."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def batches() -> list[Tensor]:
    """Two of 16 images. Without labels the loss is the divergence from the float model."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(2, 16, 3, 8, 8, generator=generator))
