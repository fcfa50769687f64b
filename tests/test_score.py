"""The front door: what holds for every method."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern.scores.entry import METHODS

from . import nets

MEASURED = [name for name, (file, *_) in METHODS.items() if file is not None]
NEED_NO_LOSS = ["ompq", "csmpq", "roundoff", "size"]
QUICK = {"limpq": {"steps": 3}, "limpq_lite": {"steps": 3}, "hawq": {"max_probes": 8}}


def images(n=8, labels=True):
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))
    return (x, torch.arange(n) % 5) if labels else x


@pytest.mark.parametrize("method", MEASURED)
@pytest.mark.parametrize("labels", [True, False])
def test_every_method_scores_any_model_and_leaves_it_as_it_was(method, labels):
    for model, batch in ((nets.resnet(), images(labels=labels)), (nets.Functional(), torch.randn(6, 8))):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        random, trained = torch.get_rng_state(), model.training
        scores = mq.score(model, [batch], method=method, bits=(2, 4, 8), **QUICK.get(method, {}))
        assert np.isfinite(scores.unary).all() and np.ptp(scores.unary) > 0
        assert scores.provenance["method"] == method and scores.provenance["mpqkern"] == mq.__version__
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert model.training == trained
        assert torch.equal(torch.get_rng_state(), random)
        found = mq.solve(scores, mq.Budget(avg_bits=4))
        assert found.costs["avg_bits"] <= 4


@pytest.mark.parametrize("method", MEASURED)
def test_every_method_gives_the_same_twice_and_goes_on_where_it_stopped(method, tmp_path):
    options = {"method": method, "bits": (2, 8), **QUICK.get(method, {})}
    model, batches = nets.resnet(), [images(4), images(5)]
    once = mq.score(model, batches, **options)
    assert mq.score(model, batches, **options).unary.tobytes() == once.unary.tobytes()
    stops = 0
    while True:
        try:
            found = mq.score(model, batches, bank=tmp_path, max_evals=1, **options)
            break
        except mq.Unfinished:
            stops += 1
            assert stops < 500
    assert stops > 0 or method in ("roundoff", "size")
    assert found.unary.tobytes() == once.unary.tobytes()
    if once.pairwise is not None:
        assert found.pairwise.tobytes() == once.pairwise.tobytes()


class Boxes(nn.Module):
    """Its output is no class scores."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return {"boxes": self.c(torch.relu(self.b(self.a(x))))}


@pytest.mark.parametrize("method", NEED_NO_LOSS)
def test_methods_without_a_loss_take_any_output(method):
    assert mq.score(Boxes(), torch.randn(6, 8), method=method).unary.shape == (3, 3)


@pytest.mark.parametrize("method", ["clado", "single", "greedy", "fisher", "hawq", "limpq"])
def test_a_loss_of_ones_own_takes_any_output(method):
    options = {"loss": lambda output, batch: output["boxes"].square().mean(1), **QUICK.get(method, {})}
    assert np.isfinite(mq.score(Boxes(), torch.randn(6, 8), method=method, **options).unary).all()
    with pytest.raises(ValueError, match="the model returned dict; wanted logits, or give forward= and loss="):
        mq.score(Boxes(), torch.randn(6, 8), method=method, **QUICK.get(method, {}))


@pytest.mark.parametrize("method", MEASURED)
def test_what_it_will_take(method):
    work = mq.plan(nets.resnet(), [images(4), images(5)], method=method)
    assert work.evaluations >= 0 and work.seconds >= 0 and work.bytes >= 0
    assert (work.forwards > 0) == (work.evaluations > 0) == (method not in ("roundoff", "size"))


@pytest.mark.parametrize("method", ["clado", "single", "greedy"])
def test_the_plan_counts_what_is_then_done(method):
    batches, model = [images(4), images(5)], nets.resnet()
    scores = mq.score(model, batches, method=method)
    assert mq.plan(model, batches, method=method).evaluations == scores.provenance["evaluations"]


@pytest.mark.parametrize("method", ["clado", "single", "kl", "greedy", "fisher"])
def test_what_is_not_finite_is_named_before_anything_is_measured(method):
    x, labels = images()
    x[3] = float("nan")
    with pytest.raises(ValueError, match=r"loss is nan for 1 of the 8 samples of batches\[1\]; wanted inputs and"):
        mq.score(nets.resnet(), [images(), (x, labels)], method=method)
    model = nets.resnet()
    model[2].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"layer '2\.conv1' cannot be rounded to w[28]: .*not finite|loss is nan for 8"
    ):
        mq.score(model, [images()], method=method)
    with pytest.raises(ValueError, match=r"layer '2\.conv1' cannot be rounded to w2: .*not finite"):
        mq.score(model, [images()], method="roundoff")


def test_a_plan_takes_what_decides_the_scores():
    how = {"method": "single", "rounding": "gptq", "seed": 3}
    assert str(mq.plan(nets.resnet(), [images()], **how)).startswith("22 evaluations")
    with pytest.raises(ValueError, match="rounding='best'; wanted 'minmax'"):
        mq.plan(nets.resnet(), [images()], rounding="best")


@pytest.mark.parametrize("which", range(5))
def test_one_slow_pass_does_not_decide_how_long_it_will_take(monkeypatch, which):
    passes, now = [], [0.0]

    def slow(model, batch):
        passes.append(0.5 if len(passes) == which else 0.01)
        now[0] += passes[-1]
        return model(batch[0])

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert mq.plan(nets.resnet(), [images()], method="ompq", forward=slow).seconds == pytest.approx(0.01)
    assert which < len(passes)


def test_an_error_inside_leaves_the_model_as_it_was():
    model = nets.resnet()
    calls = []

    def forward(m, batch):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return m(batch[0])

    weights = [(p.data_ptr(), p.clone()) for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        mq.score(model, [images()], method="clado", forward=forward)
    assert all(p.data_ptr() == at and torch.equal(p, v) for p, (at, v) in zip(model.parameters(), weights, strict=True))
    assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())
