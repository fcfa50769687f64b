"""Modules that compute on packed weights, and the swap that puts them into a model."""

from .conv import PackedConv2d
from .fuse import fuse
from .linear import PackedLinear
from .module import PackedModule
from .swap import swap_, unswap_

__all__ = ["PackedConv2d", "PackedLinear", "PackedModule", "fuse", "swap_", "unswap_"]
