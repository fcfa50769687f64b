"""For tests of rewrites: what a model is made of, to the bit, and a forward that stops in the middle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def bits(model: nn.Module) -> list:
    """Which modules, tensors and hooks it holds, and every bit of them."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    modules = list(model.named_modules(remove_duplicate=False))
    return [
        [(name, id(module), module.training) for name, module in modules],
        [[list(module._forward_hooks), list(module._forward_pre_hooks)] for _, module in modules],
        [list(module._parameters) for _, module in modules],
        [(name, id(t), t.data_ptr(), t.requires_grad, t.detach().flatten().tolist()) for name, t in tensors],
        torch.is_grad_enabled(),
    ]


def stopping(at: int, error: type[BaseException]) -> Callable[[nn.Module, Any], Any]:
    """A forward whose call number `at` ends in an error."""
    calls = iter(range(1, 1000))

    def forward(model: nn.Module, batch: Any) -> Any:
        output = model(batch)
        if next(calls) == at:
            raise error("stopped")
        return output

    return forward


def distance(a: Any, b: Any) -> float:
    """Largest difference relative to the largest value; through dictionaries."""
    if isinstance(a, dict):
        return max(distance(a[k], b[k]) for k in a)
    return float((a - b).detach().abs().max() / a.detach().abs().max())


class Around(nn.Module):
    """Two layers with something in between that no operation shows: a round trip through numpy."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        hidden = torch.from_numpy(y.detach().numpy() ** 2)
        return self.second(y) + hidden.mean()
