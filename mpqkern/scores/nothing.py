"""Nothing: stands for a tensor that nobody needs, so that what is done to it costs nothing.

A model's own code goes on around modules that are skipped; it may move, add or activate what they would have returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CONTENTS = (
    "__get__",
    "__bool__",
    "__len__",
    "__iter__",
    "__float__",
    "__int__",
    "__index__",
    "item",
    "tolist",
    "numpy",
)
ASKED = (
    Tensor.shape.__get__,
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.ndim.__get__,
    Tensor.size,
    Tensor.dim,
)


class Shape:
    """Of a tensor: all but its contents."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tuple(tensor.shape), tensor.dtype, tensor.device


class Watch(TorchFunctionMode):
    """Context: `looked` tells whether the code inside has read numbers out of a tensor, as decisions by data do."""

    looked = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.looked |= name in CONTENTS and name not in ("__get__", "__len__", "__iter__")
        return func(*args, **(kwargs or {}))


class Nothing(Tensor):
    """A tensor without contents: whatever is computed from it is nothing too, and has not even a shape."""

    @staticmethod
    def __new__(cls, shape: Sequence[int] | None = None, like: Shape | None = None) -> Nothing:
        if shape is None:
            return Tensor._make_wrapper_subclass(cls, (0,))
        return Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, shape: Sequence[int] | None = None, like: Shape | None = None) -> None:
        self.has_shape = shape is not None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in ASKED:
            if not args[0].has_shape:
                raise RuntimeError("nothing has no shape")
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in CONTENTS:
            raise RuntimeError("nothing has no contents")
        return cls()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        raise RuntimeError("nothing has no contents")
