"""Small networks with three batches each, of the kinds that scoring has to cope with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """A transformer block in small: LayerNorms, GELU, no BatchNorm; takes keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


def mlp() -> tuple[nn.Module, list]:
    layers = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)]
    return nn.Sequential(*layers), [torch.randn(8, 6) for _ in range(3)]


def convnet() -> tuple[nn.Module, list]:
    body = [layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())]
    stem = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return model, [(torch.randn(8, 1, 6, 6) + 0.5, torch.randint(3, (8,))) for _ in range(3)]


def transformer() -> tuple[nn.Module, list]:
    tokens = [torch.randint(11, (4, 5)) for _ in range(3)]
    return Attention(), [{"tokens": t, "labels": t.roll(-1, 1)} for t in tokens]
