"""fuse: which activations go into layers, which stay, and that everything else works on what comes out."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpqkern as mq
from mpqkern.nn.fuse import calls


class Code(nn.Module):
    """Two layers and whatever runs on them."""

    def __init__(self, code: Callable[[Code, Tensor], Tensor], **inside: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.code = nn.Linear(16, 16), nn.Linear(16, 16), code
        for name, module in inside.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def packed(model: nn.Module, **scheme: int) -> nn.Module:
    model = model.eval()
    mq.swap_(model, mq.Scheme(8, **scheme))
    return model


def found(model: nn.Module) -> list[tuple[str, str]]:
    return [(f"{name}.{node.target}".lstrip("."), node.kwargs["activation"])
            for name, module in model.named_modules() for node in calls(module)]  # fmt: skip


FUSED = {
    "function": (lambda m, x: m.b(F.relu(m.a(x))), "relu"),
    "in place": (lambda m, x: m.b(F.relu6(m.a(x), inplace=True)), "relu6"),
    "torch.relu": (lambda m, x: m.b(torch.relu(m.a(x))), "relu"),
    "method": (lambda m, x: m.b(m.a(x).relu()), "relu"),
    "method in place": (lambda m, x: m.b(m.a(x).relu_()), "relu"),
    "silu": (lambda m, x: m.b(F.silu(m.a(x))), "silu"),
    "gelu": (lambda m, x: m.b(F.gelu(m.a(x))), "gelu"),
    "gate": (lambda m, x: F.silu(m.a(x)) * m.b(x), "silu"),
    "twice": (lambda m, x: F.relu(F.relu6(m.a(x))) + m.b(x), "relu6"),
    "by name": (lambda m, x: m.b(F.relu(input=m.a(x))), "relu"),
}
LEFT = {
    "tanh gelu": lambda m, x: m.b(F.gelu(m.a(x), approximate="tanh")),
    "read twice": lambda m, x: (y := m.a(x)) + m.b(F.relu(y)),
    "after an add": lambda m, x: F.relu(m.a(x) + m.b(x)),
    "an output": lambda m, x: (y := m.a(x), m.b(F.relu(y))),
    "on the input": lambda m, x: m.b(m.a(F.relu(x))),
    "leaky": lambda m, x: m.b(F.leaky_relu(m.a(x))),
    "depends on data": lambda m, x: m.b(F.relu(m.a(x))) if x.sum() > 0 else m.b(m.a(x)),
}


@pytest.mark.parametrize("case", FUSED)
def test_code_that_is_fused(case: str) -> None:
    code, activation = FUSED[case]
    model, x = packed(Code(code)), torch.randn(5, 16)
    fused = mq.fuse(model, x)
    assert found(fused) == [("a", activation)] and not found(model)
    torch.testing.assert_close(fused(x), model(x))
    assert mq.verify(fused, x).ok


@pytest.mark.parametrize("case", LEFT)
def test_code_that_is_left(case: str) -> None:
    model, x = packed(Code(LEFT[case])), torch.randn(5, 16)
    fused = mq.fuse(model, x)
    assert not found(fused) and type(fused) is Code
    for got, want in zip(fused(x), model(x), strict=True):
        assert torch.equal(got, want)


class Block(nn.Module):
    """As in residual networks: one ReLU for two places, of which the second reads a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += x
        return self.relu(y)


def test_a_residual_network_whose_norms_are_folded() -> None:
    x = torch.randn(3, 8, 12, 12)
    model = nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(8 * 144, 4)).eval()
    mq.fold_batchnorm_(model, x)
    mq.swap_(model, mq.Scheme(4, act_bits=8))
    fused = mq.fuse(model, x)
    assert found(fused) == [("0.conv1", "relu"), ("1.conv1", "relu")]
    assert torch.equal(fused(x), model(x))  # in the same order, so also when results are rounded again
    assert fused[0].conv1 is model[0].conv1 and type(model[0]) is Block
    assert fused.state_dict().keys() == model.state_dict().keys()
    assert mq.verify(fused, x).ok


@pytest.mark.parametrize("activation,name", [(nn.ReLU(), "relu"), (nn.ReLU6(True), "relu6"), (nn.SiLU(), "silu"),
                                             (nn.GELU(), "gelu"), (nn.GELU("tanh"), None), (nn.Tanh(), None),
                                             (type("Mine", (nn.ReLU,), {})(), "relu")])  # fmt: skip
@pytest.mark.parametrize("between", [[], [nn.Identity()], [nn.Identity(), nn.Identity()]])
def test_sequences(activation: nn.Module, name: str | None, between: list[nn.Module]) -> None:
    model = packed(nn.Sequential(nn.Conv2d(3, 8, 3), *between, activation, nn.Conv2d(8, 4, 1)))
    x = torch.randn(2, 3, 9, 9)
    fused = mq.fuse(model, x)
    assert found(fused) == ([("0", name)] if name else [])
    torch.testing.assert_close(fused(x), model(x))


def test_what_hooks_would_see_is_left() -> None:
    x = torch.randn(2, 16)
    for watched in (0, 1, 2):
        model = packed(nn.Sequential(nn.Linear(16, 16), nn.Identity(), nn.ReLU(), nn.Linear(16, 4)))
        seen: list[Tensor] = []
        model[watched].register_forward_hook(lambda module, args, y, seen=seen: seen.append(y))
        fused = mq.fuse(model, x)
        seen.clear()
        fused(x)
        assert not found(fused) and len(seen) == 1 and model[watched] is fused[watched]


def test_hooks_of_a_module_that_becomes_a_graph_go_on() -> None:
    x, seen = torch.randn(2, 16), []
    model = packed(nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.ReLU())))
    model[0].register_forward_hook(lambda *_: seen.append(1))
    fused = mq.fuse(model, x)
    seen.clear()
    fused(x)
    assert found(fused) == [("0.0", "relu")] and seen == [1]


def test_modules_of_several_inputs_are_left_and_those_inside_are_not() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.layer = nn.Sequential(nn.Linear(16, 16), nn.SiLU()), nn.Linear(16, 16)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = F.relu(self.layer(self.inner(x)))
            return y if mask is None else y * mask

    x, mask = torch.randn(4, 16), torch.rand(4, 16)
    model = packed(Two())
    fused = mq.fuse(model, (x, mask))
    assert found(fused) == [("inner.0", "silu")] and type(fused) is Two
    for args in ((x,), (x, mask)):
        torch.testing.assert_close(fused(*args), model(*args))


def test_a_layer_that_is_shared() -> None:
    shared = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    model, x = packed(nn.Sequential(shared, nn.Linear(16, 16), shared)), torch.randn(2, 16)
    fused = mq.fuse(model, x)
    assert fused[0] is fused[2] and torch.equal(fused(x), model(x))


def test_code_that_traces_to_something_else_is_found_out() -> None:
    code = lambda m, x: m.b(F.relu(m.a(x))) * (2 if isinstance(x, Tensor) else 3)  # noqa: E731
    model = packed(Code(code))
    with pytest.raises(ValueError, match="depends on more than its inputs"):
        mq.fuse(model, torch.randn(2, 16))
    assert not found(model)


def test_copies_and_pickles() -> None:
    model, x = packed(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), act_bits=8), torch.randn(2, 16)
    fused = mq.fuse(model, x)
    want = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert found(other) == [("0", "relu")] and torch.equal(other(x), want)
    half = copy.deepcopy(fused).half()
    assert half(x.half()).dtype == torch.float16
    assert torch.equal(fused(x), want)


def test_saved_and_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    make = lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()  # noqa: E731
    model, x = packed(make()), torch.randn(2, 16)
    mq.save(model, tmp_path / "model.safetensors")
    other = mq.load(make, tmp_path / "model.safetensors").eval()
    assert torch.equal(mq.fuse(other, x)(x), mq.fuse(model, x)(x))


def test_unswap_wants_the_model_that_was_fused() -> None:
    model, x = packed(nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))), torch.randn(2, 16)
    fused = mq.fuse(model, x)
    with pytest.raises(ValueError, match=r"layer '0\.0' applies an activation; wanted the model that fuse was given"):
        mq.unswap_(fused)
    assert isinstance(mq.unswap_(model)[0][0], nn.Linear) and isinstance(fused[0].get_submodule("0"), mq.PackedLinear)


def test_to_onnx_and_exported(tmp_path) -> None:  # type: ignore[no-untyped-def]
    onnxruntime = pytest.importorskip("onnxruntime")
    from mpqkern.integrations.onnx import to_onnx

    x = torch.randn(2, 3, 8, 8)
    layers = nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU()
    fused = mq.fuse(packed(nn.Sequential(*layers)), x)
    assert len(found(fused)) == 3
    assert torch.equal(torch.export.export(fused, (x,)).module()(x), fused(x))
    for standard in (False, True):
        to_onnx(fused, (x,), tmp_path / "model.onnx", standard=standard)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), fused(x), rtol=1e-3, atol=1e-3)


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"model=str; wanted a torch\.nn\.Module"):
        mq.fuse("model", torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no packed layer"):
        mq.fuse(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.ones(1, 4))
    model = packed(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(ValueError, match=r"training mode; wanted model.eval\(\)"):
        mq.fuse(model.train(), torch.ones(1, 4))
    with pytest.raises(ValueError, match="holds no float tensor"):
        mq.fuse(model.eval(), torch.ones(1, 4), forward=lambda m, x: m(x) > 0)


def test_verify_sees_a_wrong_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = packed(nn.Sequential(nn.Linear(16, 16), nn.ReLU())), torch.randn(8, 16)
    fused = mq.fuse(model, x)
    assert mq.verify(fused, x).ok
    layer = fused.get_submodule("0")
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda input, activation=None: forward(input, "relu6"))
    assert mq.verify(fused, 10 * x).ok is False
