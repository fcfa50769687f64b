"""A run from the middle of a model equals the whole run, bit for bit, whatever the model is wired like."""

import pytest
import torch
from torch import nn

from mpqkern.held import held
from mpqkern.measuring.task import Task, logits_of
from mpqkern.scheme import Scheme
from mpqkern.scores.nothing import Nothing, Shape
from mpqkern.scores.replay import Replay
from mpqkern.scores.variants import Variants

from . import nets

SCHEMES = [Scheme(2), Scheme(4, act_bits=8)]


def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def words():
    ids = torch.arange(18).view(3, 6) % 20
    return {"ids": ids, "mask": (ids % 5 > 0).float()}


class Asking(nn.Module):
    """Looks at what comes out of its modules, and at what it makes of that."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = torch.relu(self.a(x))
        y = self.b(y.view(y.shape[0], 8))
        return self.c(y if y.max() > 0 else y.relu())


CASES = {
    "asking": (Asking, lambda: torch.randn(5, 8)),
    "reused": (nets.Reused, lambda: torch.randn(5, 8)),
    "tied": (nets.Tied, lambda: torch.randn(5, 12)),
    "resnet": (nets.resnet, images),
    "functional": (nets.Functional, lambda: torch.randn(5, 8)),
    "transformer": (nets.transformer, lambda: torch.randn(3, 5, 8)),
    "keywords": (nets.Keywords, words),
}


def case(name):
    make, batch = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    task = Task(model, [batch()])
    return model, task, Variants(task, SCHEMES)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [1, 3])
def test_perturbed_pairs_from_the_middle(name, chunk):
    model, task, variants = case(name)
    with held(model):
        replay = Replay(task, 0)
        assert replay.why_not is None
        states = {(): replay.start()}  # by the one layer that has been changed, and its scheme
        for position, layer in enumerate(replay.order):
            again = {made for made in states if made and replay.pending(made[0], position)}
            added = {}
            for scheme in range(len(SCHEMES)):
                for made in ({()} | again) if again else {()}:
                    group = [made] if made else [key for key in states if key not in again]
                    with variants.applied({**dict([made] if made else []), layer: scheme}):
                        outputs = replay.finish(position, [states[key] for key in group], chunk)
                    for key, output in zip(group, outputs, strict=True):
                        whole = replay_whole(task, variants, {**dict([key] if key else []), layer: scheme})
                        if chunk == 1:
                            assert torch.equal(logits_of(output), whole), (key, layer, scheme)
                        torch.testing.assert_close(logits_of(output), whole, rtol=1e-4, atol=1e-5)
                with variants.applied({layer: scheme}):
                    alone, added[layer, scheme] = replay.finish_and_advance(position, states[()])
                assert torch.equal(logits_of(alone), replay_whole(task, variants, {layer: scheme}))
            if position + 1 < replay.depth:
                moved = {}
                for made in again:
                    with variants.applied(dict([made])):
                        moved[made] = replay.advance(position, [states[made]])[0]
                rest = [key for key in states if key not in again]
                moved |= zip(rest, replay.advance(position, [states[key] for key in rest], chunk), strict=True)
                states = moved | added


def replay_whole(task, variants, choice):
    with variants.applied(choice):
        return logits_of(task.run(task.batches[0]))


def test_states_hold_only_what_is_needed():
    model, task, _ = case("resnet")
    with held(model):
        replay = Replay(task, 0)
    names = {module: name for name, module in model.named_modules()}
    needed = {
        task.layers[layer].name: [names[replay.calls.modules[key[0]]] for key in live]
        for layer, live in zip(replay.order, replay.live, strict=True)
    }
    assert needed["0"] == []
    assert needed["2.conv1"] == ["1"]
    assert needed["2.conv2"] == ["1", "2.act"]  # the block's input, for the shortcut, and the layer's own
    assert needed["3.conv1"] == ["2"]
    assert needed["6"] == ["5"]


def test_nothing_is_computed_from_what_is_skipped():
    for name, want in (("resnet", {None}), ("keywords", {None}), ("asking", {None, 0.0})):
        model, task, _ = case(name)
        with held(model):
            assert set(Replay(task, 0).fillings) == want, name


def test_nothing():
    one = torch.ones(2, 3)
    x = Nothing((2, 3), Shape(one))
    assert x.shape == (2, 3) and x.size(0) == 2 and x.dtype == one.dtype and x.device == one.device
    for made in (x + one, one * x, torch.cat([one, x]), x.relu().mean(1), torch.nn.functional.linear(x, one)):
        assert isinstance(made, Nothing)
        for ask in (lambda y: y.shape, lambda y: y.size(), bool, float, len, list, lambda y: y.item()):
            with pytest.raises(RuntimeError, match="nothing has no"):
                ask(made)


def test_skipped_layers_do_not_run(monkeypatch):
    model, task, _ = case("resnet")
    with held(model):
        replay = Replay(task, 0)
        ran = []
        for kind in (nn.Conv2d, nn.Linear):
            own = kind.forward
            monkeypatch.setattr(kind, "forward", lambda module, x, own=own: ran.append(module) or own(module, x))
        state = replay.start()
        assert ran == []
        for position in range(replay.depth - 1):
            state = replay.advance(position, [state])[0]
        assert ran == task_modules(task)[:-1]
        ran.clear()
        replay.finish(replay.depth - 1, [state])
    assert ran == [model[6]]


def task_modules(task):
    return [modules[0] for modules in task.modules]


def test_an_output_of_zeros_is_needed_all_the_same():
    model = nets.Reused()
    task = Task(model, [torch.randn(5, 8)])
    with held(model):
        replay = Replay(task, 0)
        live = replay.live[[task.layers[i].name for i in replay.order].index("last")]
    assert model.branch in [replay.calls.modules[key[0]] for key in live]


def test_macs_from_each_cut():
    model, task, _ = case("functional")
    with held(model):
        replay = Replay(task, 0)
    assert [task.layers[i].name for i in replay.order] == ["first", "twice", "last"]
    assert replay.macs() == [8 * 16 + 2 * 16 * 16 + 16 * 4, 2 * 16 * 16 + 16 * 4, 16 * 4]


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x) + torch.rand(4))


def test_a_model_that_cannot_be_cut_says_so():
    model = Random()
    task = Task(model, [torch.randn(2, 4)])
    with held(model):
        replay = Replay(task, 0)
    assert "cannot be left out" in replay.why_not and "b" in replay.why_not


def test_forwards_are_put_back():
    model, task, _ = case("resnet")
    own = model[1].forward
    model[1].forward = own  # a user's own forward on the instance
    replay = Replay(task, 0)
    model[6].register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("stop")))
    with pytest.raises(ValueError, match="stop"):
        replay.finish(2, [replay.advance(1, replay.advance(0, [replay.start()]))[0]])
    assert model[1].__dict__["forward"] is own
    assert all("forward" not in m.__dict__ for m in model.modules() if m is not model[1])
