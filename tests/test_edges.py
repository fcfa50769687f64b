"""Corners that once went wrong: each test is a small story of somebody's model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import PackedLinear, Scheme
from mpqkern.checkpoint import FileError


def test_a_transformer_encoder_with_a_padding_mask() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 5, 32), torch.tensor([[0] * 5, [0, 0, 0, 1, 1]], dtype=torch.bool)
    before = model.use_nested_tensor
    with torch.no_grad():
        want = model(x, src_key_padding_mask=mask)
        mq.swap_(model, {"layers.1.*": 8}, keep_float=True)
        got = model(x, src_key_padding_mask=mask)
    kept = ~mask[:, : want.shape[1]]
    assert torch.allclose(got[:, : want.shape[1]][kept], want[kept], atol=0.05)
    mq.unswap_(model)
    assert model.use_nested_tensor == before


def test_backward_hooks_still_fire() -> None:
    model, seen = nn.Sequential(nn.Linear(32, 32)), []
    model[0].register_full_backward_hook(lambda *_: seen.append(1))
    model[0].register_state_dict_post_hook(lambda *_: seen.append(2))
    mq.swap_(model, {"0": 8})
    model(torch.randn(3, 32, requires_grad=True)).sum().backward()
    model.state_dict()
    assert seen == [1, 2]


def test_a_subclass_that_runs_as_its_base_is_packed() -> None:
    class Named(nn.Linear):
        pass

    class Calls(nn.Linear):
        def __call__(self, *args: object) -> torch.Tensor:
            return 2 * super().__call__(*args)

    model = nn.Sequential(Named(8, 8), Calls(8, 8))
    ledger = mq.swap_(model, {nn.Linear: 8})
    assert isinstance(model[0], PackedLinear) and "forward of its own" in ledger["1"].reason


def test_types_are_classes_and_not_names() -> None:
    other = type("Linear", (nn.Module,), {})
    model = nn.ModuleDict({"Linear": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="matches no layer"):
        mq.swap_(model, {other: 4})
    assert len(mq.swap_(model, {nn.Linear: 4}).packed) == 2
    convs = nn.Sequential(nn.Conv2d(3, 3, 1))
    mq.swap_(convs, {nn.Conv2d: 8, nn.modules.conv._ConvNd: 4})
    assert convs[0].scheme == Scheme(8)
    with pytest.raises(ValueError, match="there is none to choose from"):
        mq.swap_(nn.Sequential(nn.Conv1d(3, 3, 1)), {"*": 4})


def test_the_most_specific_name_of_a_shared_module_wins() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    mq.swap_(model, {"*": 4, "a": 8})
    assert model["b"].scheme == Scheme(8)


def test_a_weight_shared_with_a_layer_that_cannot_be_packed_stays_in_float() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    model[1].forward = lambda x: x
    ledger = mq.swap_(model, {"*": 4})
    assert "shared with 1, which stays in float" in ledger["0"].reason and len(ledger.packed) == 1
    assert ledger.float_bytes == 2 * 8 * 8 * 4  # the shared one counts once


def test_attention_that_borrows_a_layer_keeps_it_in_float() -> None:
    model = nn.Module()
    model.first, model.mha = nn.Linear(32, 32), nn.MultiheadAttention(32, 4)
    model.mha.out_proj = model.first
    assert "MultiheadAttention" in mq.swap_(model, {"*": 8})["first"].reason


def test_unswapped_layers_keep_trainability_and_attributes() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.requires_grad_(False)
    model[0].tag = "frozen"
    mq.swap_(model, {"0": 8})
    mq.unswap_(model)
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad and model[0].tag == "frozen"


def test_kept_float_modules_follow_casts() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    mq.swap_(model, {"0": 8}, keep_float=True)
    mq.unswap_(model.half())
    assert model[0].weight.dtype == torch.float16


def test_swapping_in_inference_mode_still_allows_training() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.inference_mode():
        mq.swap_(model, {"0": 8})
    x = torch.randn(2, 8, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


def test_weights_too_small_for_fp16_scales_are_refused_as_a_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 4))
    model[0].weight.data.mul_(1e-6)
    with pytest.raises(ValueError, match=r"layer '0' .*too small for float16 scales; wanted scale_dtype='float32'"):
        mq.swap_(model, {"0": 8})
    assert mq.swap_(model, {"0": Scheme(8, scale_dtype="float32")})["0"].error < 0.01


def test_keywords_and_autocast_of_doubles() -> None:
    layer = PackedLinear.from_float(nn.Linear(8, 4), Scheme(8))
    x = torch.randn(2, 8)
    assert torch.equal(layer(input=x), layer(x))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="x is float64"):
        layer(x.double())
    with pytest.raises(ValueError, match=r"input is \[\]"):
        layer(torch.tensor(1.0))


def test_symbolic_tracing_keeps_packed_layers_whole() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), nn.Flatten(), nn.Linear(4 * 16, 5)
    )
    mq.swap_(model, {"*": 4})
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize(
    "conv",
    [
        {"kernel_size": 1, "stride": 2**30, "padding": 2**30 - 1},
        {"kernel_size": (1, 9), "dilation": (1, 2**61)},
        {"kernel_size": 1, "padding": 2**62},
    ],
)
def test_absurd_geometry_is_an_error_and_no_crash(conv: dict) -> None:
    layer = mq.PackedConv2d.from_float(nn.Conv2d(1, 1, **conv), Scheme(8))
    with pytest.raises((RuntimeError, ValueError, MemoryError), match=r"mpqkern::conv2d|alloc"):
        layer(torch.ones(1, 1, 2, 2))


def test_images_without_pixels_are_refused() -> None:
    layer = mq.PackedConv2d.from_float(nn.Conv2d(2, 2, 3, padding=2), Scheme(8, act_bits=8))
    with pytest.raises((RuntimeError, ValueError), match="height and width of at least 1"):
        layer(torch.ones(1, 2, 0, 4))


@pytest.mark.slow
def test_activation_sums_beyond_32_bits() -> None:
    k = 17_200_000
    q = torch.full((1, k - k % 32), 200, dtype=torch.uint8)
    x = torch.ones(1, q.shape[1])
    y = torch.ops.mpqkern.linear(x, q, torch.ones(1, 1), torch.full((1,), 100.0), None, 8, 0, 8)
    assert y.item() == pytest.approx(100 * q.shape[1], rel=1e-6)


@pytest.mark.skipif(mq.ops.why_plain is not None, reason="threads of the compiled kernels")
def test_the_first_bad_row_is_named_whatever_the_threads() -> None:
    torch.set_num_threads(4)
    w = torch.randn(4000, 64)
    w[5, 3] = w[3990, 3] = torch.nan
    for _ in range(20):
        with pytest.raises(RuntimeError, match="row 5 of weight"):
            torch.ops.mpqkern.quantize(w, 4, 0, True)


# ---- verify -----------------------------------------------------------------------------------


def swapped(*layers: nn.Module, scheme: Scheme | int = 4) -> nn.Sequential:
    model = nn.Sequential(*layers)
    mq.swap_(model, {"*": scheme})
    return model


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


class Masked(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(torch.arange(x.shape[-1]) % 2 == 0, -torch.inf)


class Count(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


@dataclass
class Out:
    y: torch.Tensor


class Wrapped(nn.Module):
    def forward(self, x: torch.Tensor) -> Out:
        return Out(x)


@pytest.mark.parametrize("after", [Noise(), Masked(), Count(), Wrapped()], ids=lambda m: type(m).__name__)
def test_verify_accepts_right_kernels_in_strange_models(after: nn.Module) -> None:
    model = swapped(nn.Linear(32, 32), after)
    model[0].register_forward_hook(lambda m, i, y: y + 1)
    result = mq.verify(model, torch.randn(4, 32))
    assert result.ok, str(result)
    if isinstance(after, Count):
        assert after.calls == 0


def test_verify_accepts_an_overflow_that_is_the_models_own() -> None:
    model = swapped(nn.Linear(32, 8)).half()
    model[0].scales.fill_(1000)
    assert mq.verify(model, torch.full((2, 32), 60.0).half()).ok


@pytest.mark.slow
def test_verify_bound_holds_for_8_bit_activations_and_fp32_scales() -> None:
    for seed in range(60):
        torch.manual_seed(seed)
        conv = nn.Conv2d(6, 12, (2, 1), padding=2, groups=6)
        model = swapped(conv, scheme=Scheme(8, act_bits=8, symmetric=False, scale_dtype="float32"))
        result = mq.verify(model, torch.randn(4, 6, 16, 16))
        assert result.ok, f"seed {seed}\n{result}"


def test_verify_sees_a_nan_in_any_output(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x), self.b(x)

    model = Two()
    mq.swap_(model, {"*": 8})
    good, calls = PackedLinear.forward, []

    def faulty(self: PackedLinear, input: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return good(self, input) * (torch.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(PackedLinear, "forward", faulty)
    result = mq.verify(model, torch.randn(2, 8))
    assert not result.end_to_end.ok and not result.layers[1].ok


def test_verify_refuses_to_compare_nothing() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model.forward = lambda x: x
    mq.swap_(model, {"*": 8})
    with pytest.raises(ValueError, match="batch reaches no packed layer"):
        mq.verify(model, torch.randn(2, 8))
    model.forward = lambda x: model["a"](x).argmax(-1)
    with pytest.raises(ValueError, match="holds no float tensor"):
        mq.verify(model, torch.randn(2, 8))


# ---- files ------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(32, 32)
        self.b = self.a if shared else nn.Linear(32, 32)


def test_a_factory_that_shares_what_the_file_does_not(tmp_path: Path) -> None:
    model = Pair()
    mq.swap_(model, {"*": 8})
    mq.save(model, tmp_path / "f")
    with pytest.raises(FileError, match=r"the model shares 'a.qweight' and 'b.qweight'"):
        mq.load(lambda: Pair(True), tmp_path / "f")
    mq.swap_(other := Pair(), {"a": 8, "b": 4})
    mq.save(other, tmp_path / "g")
    with pytest.raises(FileError, match="another scheme than under its first name"):
        mq.load(lambda: Pair(True), tmp_path / "g")


def test_layers_without_bias_keep_their_type(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 32, bias=False))

    model = make().half()
    mq.swap_(model, {"*": 8})
    mq.save(model, tmp_path / "f")
    assert mq.unswap_(mq.load(make, tmp_path / "f"))[0].weight.dtype == torch.float16
    mq.save(model.to(torch.bfloat16), tmp_path / "f")
    assert mq.load(make, tmp_path / "f")[0].weight.dtype == torch.bfloat16


def test_a_buffer_that_views_a_parameter_survives(tmp_path: Path) -> None:
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(4))
            self.register_buffer("b", self.p.data)

    model = View()
    mq.save(model, tmp_path / "f")
    assert torch.equal(mq.load(View, tmp_path / "f").b, model.b)


def test_factories_that_do_not_work_on_meta_are_told_so(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.temperature = nn.Linear(4, 4), torch.tensor(2.0)

    mq.save(Plain(), tmp_path / "f")
    with pytest.raises(ValueError, match=r"leaves the tensor 'temperature' of module '' without values"):
        mq.load(Plain, tmp_path / "f")
    with pytest.raises(RuntimeError, match=r"make_model\(\) failed on the meta device.*no .item\(\)"):
        mq.load(lambda: nn.Dropout(torch.linspace(0, 0.1, 3)[1].item()), tmp_path / "f")


def test_copies_of_packed_models_are_independent() -> None:
    model = swapped(nn.Linear(8, 8))
    twin = copy.deepcopy(model)
    twin[0].scales.zero_()
    assert model[0].scales.any() and not mq.unswap_(twin)[0].weight.any()
