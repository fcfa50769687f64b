"""verify: passes right kernels, catches wrong ones, changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import Scheme
from mpqkern.catalog import call


class Two(nn.Module):
    """Keywords in, a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(40, 64), nn.Linear(64, 6)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.a(x).relu() * scale
        return {"hidden": hidden, "y": self.b(hidden), "which": self.b(hidden).argmax(-1)}


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10),
    )  # fmt: skip


@pytest.mark.parametrize(
    "scheme",
    [Scheme(2, group_size=32), Scheme(4, symmetric=False), Scheme(8, act_bits=8), Scheme(2, act_bits=8)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_pass(scheme: Scheme, dtype: torch.dtype) -> None:
    model = conv_net().to(dtype).train()
    mq.swap_(model, {"*": scheme})
    result = mq.verify(model, torch.randn(4, 3, 6, 6, dtype=dtype))
    assert result.ok, str(result)
    assert [c.name for c in result.layers] == ["0", "2", "5"] and "end to end" in str(result)
    assert model.training and all(not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_batches_of_every_kind(kind: str) -> None:
    model = Two()
    mq.swap_(model, {"*": 4})
    x = torch.randn(5, 40), torch.ones(())
    assert mq.verify(model, x if kind == "tuple" else dict(zip(("x", "scale"), x, strict=True))).ok


def spoil(op: Callable[..., torch.Tensor], how: str) -> Callable[..., torch.Tensor]:
    def wrong(x: torch.Tensor, *args: object) -> torch.Tensor:
        y = op(x, *args)
        if how == "one result":
            y[..., -1] += 1e-3
        elif how == "lost column":
            y = op(torch.cat([x[..., :-1], torch.zeros_like(x[..., -1:])], -1), *args)
        elif how == "nan":
            y[0, 0] = torch.nan
        return y

    return wrong


@pytest.mark.parametrize("how", ["one result", "lost column", "nan"])
def test_wrong_kernels_fail(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    mq.swap_(model, {"*": 4})
    x = torch.randn(6, 64)
    assert mq.verify(model, x).ok
    bad = spoil(torch.ops.mpqkern.linear.default, how)
    monkeypatch.setattr(type(model[0]), "forward", lambda s, x: bad(
        x, s.qweight, s.scales, s.zeros, s.bias, s.scheme.bits, s.group_size, s.scheme.act_bits))  # fmt: skip
    result = mq.verify(model, x)
    assert not result.ok and not all(c.ok for c in result.layers) and "WRONG" in str(result)


def test_a_wrong_epilogue_is_seen_end_to_end() -> None:
    """A hook that changes the packed run only: every layer is right, the whole is not."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    mq.swap_(model, {"*": 4})
    runs = []
    model.register_forward_hook(lambda m, i, y: y + (1e-3 if not runs.append(1) and len(runs) == 1 else 0))
    result = mq.verify(model, torch.randn(6, 64))
    assert all(c.ok for c in result.layers) and not result.end_to_end.ok


def test_a_layer_that_the_batch_never_reaches_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)
    mq.swap_(model, {"*": 4})
    result = mq.verify(model, torch.randn(2, 8))
    assert result.ok and result.unreached == ("idle",) and "idle" in str(result)


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no packed layer"):
        mq.verify(nn.Linear(4, 4), torch.randn(1, 4))


def test_labels_beside_the_inputs_are_refused() -> None:
    model = conv_net()
    mq.swap_(model, {"*": 4})
    with pytest.raises(
        TypeError, match=r"batch is a tuple of 2, which the model does not take .*; wanted its arguments"
    ):
        mq.verify(model, (torch.randn(2, 3, 8, 8), torch.arange(2)))


def test_call_takes_tensors_tuples_and_dicts() -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(1, 4)
    assert torch.equal(call(model, x), call(model, (x,))) and torch.equal(call(model, x), call(model, {"input": x}))
