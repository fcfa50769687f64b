"""Trained networks: on one thread, once, and then read back from build/models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import digits, stdlib, windows
from .networks import CharGPT, ResNet8, ViT

CACHE = Path(__file__).resolve().parents[2] / "build" / "models"


def trained(name: str, make: Callable[[], nn.Module], train: Callable[[nn.Module], None], seed: int = 0) -> nn.Module:
    """`make()` after `train`, or as an earlier call left it."""
    path = CACHE / f"{name}-torch{torch.__version__}.pt"
    torch.manual_seed(seed)
    model = make()
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that sums have one order
    train(model.train())
    torch.set_num_threads(threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def trained_resnet8(width: int = 32, epochs: int = 12, seed: int = 0, smoothing: float = 0.1) -> ResNet8:
    """About half a minute on one core."""

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        _train_on_digits(model, optimizer, 0.1, epochs, smoothing)

    other = f"-seed{seed}-smoothing{smoothing}" if (seed, smoothing) != (0, 0.1) else ""
    return trained(f"resnet8-{width}-{epochs}{other}", lambda: ResNet8(width), train, seed)


def trained_vit(epochs: int = 60) -> ViT:
    """About a minute on one core."""

    def train(model: nn.Module) -> None:
        _train_on_digits(model, torch.optim.AdamW(model.parameters(), weight_decay=0.05), 3e-3, epochs)

    return trained(f"vit-{epochs}", ViT, train)


def trained_chargpt(steps: int = 600) -> CharGPT:
    """About a minute on one core; the text is Python's own library."""

    def train(model: nn.Module) -> None:
        text, draw = stdlib()[0], torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            x, y = windows(text, 16, draw)
            _step(F.cross_entropy(model(x).flatten(0, 1), y.flatten()), optimizer, schedule)

    return trained(f"chargpt-{steps}", CharGPT, train)


def _train_on_digits(
    model: nn.Module, optimizer: torch.optim.Optimizer, rate: float, epochs: int, smoothing: float = 0.1
) -> None:
    x, y, _, _ = digits()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * (len(y) // 60))
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(60):
            # a shift by up to one pixel is the only augmentation
            dx, dy = torch.randint(-1, 2, (2,)).tolist()
            images = torch.roll(x[batch], (dy, dx), (2, 3))
            _step(F.cross_entropy(model(images), y[batch], label_smoothing=smoothing), optimizer, schedule)


def _step(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
