"""calibrate_activations_: the scales of what was met, all or nothing, and a model that computes what its twin does."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import PackedConv2d, PackedModule, Scheme
from mpqkern.measuring.observers import OBSERVERS, Observer, Percentile

from . import nets

SCHEME = Scheme(4, act_bits=8, group_size=32)


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16, padding="same", padding_mode="reflect"),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 70),
        nn.Tanh(),
        nn.Linear(70, 5),
    )
    mq.swap_(model, {"*": SCHEME})
    return model.train()


def data(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 3, 6, 6), torch.randint(5, (8,))) for _ in range(count)]


def static_layers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.act_scale for n, m in model.named_modules() if isinstance(m, PackedModule) and m.act_scale is not None}


@pytest.mark.parametrize("granularity", ["tensor", "group"])
def test_the_maximum_is_the_inputs_maximum(granularity: str) -> None:
    model, met = conv_net(), {}
    for name, m in model.named_modules():
        if isinstance(m, PackedModule):
            m.register_forward_pre_hook(lambda _, args, name=name: met.setdefault(name, []).append(args[0].clone()))
    report = mq.calibrate_activations_(model, data(), observer="max", granularity=granularity)
    for name, m in model.named_modules():
        if not isinstance(m, PackedModule):
            continue
        x = torch.cat(met[name][: len(data())])  # the first time round
        size = x.shape[-1] if granularity == "tensor" or isinstance(m, PackedConv2d) else 32
        tops = [x.abs().max()] if isinstance(m, PackedConv2d) else [p.abs().max() for p in x.split(size, -1)]
        assert torch.equal(m.act_scale, torch.stack(tops) / 127) and report[name].scale == tuple(m.act_scale.tolist())
    assert report["0"].clipped == 0 and report["0"].error > report["0"].dynamic_error > 0
    assert model.training and model[3].num_batches_tracked == 0 and "rel. error" in str(report)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_calibrated_model_computes_what_its_codes_say(observer: str, dtype: torch.dtype) -> None:
    model = conv_net().to(dtype)
    batches = [x.to(dtype) for x, _ in data()]
    report = mq.calibrate_activations_(model, batches, observer=observer, granularity="group")
    assert len(static_layers(model)) == len(report.rows) == 4
    worst = 0.06 if observer == "gauss" else 0.02  # none of these inputs is normal
    assert all(0 < row.error < worst and row.clipped < 0.01 for row in report.rows)
    result = mq.verify(model, batches[0])
    assert result.ok, str(result)


class Rounded(nn.Module):
    """A float layer whose input is rounded by fixed scales, in fp64."""

    def __init__(self, layer: PackedModule) -> None:
        super().__init__()
        self.layer, self.scale = layer.to_float().double(), layer.act_scale.double()
        self.layer.weight.data = layer.weight.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fixed = self.scale.repeat_interleave(32)[: x.shape[-1]] if len(self.scale) > 1 else self.scale
        q = (x.float() / fixed.float()).round().clamp(-127, 127)
        return self.layer(q.double() * fixed).float()


@pytest.mark.parametrize("granularity", ["tensor", "group"])
def test_a_calibrated_model_equals_its_fake_quantized_twin(granularity: str) -> None:
    model = conv_net().eval()
    batches = data()
    mq.calibrate_activations_(model, batches, granularity=granularity)
    twin = nn.Sequential(*(Rounded(m) if isinstance(m, PackedModule) else m for m in model))
    x = batches[0][0]
    with torch.no_grad():
        want = twin(x)
    size = float(want.square().mean().sqrt())
    bound = mq.verify(model, x).end_to_end.bound
    assert float((model(x) - want).double().square().mean().sqrt()) <= bound < 0.02 * size


def test_static_errors_are_those_of_the_report() -> None:
    model, batches = conv_net(), data()
    report = mq.calibrate_activations_(model, batches, observer=lambda: Percentile(90.0), layers=["0"])
    x, scale = torch.cat([x for x, _ in batches]), model[0].act_scale
    back = (x / scale).clamp(-127, 127).round().double() * scale.double()
    assert report["0"].error == pytest.approx(float((back - x).norm() / x.double().norm()))
    assert report["0"].clipped == pytest.approx(0.1, abs=0.005)
    dynamic = mq.PackedLinear(1, 1, Scheme(8, act_bits=8)).rounded_input(x.flatten(1)).view(x.shape)
    assert report["0"].dynamic_error == pytest.approx(float((dynamic - x).norm() / x.double().norm()))
    assert list(static_layers(model)) == ["0"] and len(report.rows) == 1


def test_errors_leave_the_model_as_it_was() -> None:
    model, batches = conv_net(), data()
    before = mq.calibrate_activations_(model, batches, layers=["0"])["0"].scale
    calls = []

    def fails(model: nn.Module, batch: object) -> None:
        model(batch[0])
        calls.append(len(static_layers(model)))
        if len(calls) == 4:  # while the new scales are measured
            raise RuntimeError("out of patience")

    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(RuntimeError, match="out of patience"):
        mq.calibrate_activations_(model, batches, observer="max", forward=fails)
    assert calls == [0, 0, 0, 4] and {n: tuple(s.tolist()) for n, s in static_layers(model).items()} == {"0": before}
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks and model.training
    with pytest.raises(ValueError, match="layer '0' meets values that are not finite"):
        mq.calibrate_activations_(model, [batches[0][0], torch.full((1, 3, 6, 6), torch.inf)])
    assert list(static_layers(model)) == ["0"]


def test_layers_without_values_stay_dynamic_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8), "zero": nn.Linear(8, 8)})
    model.forward = lambda x: model["zero"](0 * model["used"](x))
    mq.swap_(model, {"*": SCHEME})
    model["idle"].set_act_scale_(torch.ones(1))
    with caplog.at_level(logging.WARNING, "mpqkern"):
        report = mq.calibrate_activations_(model, torch.randn(4, 8))
    assert list(static_layers(model)) == ["used"]
    assert report["idle"].reason == "not reached by these batches" and report["zero"].reason == "met only zeros"
    assert "idle keeps dynamic" in caplog.text and "dynamic: met only zeros" in str(report)


def test_a_group_of_zeros_takes_the_largest_scale() -> None:
    model = nn.Sequential(nn.Linear(70, 4))
    mq.swap_(model, {"*": SCHEME})
    x = torch.cat([torch.full((3, 32), 2.0), torch.zeros(3, 32), torch.full((3, 6), -4.0)], 1)
    mq.calibrate_activations_(model, x, observer="max", granularity="group")
    assert torch.equal(model[0].act_scale, torch.tensor([2.0, 4.0, 4.0]) / 127)


def test_shared_functional_and_keyword_models() -> None:
    for model, batch in (
        (nets.Functional(), torch.randn(6, 8)),
        (nets.transformer(), torch.randn(2, 3, 8)),
        (nets.Keywords(), {"ids": torch.randint(20, (2, 4)), "mask": torch.ones(2, 4), "labels": torch.zeros(2)}),
    ):
        mq.swap_(model, {"*": SCHEME})
        report = mq.calibrate_activations_(model, [batch])
        assert all((row.scale or row.reason) and (row.reason is None) != (row.name == "unused") for row in report.rows)


def test_an_observer_of_ones_own() -> None:
    class Half(Observer):
        def update(self, x: torch.Tensor) -> None:
            assert x.dtype == torch.float32 and x.numel()

        def limit(self) -> float:
            return 63.5

    model = conv_net()
    mq.calibrate_activations_(model, data(), observer=Half)
    assert all(s.tolist() == [0.5] for s in static_layers(model).values())


def test_arguments() -> None:
    model = conv_net()
    with pytest.raises(ValueError, match="granularity='row'; wanted 'tensor' or 'group'"):
        mq.calibrate_activations_(model, data(), granularity="row")
    with pytest.raises(ValueError, match="observer='best'; wanted one of max, percentile, mse, ema, gauss"):
        mq.calibrate_activations_(model, data(), observer="best")
    with pytest.raises(ValueError, match="pattern='9' matches no layer"):
        mq.calibrate_activations_(model, data(), layers=["9"])
    with pytest.raises(ValueError, match="batches is empty"):
        mq.calibrate_activations_(model, [])
    with pytest.raises(ValueError, match="no layer with 8-bit activations"):
        mq.calibrate_activations_(nn.Sequential(nn.Linear(2, 2)), data())
    assert not static_layers(model)
