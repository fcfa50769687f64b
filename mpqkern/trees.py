"""Trees: whatever nest of tuples, lists and dicts modules take and return, and the tensors in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def copied(tree: Any) -> Any:
    """With tensors of its own: what a call is given, or returns, may be written to later on."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def bytes_in(tree: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors(tree))


def stored(tree: Any) -> list[Tensor]:
    """Those with a storage, which sparse ones do not have."""
    return [tensor for tensor in tensors(tree) if tensor.layout == torch.strided]
