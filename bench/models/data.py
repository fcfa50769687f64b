"""Data that comes with installed packages."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from .networks import CONTEXT


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits as 1200 to train on and 597 to test on: x, y, x, y."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return x[train], y[train], x[test], y[test]


def stdlib() -> tuple[Tensor, Tensor]:
    """The bytes of the standard library's own modules, every tenth file held out: to learn from, held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [b"".join(f.read_bytes() for i, f in enumerate(files) if (i % 10 == 9) == held) for held in (False, True)]
    learned, held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts)
    return learned, held_out


def windows(text: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pieces of a text, and each byte's next one."""
    starts = torch.randint(0, len(text) - CONTEXT, (count, 1), generator=draw)
    at = starts + torch.arange(CONTEXT)
    return text[at], text[at + 1]
