"""CLADO: exact where the loss is quadratic, the same by both engines, resumable, and what it says it costs."""

import logging
import time

import numpy as np
import pytest
import torch
from torch import nn

import mpqkern as mq
from bench.models import ResNet8
from mpqkern.held import held
from mpqkern.scheme import Scheme
from mpqkern.scores import clado, probes
from mpqkern.scores.replay import Replay
from mpqkern.scores.task import Task
from mpqkern.scores.variants import Variants

from . import nets

SCHEMES = [Scheme(2), Scheme(4, act_bits=8)]


class Recurrent(nn.Module):
    """A block that runs twice around another layer: what it changes is not over when that layer comes."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.between, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.block(self.between(self.block(x))))


class Noisy(nn.Module):
    """Cannot be cut: no two runs are the same."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(x) + torch.rand(8))


def images(n=6, seed=1):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % 5


def words():
    ids = torch.arange(18).view(3, 6) % 20
    return {"ids": ids, "mask": (ids % 5 > 0).float()}


CASES = {
    "resnet": (nets.resnet, images),
    "functional": (nets.Functional, lambda: torch.randn(5, 8)),
    "recurrent": (Recurrent, lambda: torch.randn(5, 8)),
    "tied": (nets.Tied, lambda: torch.randn(5, 12)),
    "transformer": (nets.transformer, lambda: torch.randn(3, 5, 8)),
    "keywords": (nets.Keywords, words),
}


def case(name):
    make, batch = CASES[name]
    model = make().eval()
    torch.manual_seed(1)
    return model, batch()


def clado_of(model, batches, bits=SCHEMES, **options):
    return mq.score(model, batches, method="clado", bits=bits, **options)


def same(a, b):
    return np.array_equal(a.unary, b.unary) and np.array_equal(a.pairwise, b.pairwise)


# ---- what is measured --------------------------------------------------------------------------------


class Sum(nn.Module):
    """Linear layers side by side: with a squared loss, an exactly quadratic function of all weights."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(6, 2, bias=False) for _ in range(3))
        for part in self.parts:
            # quarters up to 127.5 in each row: all scales are whole numbers, and fp32 computes without rounding
            part.weight.data = torch.randint(-500, 501, (2, 6), generator=generator) / 4
            part.weight.data[:, 0] = 127.5

    def forward(self, x):
        return sum(part(x.roll(i, 1)) for i, part in enumerate(self.parts))


def squared(output, batch):
    return (output.double() - batch[1].double()).square().sum(1)


def test_a_quadratic_loss_gives_the_hessian():
    model = Sum()
    x = torch.randint(-3, 4, (8, 6), generator=torch.Generator().manual_seed(1)).float()
    batch = (x, torch.randint(-50, 51, (8, 2), generator=torch.Generator().manual_seed(2)).float())
    scores = clado_of(model, [batch], bits=(2, 4, 8), loss=squared)

    def loss(flat):
        weights = flat.view(3, 2, 6)
        output = sum(x.double().roll(i, 1) @ w.T for i, w in enumerate(weights))
        return squared(output, batch).mean()

    weights = torch.stack([part.weight.detach() for part in model.parts]).double()
    gradient = torch.autograd.functional.jacobian(loss, weights.flatten()).view(3, 12)
    hessian = torch.autograd.functional.hessian(loss, weights.flatten()).view(3, 12, 3, 12)
    task = Task(model, [batch], loss=squared)
    variants = Variants(task, scores.schemes)
    deltas = torch.stack([torch.stack([variants.change(i, b).double().flatten() for b in range(3)]) for i in range(3)])
    omega = torch.einsum("ibx,ixjy,jcy->ibjc", deltas, hessian, deltas).numpy()
    for i in range(3):
        assert np.abs(deltas[i].numpy()).sum(1).all()
        own = omega[i, :, i, :].diagonal() / 2 + (deltas[i] @ gradient[i]).numpy()
        np.testing.assert_allclose(scores.unary[i], own, rtol=1e-12)
        omega[i, :, i, :] = 0
    np.testing.assert_allclose(scores.pairwise, omega, rtol=1e-12)
    assert np.array_equal(scores.pairwise, scores.pairwise.transpose(2, 3, 0, 1))
    # a quadratic function knows nothing beyond pairs: any assignment is predicted
    with held(model), variants.applied({0: 0, 1: 2, 2: 1}):
        measured = squared(model(x), batch).mean()
    assert scores.cost([0, 2, 1]) == pytest.approx(float(measured - loss(weights.flatten())), rel=1e-12)


@pytest.mark.parametrize("baseline", ["float", "widest"])
def test_pairs_cost_what_was_measured(baseline, monkeypatch):
    monkeypatch.setattr(probes, "CPU_STACK_BYTES", 1)
    model, batch = case("resnet")
    bits = (2, 4, None) if baseline == "float" else (2, 4, 8)
    scores = clado_of(model, [batch], bits=bits, baseline=baseline)
    task = Task(model, [batch])
    variants = Variants(task, scores.schemes)

    def measured(choice):
        with held(model), variants.applied(dict(enumerate(choice))):
            return float(task.losses(model(batch[0]), 0).mean())

    whole = measured([2] * 7)
    assert not scores.unary[:, 2].any() and not scores.pairwise[:, 2].any()
    for i, j, b, c in [(0, 1, 0, 0), (0, 5, 0, 1), (2, 4, 1, 0), (4, 5, 0, 0)]:
        choice = [2] * 7
        choice[i] = b
        assert scores.cost(choice) == pytest.approx(measured(choice) - whole, abs=1e-12)
        choice[j] = c
        assert scores.cost(choice) == pytest.approx(measured(choice) - whole, abs=1e-12)


def test_what_activations_lose_counts():
    model, batch = case("resnet")
    scores = clado_of(model, [batch], bits=(Scheme(4), Scheme(4, act_bits=2)), pairs="none")
    assert (scores.unary[:, 0] != scores.unary[:, 1]).all()


def test_divergence_from_the_model_itself_needs_no_labels(tmp_path):
    model, (x, labels) = case("resnet")
    scores = clado_of(model, [x], bank=tmp_path)
    assert scores.provenance["loss"] == "kl" and (scores.unary > 0).all()
    assert not clado.samples(scores, tmp_path).reference.any()
    labelled = clado_of(model, [(x, labels)], loss="kl")
    assert same(scores, labelled) and not same(scores, clado_of(model, [(x, labels)]))


# ---- engines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", [{}, {"pairs": "block"}, {"baseline": "widest"}], ids=str)
def test_the_frontier_measures_what_whole_passes_do(name, options, monkeypatch):
    model, batch = case(name)
    naive = clado_of(model, [batch], engine="naive", **options)
    stacked = clado_of(model, [batch], **options)
    np.testing.assert_allclose(stacked.unary, naive.unary, atol=1e-6)
    if naive.pairwise is None:
        assert stacked.pairwise is None and options == {"pairs": "block"}
        return
    np.testing.assert_allclose(stacked.pairwise, naive.pairwise, atol=1e-6)
    monkeypatch.setattr(probes, "CPU_STACK_BYTES", 1)
    assert same(clado_of(model, [batch], **options), naive)


def test_one_weight_in_two_places_is_one_layer():
    model, batch = case("tied")
    scores = clado_of(model, [batch])
    assert scores.names == ["a", "middle"] and scores.pairwise[0, 0, 1, 0] != 0


def test_layers_that_are_not_reached_cost_nothing():
    model, batch = case("functional")
    scores = clado_of(model, [batch])
    at = scores.names.index("unused")
    assert not scores.unary[at].any() and not scores.pairwise[at].any() and scores.unary[0].all()


def test_a_model_that_cannot_be_cut_is_run_whole(caplog):
    caplog.set_level(logging.INFO, "mpqkern")
    scores = clado_of(Noisy().eval(), [torch.randn(4, 8)])
    assert "every loss by a whole pass: what comes before b cannot be left out" in caplog.text
    assert scores.provenance["forwards"] == scores.provenance["losses"] == 1 + 2 * 2 + 4


def test_pairs_within_blocks():
    model, batch = case("resnet")
    whole, block, alone = (clado_of(model, [batch], pairs=pairs) for pairs in ("all", "block", "none"))
    assert alone.pairwise is None and np.allclose(alone.unary, whole.unary, atol=1e-6)
    linked = block.pairwise.any(axis=(1, 3))
    names = [name.partition(".")[0] for name in block.names]
    wanted = [[a == b and i != j for j, b in enumerate(names)] for i, a in enumerate(names)]
    assert linked.tolist() == wanted and linked.sum() == 8
    linked = block.pairwise != 0
    np.testing.assert_allclose(block.pairwise[linked], whole.pairwise[linked], atol=1e-6)


def test_blocks_are_the_smallest_modules_with_another_layer():
    names = ["stem", "s.0.conv1", "s.0.down.0", "s.1.att.out.dense", "s.1.att.q", "s.1.att.k", "s.1.mlp.dense", "head"]
    found = {a: [b for b, mate in zip(names, row, strict=True) if mate]
             for a, row in zip(names, clado.mates(names, "block"), strict=True)}  # fmt: skip
    assert found["stem"] == found["head"] == []
    assert found["s.0.conv1"] == ["s.0.down.0"] and found["s.0.down.0"] == ["s.0.conv1"]
    assert found["s.1.att.q"] == ["s.1.att.out.dense", "s.1.att.k", "s.1.mlp.dense"]


# ---- what it takes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", probes.ENGINES)
def test_losses_are_counted(engine):
    model, batches = nets.resnet(), [images(), images(seed=2)]
    depth, tried = 7, 3
    wanted = 1 + depth * tried + depth * (depth - 1) // 2 * tried**2
    scores = clado_of(model, batches, bits=(2, 4, 8), engine=engine)
    assert scores.provenance["losses"] == wanted and scores.provenance["evaluations"] == 2 * wanted
    planned = mq.plan(model, batches, method="clado", bits=(2, 4, 8), engine=engine)
    assert planned.evaluations == wanted and planned.forwards == scores.provenance["forwards"]


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


def test_the_frontier_takes_a_third_of_the_passes():
    batch = torch.randn(2, 1, 8, 8), torch.arange(2)
    frontier, naive = (mq.plan(ResNet8(), [batch], method="clado", engine=e) for e in probes.ENGINES)
    assert naive.forwards == naive.evaluations == frontier.evaluations == 436
    assert naive.forwards > 3.3 * frontier.forwards


@pytest.mark.slow
def test_the_frontier_is_faster():
    model, batch = ResNet8().eval(), (torch.randn(8, 1, 8, 8), torch.arange(8))
    seconds = {engine: [] for engine in probes.ENGINES}
    for _ in range(2):
        for engine in probes.ENGINES:
            start = time.process_time()
            mq.score(model, [batch], method="clado", engine=engine)
            seconds[engine].append(time.process_time() - start)
    assert min(seconds["naive"]) > 1.5 * min(seconds["frontier"])


# ---- memory, limits, failures ------------------------------------------------------------------------


def test_batches_that_do_not_fit_are_split():
    model, batch = case("resnet")
    whole = clado_of(model, [batch])
    planned = mq.plan(model, [batch], method="clado", bits=SCHEMES)
    tight = clado_of(model, [batch], memory=planned.bytes // 2)
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


@pytest.mark.parametrize("engine", probes.ENGINES)
@pytest.mark.parametrize("most", [1, 9, 17])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, engine, most):
    model, batches = Recurrent().eval(), [torch.randn(5, 8), torch.randn(4, 8)]
    whole = clado_of(model, batches, engine=engine)
    stops, found = 0, None
    while found is None:
        try:
            found = clado_of(model, batches, engine=engine, bank=tmp_path, max_evals=most)
        except mq.Unfinished:
            stops += 1
    assert stops == {1: 7, 9: 3, 17: 1}[most] and same(found, whole)
    assert clado_of(model, batches, engine=engine, bank=tmp_path).provenance["evaluations"] == 0
    more = clado_of(model, [*batches, torch.randn(3, 8)], engine=engine, bank=tmp_path)
    assert more.provenance["evaluations"] == more.provenance["losses"] == 1 + 3 * 2 + 3 * 4


def test_the_model_is_left_as_found():
    model, batch = case("resnet")
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    calls = []

    def fails(module, args):
        calls.append(module)
        if len(calls) == 40:
            raise RuntimeError("out of order")

    handle = model[6].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="out of order"):
        clado_of(model, [batch])
    handle.remove()
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0] and torch.equal(p, before[name][1])
    for module in model.modules():
        assert "forward" not in vars(module) and not module._forward_pre_hooks


def test_options_are_checked():
    model, batch = case("resnet")
    for name, value in [("engine", "fast"), ("pairs", "some"), ("baseline", "best"), ("shrink", "x"), ("trim", 0.5)]:
        with pytest.raises(ValueError, match=f"{name}={value!r}; wanted"):
            clado_of(model, [batch], **{name: value})
