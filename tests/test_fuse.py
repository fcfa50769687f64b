"""fuse: which activations go into layers, which stay, and that everything else works on what comes out."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpqkern as mq
from mpqkern.nn.fuse import fusions


class Code(nn.Module):
    """Two layers and whatever runs on them."""

    def __init__(self, code: Callable[[Code, Tensor], Tensor], **inside: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.code = nn.Linear(16, 16), nn.Linear(16, 16), code
        self.inside: dict[str, list[Tensor]] = {"all": []}
        for name, module in inside.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def packed(model: nn.Module, **scheme: int) -> nn.Module:
    model = model.eval()
    mq.swap_(model, mq.Scheme(8, **scheme))
    return model


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
    "a weight": (lambda m, x: m.b(F.relu(m.a(x))) * m.b.weight.sum(), "relu"),
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
    "depends on a type": lambda m, x: m.b(F.relu(m.a(x))) * (2 if isinstance(x, Tensor) else 3),
    "a counter": lambda m, x: (setattr(m, "steps", getattr(m, "steps", 0) + 1), m.b(F.relu(m.a(x))))[1],
    "a cache": lambda m, x: (m.inside.setdefault("y", m.a(x)), m.b(F.relu(m.a(x))))[1],
    "a list": lambda m, x: (m.inside["all"].append(x), m.b(F.relu(m.a(x))))[1],
    "no gradients": torch.no_grad()(lambda m, x: m.b(F.relu(m.a(x)))),
}


@pytest.mark.parametrize("case", FUSED)
def test_code_that_is_fused(case: str) -> None:
    code, activation = FUSED[case]
    model, x = packed(Code(code)), torch.randn(5, 16)
    fused = mq.fuse(model, x)
    assert fusions(fused) == {"a": activation} and not fusions(model)
    torch.testing.assert_close(fused(x), model(x))
    assert mq.verify(fused, x).ok


@pytest.mark.parametrize("case", LEFT)
def test_code_that_is_left(case: str) -> None:
    model, x = packed(Code(LEFT[case])), torch.randn(5, 16)
    fused = mq.fuse(model, x)
    assert fused is model


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
    assert fusions(fused) == {"0.conv1": "relu", "1.conv1": "relu"}
    assert torch.equal(fused(x), model(x))  # in the same order, so also when results are rounded again
    assert fused[0].conv1 is model[0].conv1 and type(model[0]) is Block and isinstance(fused[0], Block)
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
    assert fusions(fused) == ({"0": name} if name else {})
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
        assert not fusions(fused) and len(seen) == 1 and model[watched] is fused[watched]


def test_hooks_of_others_activations_are_run() -> None:
    """Such modules are entered where nobody watches them."""
    mine, x, seen = type("Mine", (nn.ReLU,), {})(), torch.randn(2, 16), []
    model = packed(nn.Sequential(nn.Linear(16, 16), mine, nn.Linear(16, 4)))
    mine.register_forward_hook(lambda module, args, y: seen.append(type(y)))
    fused = mq.fuse(model, x)
    seen.clear()
    fused(x)
    assert not fusions(fused) and seen == [Tensor]


def test_hooks_of_a_module_whose_code_changes_go_on() -> None:
    x, seen = torch.randn(2, 16), []
    model = packed(nn.Sequential(Block2(nn.ReLU())))
    model[0].register_forward_hook(lambda *_: seen.append(1))
    fused = mq.fuse(model, x)
    for copied in (fused, copy.deepcopy(fused)):
        seen.clear()
        copied(x)
        assert fusions(copied) == {"0.layer": "relu"} and len(seen) == 1
    handle = fused[0].register_forward_hook(lambda *_: seen.append(2))
    model(x)
    assert seen == [1, 1]  # later ones are each model's own
    handle.remove()


class Block2(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.layer, self.activation, self.classes = nn.Linear(16, 16), activation, ["a", "b"]
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("unused", torch.zeros(2), persistent=False)
        self.plain = torch.ones(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layer((x - self.mean) * self.plain))

    def helper(self) -> list[str]:
        return self.classes


def test_a_module_keeps_all_it_has() -> None:
    model, x = packed(nn.Sequential(Block2(nn.SiLU()), nn.Linear(16, 4))), torch.randn(2, 16)
    fused = mq.fuse(model, x)
    assert isinstance(fused[0], Block2) and fused[0].helper() == ["a", "b"] and "FusedBlock2" in repr(fused)
    assert fused.state_dict().keys() == model.state_dict().keys()
    assert dict(fused.named_buffers()).keys() == dict(model.named_buffers()).keys()
    state = {name: t + 1 if name == "0.mean" else t for name, t in model.state_dict().items()}
    model.load_state_dict(state)  # tensors are the same ones, and read at each call
    torch.testing.assert_close(fused(x), model(x))
    fused[0].plain = 2 * model[0].plain
    assert not torch.allclose(fused(x), model(x))


def test_parts_of_a_sequence_are_still_called_by_themselves() -> None:
    class Walks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

        def forward(self, x: Tensor, twice: bool = True) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.layers(self.layers[0](x)) + len(self.layers[1:])

    model, x = packed(Walks()), torch.randn(3, 16)
    fused = mq.fuse(model, x)
    assert fusions(fused) == {"layers.0": "relu"}
    torch.testing.assert_close(fused(x), model(x))


def test_a_sequence_and_what_follows_it() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.act = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16))), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.inner(x))

    model, x = packed(Outside()), torch.randn(3, 16)
    fused = mq.fuse(model, x)
    assert fusions(fused) == {"inner.1.0": "relu"} and torch.equal(fused(x), model(x))


def test_contexts_that_code_sets() -> None:
    for context in (lambda: torch.autocast("cpu", enabled=False), lambda: torch.autocast("cpu", torch.bfloat16)):

        def code(m: Code, x: Tensor, context=context) -> Tensor:  # type: ignore[no-untyped-def]
            with context():
                return m.b(F.relu(m.a(x)))

        assert not fusions(mq.fuse(packed(Code(code)), torch.randn(2, 16)))


def test_nothing_of_the_model_is_touched_by_an_error() -> None:
    model = packed(Code(lambda m, x: (m.inside.setdefault("y", m.a(x)), m.b(F.relu(m.a(x))))[1]))
    x = torch.randn(2, 16)
    state = torch.get_rng_state()
    with pytest.raises(
        TypeError, match=r"batch is a tuple of 2, which the model does not take .*; wanted its arguments"
    ):
        mq.fuse(model, (x, torch.zeros(2)))
    with pytest.raises(RuntimeError):
        mq.fuse(model, x.double())
    assert model.inside == {"all": []} and not model._forward_hooks and torch.equal(torch.get_rng_state(), state)


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
    assert fusions(fused) == {"inner.0": "silu"} and type(fused) is Two
    for args in ((x,), (x, mask)):
        torch.testing.assert_close(fused(*args), model(*args))


def test_a_layer_that_is_shared() -> None:
    shared = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    model, x = packed(nn.Sequential(shared, nn.Linear(16, 16), shared)), torch.randn(2, 16)
    fused = mq.fuse(model, x)
    assert fused[0] is fused[2] and torch.equal(fused(x), model(x))


def test_lists_and_integers_come_and_go() -> None:
    code = lambda m, x: {"best": (y := m.b(F.relu(m.a(torch.cat(x))))).argmax(-1), "first": [y[0]]}  # noqa: E731
    model, x = packed(Code(code)), [torch.randn(2, 16), torch.randn(3, 16)]
    fused = mq.fuse(model, x, forward=lambda m, x: m(x))
    got, want = fused(x), model(x)
    assert fusions(fused) == {"a": "relu"} and torch.equal(got["best"], want["best"])
    torch.testing.assert_close(got["first"], want["first"])


def test_activations_that_the_code_asks_for_itself() -> None:
    model, x = (
        packed(nn.Sequential(Code(lambda m, x: m.b(F.relu(m.a(x, activation="gelu")))), nn.ReLU())),
        torch.randn(2, 16),
    )
    fused = mq.fuse(model, x)
    assert fused is model
    with pytest.raises(ValueError, match="fused already; wanted the model that fuse was given"):
        other = packed(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
        mq.fuse(mq.fuse(other, x), x)


def test_what_lies_between_and_replaced_forwards_are_left() -> None:
    x = torch.randn(2, 16)
    between = packed(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.ReLU()))
    assert mq.fuse(between, x) is between
    replaced = packed(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    replaced.forward = partial(nn.Sequential.forward, replaced)  # type: ignore[method-assign]
    fused = mq.fuse(replaced, x)
    assert fused is replaced


def test_layers_of_a_subclass_are_left() -> None:
    class Own(mq.PackedLinear):
        def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input)

    model = nn.Sequential(Own.from_float(nn.Linear(16, 16), mq.Scheme(4)), nn.ReLU()).eval()
    assert mq.fuse(model, torch.randn(2, 16)) is model


def test_parametrized_modules() -> None:
    class Twice(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2 * value

    model, x = Block2(nn.ReLU()), torch.randn(2, 16)
    model.g = nn.Parameter(torch.ones(16))
    nn.utils.parametrize.register_parametrization(model, "g", Twice())
    fused = mq.fuse(packed(model), x)
    torch.testing.assert_close(fused(x), model(x))


def test_compiled() -> None:
    model, x = packed(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))), torch.randn(2, 16)
    fused = mq.fuse(model, x)
    made = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert torch.equal(made(x), fused(x))
    with pytest.raises(ValueError, match="model is compiled; wanted it fused first"):
        mq.fuse(torch.compile(model, backend="eager"), x)


def test_copies_and_pickles() -> None:
    model, x = packed(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), act_bits=8), torch.randn(2, 16)
    fused = mq.fuse(model, x)
    want = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert fusions(other) == {"0": "relu"} and torch.equal(other(x), want)
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
    with pytest.raises(ValueError, match=r"layer '0\.0' applies 'relu'; wanted the model that fuse was given"):
        mq.unswap_(fused)
    assert isinstance(mq.unswap_(model)[0][0], nn.Linear) and isinstance(fused[0][0], mq.PackedLinear)


def test_to_onnx_and_exported(tmp_path) -> None:  # type: ignore[no-untyped-def]
    onnxruntime = pytest.importorskip("onnxruntime")
    from mpqkern.integrations.onnx import to_onnx

    x = torch.randn(2, 3, 8, 8)
    layers = nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU()
    fused = mq.fuse(packed(nn.Sequential(*layers)), x)
    assert len(fusions(fused)) == 3
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


def test_verify_sees_a_wrong_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = packed(nn.Sequential(nn.Linear(16, 16), nn.ReLU())), torch.randn(8, 16)
    fused = mq.fuse(model, x)
    assert mq.verify(fused, x).ok
    layer = fused[0]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda input, activation=None: forward(input, "relu6"))
    assert mq.verify(fused, 10 * x).ok is False
