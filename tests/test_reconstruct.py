"""Rounding by the outputs of parts: as good as it can be, never worse than its start, the same on every run."""

import itertools

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern.held import held
from mpqkern.measuring.bank import Bank
from mpqkern.measuring.meter import Meter
from mpqkern.measuring.task import Task
from mpqkern.rounding import BRECQ, UWC, AdaRound, MinMax, calibrate
from mpqkern.rounding.adaround import Search, Softened
from mpqkern.rounding.examples import examples
from mpqkern.rounding.grid import Grid
from mpqkern.rounding.partition import parts
from mpqkern.scores.variants import Variants

from . import nets
from .test_held import everything

IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name].codes, b[name].codes) for name in a)


def off(model, rounded, batch):
    """Mean squared error of the model's output."""
    with held(model):
        wanted = model(batch)
        with rounded.twin(model):
            return float((model(batch) - wanted).double().square().mean())


def test_a_layer_comes_near_the_best_of_all_roundings():
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(200, 6, generator=draw) + 2 * torch.randn(200, 1, generator=draw)
    model = nn.Sequential(nn.Linear(6, 12, bias=False))
    rows, h = model[0].weight.detach().double(), x.double().T @ x.double()
    found = calibrate(model, {"*": 2}, x, rounding=AdaRound(start="minmax", batch=64, iterations=400))["0"]
    grid = Grid.fit(rows.float(), mq.Scheme(2))
    place = rows / grid.scale + grid.zero

    def damage(codes):
        e = grid.values(codes) - rows
        return ((e @ h) * e).sum(1)

    low = place.floor().clamp(0, 2)
    best = torch.stack([damage(low + torch.tensor(up)) for up in itertools.product((0.0, 1.0), repeat=6)]).amin(0)
    own, nearest = damage(found.codes.double()), damage(grid.nearest(rows))
    assert (own <= nearest * (1 + 1e-9)).all() and own.sum() < 0.75 * nearest.sum()
    assert own.sum() < 1.05 * best.sum() and (own >= best * (1 - 1e-9)).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("grid", [{}, {"symmetric": True}, {"group_size": 32}])
def test_a_start_hardens_to_its_own_codes_and_ends_next_to_them(bits, grid):
    rows, scheme = torch.randn(7, 70), mq.Scheme(bits, **grid)
    start = MinMax().round(rows, scheme)
    start.codes[0] = torch.randint(2**bits, (70,), dtype=torch.uint8)  # as ways that make up for errors leave them
    soft = Softened(rows, start, bits)
    assert torch.equal(soft.chosen(soft.hard()).codes, start.codes)
    assert torch.equal(soft.values(soft.hard()), start.values())
    soft.v.data = torch.randn_like(soft.v)
    ended = soft.chosen(soft.hard())
    assert (ended.codes.int() - start.codes.int()).abs().max() == 1 and ended.codes.max() <= 2**bits - 1
    assert torch.equal(soft.values(soft.hard()), ended.values())


def test_steps_that_lead_nowhere_leave_the_start():
    model = nets.resnet()
    start = calibrate(model, {"*": 2}, IMAGES, rounding="gptq")
    assert equal(calibrate(model, {"*": 2}, IMAGES, rounding=UWC(iterations=2, rate=1e-9)), start)


@pytest.mark.parametrize("rate", [0.1, 30.0])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_never_worse_than_the_start(rate, act_bits):
    model, plan = nets.resnet(), {"*": mq.Scheme(2, act_bits=act_bits)}
    method = UWC(iterations=40, rate=rate, partition="unit:9", start="minmax")
    before = off(model, calibrate(model, plan, IMAGES, rounding=method.start), IMAGES)
    after = off(model, calibrate(model, plan, IMAGES, rounding=method), IMAGES)
    assert after < 0.9 * before if rate == 0.1 else after <= before * (1 + 1e-5)


@pytest.mark.parametrize("method", [AdaRound, BRECQ, UWC])
def test_every_wiring_is_rounded_better_than_by_its_start(method):
    for model, batch in (
        (nets.Functional(), torch.randn(64, 8)),
        (nets.Reused(), torch.randn(64, 8)),
        (nets.Tied(), torch.randn(64, 12)),
        (nets.transformer(), torch.randn(32, 5, 8)),
    ):
        rounding = method(iterations=40, start="minmax")
        better = calibrate(model, {"*": 2}, batch, rounding=rounding)
        assert off(model, better, batch) < off(model, calibrate(model, {"*": 2}, batch, rounding="minmax"), batch)


def test_a_packed_model_computes_what_was_found():
    model = nets.resnet()
    rounded = calibrate(model, {"*": 4}, IMAGES, rounding=BRECQ(iterations=20))
    with held(model), rounded.twin(model):
        wanted = model(IMAGES)
    mq.swap_(model, {"*": 4}, rounding=BRECQ(iterations=20), batches=IMAGES)
    torch.testing.assert_close(model(IMAGES), wanted, rtol=1e-4, atol=1e-4)


def test_bit_for_bit_the_same_on_every_run():
    model, method = nets.resnet(), BRECQ(iterations=10, drop=0.5)
    torch.manual_seed(5)
    first, state = calibrate(model, {"*": 2}, IMAGES, rounding=method), torch.get_rng_state()
    torch.manual_seed(6)
    assert equal(calibrate(model, {"*": 2}, IMAGES, rounding=method), first)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert not equal(calibrate(model, {"*": 2}, IMAGES, rounding=method, seed=1), first)


def test_a_run_that_was_killed_goes_on_to_the_same_result(tmp_path, monkeypatch):
    model, method = nets.resnet(), BRECQ(iterations=10)
    whole, put = calibrate(model, {"*": 2}, IMAGES, rounding=method), Bank.put

    def killed(bank, key, **arrays):
        put(bank, key, **arrays)
        if key == "layer1":  # the first of two in a block
            raise KeyboardInterrupt

    before = everything(model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Bank, "put", killed)
        calibrate(model, {"*": 2}, IMAGES, rounding=method, bank=tmp_path)
    assert everything(model) == before
    assert equal(calibrate(model, {"*": 2}, IMAGES, rounding=method, bank=tmp_path), whole)
    monkeypatch.setattr(Search, "best", lambda self: pytest.fail("a part is made again"))
    assert equal(calibrate(model, {"*": 2}, IMAGES, rounding=method, bank=tmp_path), whole)


def test_a_time_limit_stops_between_parts(tmp_path):
    model, options = nets.resnet(), {"rounding": BRECQ(iterations=2), "bank": tmp_path, "time_limit": 1e-9}
    for _ in range(3):  # of four parts
        with pytest.raises(mq.Unfinished):
            calibrate(model, {"*": 2}, IMAGES, **options)
    found = calibrate(model, {"*": 2}, IMAGES, **options)
    assert equal(found, calibrate(model, {"*": 2}, IMAGES, rounding=BRECQ(iterations=2)))


def test_ctrl_c_leaves_the_model_as_it_was(monkeypatch):
    def pressed(self, rows, scales):
        raise KeyboardInterrupt

    model = nets.resnet()
    before = everything(model)
    monkeypatch.setattr(Search, "sampled", pressed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, {"*": mq.Scheme(2, act_bits=8)}, IMAGES, rounding="uwc")
    assert everything(model) == before


def found_examples(model, batches, partition, twin=None, **options):
    task = Task(model, batches)
    with held(model):
        return [
            examples(task, part, twin, **{"both": False, "memory": 2**30, **options}) for part in parts(task, partition)
        ]


def test_examples_are_what_the_float_model_returns_and_the_rounded_one_gives():
    model, seen = nets.resnet(), {}
    twin = calibrate(model, {"0": 2}, IMAGES, rounding="minmax").twin(model)
    first = found_examples(model, list(IMAGES.split(32)), "block", twin, both=True)[1]
    handle = model[2].register_forward_hook(lambda m, args, out: seen.update(x=args[0].clone(), y=out.clone()))
    with held(model):
        model(IMAGES[32:])
        assert torch.equal(first[1].wanted, seen["y"]) and torch.equal(first[1].float_given[0][0], seen["x"])
        with twin:
            model(IMAGES[32:])
    handle.remove()
    assert torch.equal(first[1].given[0][0], seen["x"]) and not torch.equal(first[1].wanted, seen["y"])
    assert [example.size for example in first] == [32, 16] and not any(example.whole for example in first)


def test_a_share_of_the_inputs_is_the_float_models():
    model = nets.resnet()
    twin = calibrate(model, {"0": 2}, IMAGES, rounding="minmax").twin(model)
    example = found_examples(model, IMAGES, "block", twin, both=True)[1][0]
    picked, draw = torch.tensor([4, 7]), torch.Generator().manual_seed(0)
    y, x = example.given[0][0][picked], example.float_given[0][0][picked]
    for share in (0.0, 0.5, 1.0):
        ((mixed,), _), wanted = example.piece(picked, share, draw)
        assert torch.equal(wanted, example.wanted[picked])
        assert ((mixed == x) | (mixed == y)).all()
        assert abs(float((mixed == x)[x != y].float().mean()) - share) < 0.1


def test_memory_bounds_the_examples(caplog):
    model, batches = nets.resnet(), list(IMAGES.split(16))
    each = found_examples(model, batches[:1], "layer")[0][0].bytes
    assert each == 4 * 16 * 64 * (3 + 6)
    assert len(found_examples(model, batches, ["0"], memory=2 * each)[0]) == 2
    assert f"memory={2 * each} holds 2 of 3 batches of 0" in caplog.text
    with pytest.raises(ValueError, match=f"memory={each - 1}; wanted at least {each} bytes for one batch of 0"):
        found_examples(model, batches, ["0"], memory=each - 1)


class Turned(nn.Module):
    """Attention with time as the first axis: a few of its rows alone give something else."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.a(x)
        alike = torch.softmax(torch.einsum("tbc,sbc->bts", x, x), -1)
        return x + self.b(torch.einsum("bts,sbc->tbc", alike, x))


class Counting(nn.Module):
    """Returns something else each time."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(8, 8), nn.Linear(8, 8), 0

    def forward(self, x):
        self.calls += 1
        return self.b(self.a(x)) + self.calls


def test_samples_that_depend_on_each_other_stay_together():
    model = nn.Sequential(Turned(), nn.Linear(8, 4))
    block, last = found_examples(model, torch.randn(6, 5, 8), "block")
    assert block[0].whole and not last[0].whole
    calibrate(model, {"*": 2}, torch.randn(6, 5, 8), rounding=BRECQ(iterations=3))


def test_what_cannot_be_called_again_is_rounded_layer_by_layer(caplog):
    model = nn.Sequential(Counting(), nn.Linear(8, 4))
    found = calibrate(model, {"*": 2}, torch.randn(32, 8), rounding=BRECQ(iterations=3))
    assert "0 is rounded layer by layer: it returns something else when it is called again" in caplog.text
    assert list(found) == ["0.a", "0.b", "1"]


def test_bias_correction_keeps_the_mean_of_each_output():
    model, plan = nets.resnet(), {"*": 2}
    plain, moved = (
        calibrate(model, plan, IMAGES, rounding=UWC(iterations=5, partition="unit:9"), correct_bias=b)
        for b in (False, True)
    )
    assert all(codes.shift is None for codes in plain.values())
    with held(model):
        wanted = model(IMAGES).mean(0)
        with plain.twin(model):
            before = model(IMAGES).mean(0) - wanted
        with moved.twin(model):
            after = model(IMAGES).mean(0) - wanted
    assert after.abs().max() < 1e-4 < before.abs().max()


def test_inference_mode_changes_nothing():
    method = BRECQ(iterations=20)
    model = nets.resnet()
    want = calibrate(model, {"*": 2}, IMAGES, rounding=method)
    with torch.inference_mode():
        found = calibrate(model, {"*": 2}, IMAGES.clone(), rounding=method)
        assert torch.is_inference_mode_enabled()
        made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        calibrate(made, {"*": mq.Scheme(8, act_bits=8)}, torch.randn(8, 4))
        with pytest.raises(ValueError, match="model holds tensors made in inference mode"):
            calibrate(made, {"*": 4}, torch.randn(8, 4), rounding=method)
    assert all(torch.equal(want[name].codes, found[name].codes) for name in want)


def test_scores_of_single_layers_round_by_gptq():
    model = nets.resnet()
    tables = []
    for rounding in ("brecq", "gptq"):
        variants = Variants(Task(model, IMAGES), [mq.Scheme(2)], rounding)
        with held(model):
            variants.prepare(Bank(None, {}), Meter(), memory=2**30, seed=0)
            tables.append(variants.weight(2, 0))
    assert torch.equal(*tables)
    with pytest.raises(TypeError, match="'adaround' looks at the outputs of parts of a model"):
        AdaRound().round(torch.zeros(1, 4), mq.Scheme(2))


@pytest.mark.parametrize(
    "options",
    [
        *({"iterations": 0}, {"batch": 1.5}, {"rate": 0}, {"lam": -1}, {"warmup": 2}, {"drop": -0.1}, {"patience": 0}),
        *({"iterations": True}, {"rate": "0.05"}, {"lam": float("inf")}, {"drop": True}),
        *({"start": "brecq"}, {"act_scales": 1}, {"partition": "unit"}),
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(options))}=.*; wanted"):
        AdaRound(**options)


def test_patience_ends_a_search_that_gains_nothing(monkeypatch):
    steps, gradients = [], Search.gradients
    monkeypatch.setattr(Search, "gradients", lambda self, *args: steps.append(1) or gradients(self, *args))
    model = nn.Sequential(nn.Linear(8, 4))
    calibrate(model, {"*": 2}, torch.randn(32, 8), rounding=AdaRound(iterations=100, rate=1e-9, patience=3))
    assert len(steps) == 20 + 3 * 5  # the warm-up, and three checks


@pytest.mark.parametrize("act_bits", [None, 8])
def test_the_error_that_counts_is_that_of_the_packed_model(act_bits, monkeypatch):
    def first(search):
        hard = {layer: soft.hard() for layer, soft in search.soft.items()}
        errors.append(search.error(hard, {}))
        return hard, {}, 1.0

    errors, model, plan = [], nets.resnet(), {"*": mq.Scheme(8, act_bits=act_bits)}
    monkeypatch.setattr(Search, "best", first)
    start = calibrate(model, plan, IMAGES, rounding=UWC(partition="unit:9"))
    assert errors == pytest.approx([off(model, start, IMAGES)], rel=1e-4)


def test_inputs_that_are_written_to_later_are_kept_as_they_were():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            z = x * 2
            return self.b(self.a(z) + z.zero_())

    x = torch.randn(6, 8)
    (example,), _ = found_examples(Overwrites(), x, "layer")
    assert torch.equal(example.given[0][0], x * 2)
