"""Small real models with real data that need no download: used by the demo and by benchmarks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CACHE = Path(__file__).resolve().parent.parent / "build" / "models"


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, CIFAR variant)."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(cout)
        self.shortcut = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.shortcut(x)).relu()


class ResNet8(nn.Module):
    """A residual network for 8x8 grey digits: 10 layers that can be packed."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.norm(self.stem(x)).relu()).mean((2, 3)))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits as 1200 to train on and 597 to test on: x, y, x, y."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return x[train], y[train], x[test], y[test]


def trained_resnet8(width: int = 32, epochs: int = 12, seed: int = 0, smoothing: float = 0.1) -> ResNet8:
    """Trained once (about half a minute on one core), then read back from build/models."""
    other = f"-seed{seed}-smoothing{smoothing}" if (seed, smoothing) != (0, 0.1) else ""
    path = CACHE / f"resnet8-{width}-{epochs}{other}-torch{torch.__version__}.pt"
    torch.manual_seed(seed)
    model = ResNet8(width)
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    x, y, _, _ = digits()
    steps = epochs * (len(y) // 60)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(60):
            # a shift by up to one pixel is the only augmentation
            dx, dy = torch.randint(-1, 2, (2,)).tolist()
            images = torch.roll(x[batch], (dy, dx), (2, 3))
            loss = F.cross_entropy(model(images), y[batch], label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()
