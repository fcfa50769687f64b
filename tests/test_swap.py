"""swap_: what it packs, what it leaves and says so, and that it does all or nothing."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import mpqkern as mq
from mpqkern import PackedConv2d, PackedLinear, Scheme


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.conv(x)).relu()


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), Block(8), Block(8), nn.Flatten(), nn.Linear(8 * 36, 10))


def snapshot(model: nn.Module) -> dict[str, tuple[int, str]]:
    return {name: (id(m), type(m).__name__) for name, m in model.named_modules(remove_duplicate=False)}


def test_selectors_and_their_precedence() -> None:
    model = net()
    ledger = mq.swap_(
        model, {"*": 8, nn.Conv2d: 4, "1.*": Scheme(2, group_size=32), "re:2[.]conv": Scheme(8, act_bits=8), "4": None}
    )
    assert model[0].scheme == Scheme(4) and model[1].conv.scheme == Scheme(2, group_size=32)
    assert model[2].conv.scheme == Scheme(8, act_bits=8) and type(model[4]) is nn.Linear
    assert [row.name for row in ledger.packed] == ["0", "1.conv", "2.conv"]
    assert ledger["4"].reason == "asked for"


def test_the_most_specific_pattern_wins_in_any_order() -> None:
    plan = [("0", Scheme(8)), ("0*", Scheme(4)), (nn.Conv2d, Scheme(2)), ("*", None)]
    for order in (plan, plan[::-1]):
        model = net()
        mq.swap_(model, dict(order))
        assert model[0].scheme == Scheme(8) and model[1].conv.scheme == Scheme(2) and type(model[4]) is nn.Linear
    model = net()
    mq.swap_(model, {"1.*": 2, "re:1.*": 8})  # the later of equals
    assert model[1].conv.scheme == Scheme(8)


def test_ledger_counts_what_is_stored() -> None:
    model = net()
    ledger = mq.swap_(model, {nn.Linear: Scheme(4, group_size=64), nn.Conv2d: Scheme(2, symmetric=False)})
    for row in ledger.packed:
        assert row.bytes == model.get_submodule(row.name).packed_bytes() == row.scheme.bytes(row.weight_shape)
    text = str(ledger)
    assert "1.conv" in text and f"{ledger.bytes:,}" in text
    assert json.loads(ledger.to_json())["bytes"] == ledger.bytes == sum(r.bytes for r in ledger.rows)
    with pytest.raises(KeyError):
        ledger["nothing"]


def test_ledger_error_is_the_weights() -> None:
    model = net()
    before = model[4].weight.detach().clone()
    row = mq.swap_(model, {"4": 4})["4"]
    assert row.error == pytest.approx(float((before - model[4].weight).norm() / before.norm()), rel=1e-5)


@pytest.mark.parametrize(
    "plan,message",
    [
        ({"1.convv": 4}, r"pattern='1.convv' matches no layer; did you mean '1.conv'"),
        ({"Linaer": 4}, "did you mean 'Linear'"),
        ({"re:[": 4}, "no regular expression"),
        ({nn.Conv1d: 4}, "pattern='type:torch.nn.modules.conv.Conv1d' matches no layer"),
        ({0: 4}, "plan has the key 0; wanted a name, a pattern or a type"),
        ({"0": 4, "re:2[.]conv": 3}, r"layer '2\.conv': bits=3; wanted 2, 4 or 8"),
        ({"0": 9}, "bits=9; wanted an integer from 1 to 8"),
        ({"0": "4"}, "'0'.*wanted a Scheme, 2, 4, 8 or None"),
        ([("0", 4)], "wanted a mapping"),
    ],
)
def test_bad_plans_change_nothing(plan: object, message: str) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        mq.swap_(model, plan)
    assert snapshot(model) == before


@pytest.mark.parametrize("plan", [4, Scheme(4), Scheme(8, group_size=32)])
def test_one_scheme_is_for_all_layers(plan: int | Scheme) -> None:
    one, other = net(), net()
    assert [r.scheme for r in mq.swap_(one, plan).rows] == [r.scheme for r in mq.swap_(other, {"*": plan}).rows]
    assert len(mq.calibrate(net(), plan, torch.randn(4, 3, 8, 8), rounding="gptq").schemes) == 4
    with pytest.raises(TypeError, match="plan=True; wanted a mapping of names, patterns or types"):
        mq.swap_(net(), True)


def test_a_packed_model_is_not_packed_again() -> None:
    model = net()
    mq.swap_(model, 4)
    with pytest.raises(ValueError, match="all layers of the model are packed already; wanted float ones: unswap_"):
        mq.swap_(model, 8)
    mq.swap_(mq.unswap_(model), 8)


def test_bad_rounding() -> None:
    with pytest.raises(ValueError, match=r"rounding='best'; wanted 'minmax', .* or one of the classes"):
        mq.swap_(net(), {"0": 4}, rounding="best")


def test_a_bad_weight_late_in_the_model_leaves_it_untouched() -> None:
    model = net()
    model[4].weight.data[3, 3] = torch.inf
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer '4' cannot be packed as w4: .*row 3"):
        mq.swap_(model, {"*": 4})
    assert snapshot(model) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_check_restores_the_model(error: type[BaseException]) -> None:
    model = net()
    before, x = snapshot(model), torch.randn(2, 3, 8, 8)
    want = model.eval()(x)

    def check(swapped: nn.Module) -> None:
        assert isinstance(swapped[0], PackedConv2d)
        raise error("no")

    with pytest.raises(error):
        mq.swap_(model, {"*": 4}, check=check)
    assert snapshot(model) == before and torch.equal(model(x), want)


def test_names_hooks_mode_and_attributes_stay() -> None:
    model, seen = net().eval(), []
    model[4].register_forward_hook(lambda *_: seen.append("after"))
    handle = model[4].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[4].label = "head"
    names = [name for name, _ in model.named_modules()]
    mq.swap_(model, {"*": 8})
    assert [name for name, _ in model.named_modules()] == names
    model(torch.randn(1, 3, 8, 8))
    assert seen == ["before", "after"] and model[4].label == "head" and not model[4].training
    handle.remove()
    model(torch.randn(1, 3, 8, 8))
    assert seen == ["before", "after", "after"]


def test_unswap_gives_back_the_dequantized_weights_or_the_kept_modules() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = net().eval()
    before, want = snapshot(model), model(x)
    mq.swap_(model, {"*": 2}, keep_float=True)
    assert not torch.equal(model(x), want)
    mq.unswap_(model)
    assert snapshot(model) == before and torch.equal(model(x), want)

    mq.swap_(model, {"*": 4})
    packed = model(x)
    assert mq.unswap_(model) is model and type(model[0]) is nn.Conv2d and type(model[1].conv) is nn.Conv2d
    assert torch.allclose(model(x), packed, atol=1e-4) and not model[0].training


def test_a_module_used_twice_is_packed_once() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(16, 16)})
    ledger = mq.swap_(model, {"b.0": 4})
    assert model["a"] is model["b"][0] and isinstance(model["a"], PackedLinear)
    assert len(ledger.packed) == 1 and type(model["c"]) is nn.Linear
    mq.unswap_(model)
    assert model["a"] is model["b"][0] and type(model["a"]) is nn.Linear
    with pytest.raises(ValueError, match="different schemes"):
        mq.swap_(model, {"a": 4, "b.0": 8})


def test_tied_weights_share_their_codes() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    ledger = mq.swap_(model, {"*": 4})
    assert model[0].qweight is model[1].qweight and model[0].bias is not model[1].bias
    assert ledger.bytes == Scheme(4).bytes((32, 32)) and ledger.float_bytes == 32 * 32 * 4
    mq.unswap_(model)
    assert model[0].weight is model[1].weight
    for plan in ({"0": 4, "1": 8}, {"0": 4, "1": None}, {"0": None, "1": 4}):
        with pytest.raises(ValueError, match="share"):
            mq.swap_(model, plan)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("named", ["0", "2"])
def test_a_layer_that_is_not_named_follows_the_one_it_shares_its_weight_with(named: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    ledger = mq.swap_(model, {named: 4})
    assert model[0].qweight is model[2].qweight and type(model[1]) is nn.Linear
    assert ledger["0"].scheme == ledger["2"].scheme == Scheme(4) and ledger["1"].reason == "not selected"
    mq.unswap_(model)
    mq.swap_(model, {named: None, "1": 2})
    assert type(model[0]) is type(model[2]) is nn.Linear


def test_twins_follow_an_assignment_which_names_only_the_first() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model[2].weight = model[0].weight
    answer = mq.assign(model, torch.randn(4, 8), mq.Budget(avg_bits=4), method="uniform")
    assert list(answer.schemes) == ["0", "4"]
    assert [row.name for row in mq.swap_(model, answer).packed] == ["0", "2", "4"]


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight


def odd_layers() -> dict[str, tuple[nn.Module, str]]:
    """Layers that must stay in float, and what the ledger says of each."""
    replaced = nn.Linear(8, 8)
    replaced.forward = lambda x: x
    adapted = nn.Linear(8, 8)
    adapted.lora = nn.Linear(8, 1)
    return {
        "own forward": (Doubled(8, 8), "forward of its own"),
        "replaced forward": (replaced, "forward was replaced"),
        "parametrized": (parametrizations.weight_norm(nn.Linear(8, 8)), "parametrized"),
        "old spectral norm": (nn.utils.spectral_norm(nn.Linear(8, 8)), "computed by a hook"),
        "lazy": (nn.LazyLinear(8), "lazy"),
        "double": (nn.Linear(8, 8).double(), "float64"),
        "meta": (nn.Linear(8, 8, device="meta"), "meta device"),
        "adapter": (adapted, "'lora' besides weight and bias"),
    }


@pytest.mark.parametrize("kind", odd_layers())
def test_odd_layers_stay_in_float_with_a_reason(kind: str) -> None:
    odd, reason = odd_layers()[kind]
    model = nn.Sequential(nn.Linear(8, 8), odd)
    ledger = mq.swap_(model, {"0": 4, "1": 4})
    assert isinstance(model[0], PackedLinear) and model[1] is odd
    assert reason in ledger["1"].reason and reason in str(ledger)
    with pytest.raises(ValueError, match="layer '1' cannot be packed"):
        mq.swap_(nn.Sequential(nn.Linear(8, 8), odd), {"1": 4}, strict=True)


def test_a_head_tied_to_an_embedding_stays() -> None:
    model = Tied()
    assert "shared with embed.weight" in mq.swap_(model, {"head": 4})["head"].reason


def test_the_model_itself_cannot_be_replaced() -> None:
    assert "it is the model itself" in mq.swap_(nn.Linear(4, 4), {nn.Linear: 4}).rows[0].reason


def test_attention_keeps_working() -> None:
    for batch_first in (True, False):
        model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first).eval()
        x = torch.randn(3, 5, 16)
        ledger = mq.swap_(model, {nn.Linear: 8}, keep_float=True)
        assert "MultiheadAttention" in ledger["self_attn.out_proj"].reason
        calls = []
        model.linear1.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        with torch.no_grad():
            got = model(x)
        assert calls, "the fused fast path of TransformerEncoderLayer went around the packed layer"
        mq.unswap_(model)
        assert model.activation_relu_or_gelu == 1
        with pytest.raises(ZeroDivisionError):
            mq.swap_(model, {nn.Linear: 8}, check=lambda m: 1 // 0)
        assert model.activation_relu_or_gelu == 1 and "_activation_before_swap" not in model.__dict__
        with torch.no_grad():
            assert torch.allclose(got, model(x), atol=0.05)


def test_a_class_named_like_hugging_faces_conv1d_is_left_with_a_reason() -> None:
    kind = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})
    layer = kind()
    layer.weight = nn.Parameter(torch.randn(4, 8))
    model = nn.Sequential(layer, nn.Linear(4, 4))
    assert "[in, out]" in mq.swap_(model, {"*": 4})["0"].reason


def test_catalog_lists_layers_and_counts_multiplications() -> None:
    model = net().train()
    x = torch.randn(2, 3, 8, 8)
    rng = torch.get_rng_state()
    stats = copy.deepcopy(model[1].norm.state_dict())
    layers = {layer.name: layer for layer in mq.catalog(model, x)}
    assert layers["0"].macs == 2 * 36 * 8 * 27 and layers["4"].macs == 2 * 2880 and layers["1.conv"].params == 576
    assert layers["0"].kind == "conv2d" and layers["4"].weight_shape == (10, 288)
    assert model.training and model[1].norm.training and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(stats[k], v) for k, v in model[1].norm.state_dict().items())
    assert all(not m._forward_hooks for m in model.modules())


def test_catalog_leaves_the_model_as_found_when_it_fails() -> None:
    model = net().train()
    with pytest.raises(RuntimeError):
        mq.catalog(model, torch.randn(2, 4, 8, 8))
    assert model.training and all(not m._forward_hooks for m in model.modules()) and torch.is_grad_enabled()


def test_an_assignment_like_object_is_a_plan() -> None:
    assignment = type("A", (), {"schemes": {"0": Scheme(4), "4": Scheme(2)}})()
    assert [str(row.scheme) for row in mq.swap_(net(), assignment).packed] == ["w4", "w2"]


def test_swapped_model_compiles_whole() -> None:
    model = net().eval()
    mq.swap_(model, {"*": Scheme(4, group_size=32)})
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (1, 3):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
