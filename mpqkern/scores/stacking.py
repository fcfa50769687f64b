"""What modules take and return, of several states stacked along the batch axis: any nest of tensors and constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CONSTANTS = (int, float, str, bool, type(None))


def repeated(batch: Any, size: int, n: int) -> Any:
    def repeat(leaf: Any) -> Any:
        if n == 1 or not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != size:
            return leaf
        return leaf.repeat(n, *[1] * (leaf.dim() - 1))

    return tree_map(repeat, batch)


def joined(values: Sequence[Any]) -> Any:
    if len(values) == 1:
        return values[0]
    leaves = [tree_flatten(value)[0] for value in values]
    joined = [torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*leaves, strict=True)]
    return tree_unflatten(joined, tree_flatten(values[0])[1])


def split(value: Any, size: int, n: int) -> list[Any]:
    """The parts of n states; tensors without a batch axis go to all of them."""
    if n == 1:
        return [value]

    def part(i: int) -> Callable[[Any], Any]:
        def take(leaf: Any) -> Any:
            stacked = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size * n
            return leaf[i * size : (i + 1) * size] if stacked else leaf

        return take

    return [tree_map(part(i), value) for i in range(n)]


def can_stack(value: Any, size: int) -> bool:
    """Whether all that is in it has a batch axis or is a plain constant."""
    return all(
        leaf.dim() > 0 and leaf.shape[0] == size if isinstance(leaf, Tensor) else isinstance(leaf, CONSTANTS)
        for leaf in tree_flatten(value)[0]
    )


def close(a: Any, b: Any) -> bool:
    """Whether two outputs differ by no more than the order of sums in kernels explains."""
    for x, y in zip(tree_flatten(a)[0], tree_flatten(b)[0], strict=True):
        if isinstance(x, Tensor) and x.is_floating_point():
            slack = 64 * torch.finfo(x.dtype).eps * float(y.detach().nan_to_num(0, 0, 0).abs().max())
            if not torch.allclose(x, y, rtol=0, atol=slack, equal_nan=True):
                return False
    return True


def equal(a: Any, b: Any) -> bool:
    """To the bit; objects that may hold anything are never equal."""
    left, right = tree_flatten(a)[0], tree_flatten(b)[0]
    return len(left) == len(right) and all(
        torch.equal(x.nan_to_num(), y.nan_to_num()) and torch.equal(x.isnan(), y.isnan())
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else isinstance(x, CONSTANTS) and isinstance(y, CONSTANTS) and x == y
        for x, y in zip(left, right, strict=True)
    )
