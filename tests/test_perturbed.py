"""What measuring layers and pairs takes, and that it stops, goes on and fails without loss or trace."""

import time

import numpy as np
import pytest
import torch
from torch import nn

import mpqkern as mq
from bench.models import ResNet8
from mpqkern.held import held
from mpqkern.measuring.task import Task
from mpqkern.scores import perturbed
from mpqkern.scores.replay import Replay

from . import nets
from .test_clado import SCHEMES, case, clado_of, images, same


@pytest.mark.parametrize("engine", perturbed.ENGINES)
def test_losses_are_counted(engine):
    model, batches = nets.resnet(), [images(), images(seed=2)]
    depth, tried = 7, 3
    wanted = 1 + depth * tried + depth * (depth - 1) // 2 * tried**2
    scores = clado_of(model, batches, bits=(2, 4, 8), engine=engine)
    assert scores.provenance["losses"] == wanted and scores.provenance["evaluations"] == 2 * wanted
    planned = mq.plan(model, batches, method="clado", bits=(2, 4, 8), engine=engine)
    assert planned.evaluations == 2 * wanted and planned.forwards == scores.provenance["forwards"]


@pytest.mark.parametrize("options", [{}, {"pairs": "block"}, {"pairs": "none"}, {"engine": "naive"}], ids=str)
def test_passes_are_those_that_run(options, monkeypatch):
    model, batch = ResNet8(4).eval(), (torch.randn(3, 1, 8, 8), torch.arange(3))
    macs = []
    for kind in (nn.Conv2d, nn.Linear):

        def forward(module, x, own=kind.forward):
            y = own(module, x)
            macs.append(y.numel() // y.shape[1] * module.weight.numel())
            return y

        monkeypatch.setattr(kind, "forward", forward)

    def passes(**options):
        """As planned, and as counted while they ran."""
        macs.clear()
        model(batch[0])
        one = sum(macs)
        macs.clear()
        mq.score(model, [batch], method="clado", **options)
        counted = sum(macs) / one
        return mq.plan(model, [batch], method="clado", **options).forwards, counted

    # the search for cuts comes on top in both, so the difference is that of the losses alone
    least, most = passes(pairs="none", bits=(8,)), passes(bits=(2, 8), **options)
    assert most[0] - least[0] == pytest.approx(most[1] - least[1], rel=1e-9)


def test_states_that_no_pair_needs_are_not_carried_along():
    model, batch = ResNet8(4).eval(), (torch.randn(2, 1, 8, 8), torch.arange(2))
    with held(model):
        macs = Replay(Task(model, [batch]), 0).macs()
    planned = mq.plan(model, [batch], method="clado", pairs="none")
    # the reference, three schemes from each cut on, and the unchanged model from the first cut to the last
    assert planned.forwards == pytest.approx(1 + (3 * sum(macs) + macs[0] - macs[-1]) / macs[0], rel=1e-12)
    assert planned.bytes < mq.plan(model, [batch], method="clado").bytes / 3


def test_the_frontier_takes_a_third_of_the_passes():
    batch = torch.randn(2, 1, 8, 8), torch.arange(2)
    frontier, naive = (mq.plan(ResNet8(), [batch], method="clado", engine=e) for e in perturbed.ENGINES)
    assert naive.forwards == naive.evaluations == frontier.evaluations == 436
    assert naive.forwards > 3.3 * frontier.forwards


@pytest.mark.slow
def test_the_frontier_is_faster():
    model, batch = ResNet8().eval(), (torch.randn(8, 1, 8, 8), torch.arange(8))
    seconds = {engine: [] for engine in perturbed.ENGINES}
    for _ in range(2):
        for engine in perturbed.ENGINES:
            start = time.process_time()
            mq.score(model, [batch], method="clado", engine=engine)
            seconds[engine].append(time.process_time() - start)
    assert min(seconds["naive"]) > 1.5 * min(seconds["frontier"])


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_batches_that_do_not_fit_are_split(loss):
    model, batch = case("resnet")
    whole = clado_of(model, [batch], loss=loss)
    planned = mq.plan(model, [batch], method="clado", bits=SCHEMES)
    tight = clado_of(model, [batch], loss=loss, memory=planned.bytes // 2)
    assert len(whole.provenance["batches"]) == 1 and len(tight.provenance["batches"]) == 2
    np.testing.assert_allclose(tight.pairwise, whole.pairwise, atol=1e-6)
    np.testing.assert_allclose(tight.unary, whole.unary, atol=1e-6)
    assert mq.plan(model, [batch], method="clado", bits=SCHEMES, memory=planned.bytes // 2).bytes <= planned.bytes // 2


def test_a_batch_with_a_tensor_for_all_samples_stays_whole():
    model = nn.Sequential(nn.Linear(8, 4))
    run = lambda model, batch: model(batch["x"]) * batch["scale"]  # noqa: E731
    task = Task(
        model, [{"x": torch.randn(6, 8), "scale": torch.ones(4)}, {"x": torch.randn(5, 8), "scale": 2.0}], forward=run
    )
    parts = task.split(2)
    assert parts.sizes == [6, 2, 2, 1] and task.sizes == [6, 5]
    assert torch.equal(torch.cat([b["x"] for b in parts.batches[1:]]), task.batches[1]["x"])


def test_cuts_of_another_batch_are_tried_before_they_are_taken():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            z = self.b(y)
            return self.c(z + y if x[0, 0] > 0 else z)

    model = Switch()
    task = Task(model, [-torch.ones(2, 4), torch.ones(2, 4), -torch.ones(5, 4)])
    with held(model):
        first = Replay(task, 0)
        assert [len(keys) for keys in first.live] == [0, 1, 1]
        other = Replay(task, 1, like=first)
        assert [len(keys) for keys in other.live] == [0, 1, 2] == [len(k) for k in Replay(task, 1).live]
        assert Replay(task, 2, like=first).live is first.live
    whole = clado_of(model, [(b, torch.arange(len(b)) % 4) for b in task.batches], engine="naive")
    cut = clado_of(model, [(b, torch.arange(len(b)) % 4) for b in task.batches])
    np.testing.assert_allclose(cut.pairwise, whole.pairwise, atol=1e-6)


@pytest.mark.parametrize("engine", perturbed.ENGINES)
@pytest.mark.parametrize("most", [1, 9, 15])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, engine, most):
    model, batches = nets.Reused().eval(), [torch.randn(5, 8), torch.randn(4, 8)]
    whole = clado_of(model, batches, engine=engine)
    for _ in range({1: 9, 9: 5, 15: 3}[most]):  # of items with 1, 2, 6, 10 and 14 losses in each batch
        with pytest.raises(mq.Unfinished):
            clado_of(model, batches, engine=engine, bank=tmp_path, max_evals=most)
    found = clado_of(model, batches, engine=engine, bank=tmp_path, max_evals=most)
    assert same(found, whole)
    assert clado_of(model, batches, engine=engine, bank=tmp_path).provenance["evaluations"] == 0
    more = clado_of(model, [*batches, torch.randn(3, 8)], engine=engine, bank=tmp_path)
    assert more.provenance["evaluations"] == more.provenance["losses"] == 1 + 4 * 2 + 6 * 4


def test_the_model_is_left_as_found():
    model, batch = case("resnet")
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    own = model[6].weight.data_ptr()

    def fails(module, args):
        if module.weight.data_ptr() != own:
            raise RuntimeError("in the middle of a change")

    handle = model[6].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="in the middle of a change"):
        clado_of(model, [batch])
    handle.remove()
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0] and torch.equal(p, before[name][1])
    for module in model.modules():
        assert "forward" not in vars(module) and not module._forward_pre_hooks
