"""nn.Linear on a packed weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from .. import plain
from ..scheme import Scheme
from .module import PackedModule


class PackedLinear(PackedModule):
    """`nn.Linear` whose weight stays packed: 2, 4 or 8 bits wherever it is stored.

    >>> layer = PackedLinear.from_float(torch.nn.Linear(64, 10), Scheme(4))
    >>> layer
    PackedLinear(in_features=64, out_features=10, bias=True, bits=4, group_size=None, symmetric=True)
    >>> layer(torch.randn(2, 64)).shape, layer.packed_bytes()
    (torch.Size([2, 10]), 342)
    """

    _fragments_op = "linear_fragments"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(scheme, (out_features, in_features), bias=bias, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def empty_like(cls, layer: nn.Linear, scheme: Scheme) -> PackedLinear:
        return cls(
            layer.in_features,
            layer.out_features,
            scheme,
            bias=layer.bias is not None,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )

    def empty_float(self) -> nn.Linear:
        return nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.qweight.device,
            dtype=self.dtype,
        )

    def forward(self, input: Tensor, activation: str | None = None) -> Tensor:
        return packed_linear(input, *self.arguments(), self._fragments_for(input), activation)

    def arguments(self) -> tuple[Any, ...]:
        """What `packed_linear` takes between the input and the fragments."""
        weight, bias, act_scale = self._held()
        return weight, bias, (self.scheme.bits, self.group_size, self.scheme.act_bits, act_scale), self.in_features

    def rounded_input(self, x: Tensor) -> Tensor:
        return plain.rounded_rows(x, self.group_size, self.act_scale)

    @property
    def act_groups(self) -> int:
        return self.scheme.groups(self.k)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self._scheme_repr()}"


@torch.fx.wrap  # symbolic tracing keeps the call whole
def packed_linear(
    input: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    how: tuple[int, int, int | None, Tensor | None],
    in_features: int,
    fragments: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The op behind a check that it cannot make itself: it sees only the padded width."""
    if input.dim() == 0 or input.shape[-1] != in_features:
        raise ValueError(f"input is {list(input.shape)}; wanted [..., in_features={in_features}]")
    if activation is not None:
        plain.check_activation("linear_activated", activation)
        return torch.ops.mpqkern.linear_activated(input, *weight, bias, *how, fragments, activation)
    if fragments is not None:
        return torch.ops.mpqkern.linear_fragments(input, *weight, bias, *how, fragments)
    return torch.ops.mpqkern.linear(input, *weight, bias, *how)
