"""Small networks for tests: every kind of wiring that a measurement has to get along with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions around a shortcut; writes in place and calls functions between its modules."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(cout)
        self.act = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if cin == cout and stride == 1 else nn.Conv2d(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.act(y)


def resnet(width: int = 6, classes: int = 5, seed: int = 0) -> nn.Module:
    """For images [N, 3, 8, 8]; statistics of its norms are those of some data."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1),
        nn.ReLU(inplace=True),
        Residual(width, width),
        Residual(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )
    with torch.no_grad():
        model.train()
        for _ in range(3):
            model(torch.randn(32, 3, 8, 8))
    return model.eval()


class Functional(nn.Module):
    """Everything between the layers is functional, one layer runs twice and one not at all."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(8, 16)
        self.twice = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.first(x))
        y = y + torch.tanh(self.twice(y))
        y = y + torch.tanh(self.twice(y))
        return self.last(y / y.shape[-1])


class Reused(nn.Module):
    """A block of two layers that runs twice, with a layer in between and one after; a branch that adds nothing."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.between, self.branch, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        nn.init.zeros_(self.branch.weight)
        nn.init.zeros_(self.branch.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.between(self.block(x)))
        return self.last(x + self.branch(x))


class Tied(nn.Module):
    """Two layers that hold the same weight."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.middle, self.b = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.middle(torch.relu(self.a(x)))))


def transformer(seed: int = 0) -> nn.Module:
    """For [N, T, 8]; in eval mode torch would not call its inner layers."""
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(
        nn.Linear(8, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 4)
    ).eval()


class Keywords(nn.Module):
    """Called with keywords, answers with a dictionary, and a module of its hands on more than a tensor."""

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 12)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, int]:
            positions = torch.linspace(0, 1, ids.shape[1]).unsqueeze(0)  # one row for all samples
            return self.table(ids), positions, ids.shape[1]

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mix, self.head = self.Embed(), nn.Linear(12, 12), nn.Linear(12, 20)

    def forward(self, *, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x, positions, _ = self.embed(ids)
        x = x + positions.unsqueeze(-1)
        x = torch.relu(self.mix(x)) * mask.unsqueeze(-1) + positions.unsqueeze(-1)
        return {"logits": self.head(x)}
