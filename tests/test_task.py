"""What a batch may be, what is run, and what the losses are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpqkern.held import held
from mpqkern.measuring.task import Task, cross_entropy, divergence
from mpqkern.rounding.twin import rounded
from mpqkern.scheme import Scheme
from mpqkern.scores.variants import Variants

from . import nets


def pair(n=6):
    return torch.randn(n, 3, 8, 8), torch.arange(n) % 5


def test_layers_have_the_work_of_one_sample():
    task = Task(nets.resnet(), [pair(6)])
    assert [x.name for x in task.layers][:2] == ["0", "2.conv1"]
    assert task.layers[0].macs == 6 * 27 * 64 and task.layers[-1].macs == 12 * 5


@pytest.mark.parametrize(
    "batches",
    [pair(), [pair(), pair(3)], iter([pair()]), [list(pair())], [pair()[0]], pair()[0]],
    ids=["pair", "pairs", "iterator", "list pair", "tensors", "tensor"],
)
def test_batches_of_any_kind(batches):
    task = Task(nets.resnet(), batches)
    task.prepare()
    for i in range(len(task.batches)):
        losses = task.losses(task.run(task.batches[i]), i)
        assert losses.dtype == torch.float64 and losses.shape == (task.sizes[i],)


def test_keywords_and_dictionaries():
    ids = torch.arange(12).view(2, 6)
    task = Task(nets.Keywords(), [{"ids": ids, "mask": torch.ones(2, 6), "labels": (ids + 1) % 20}])
    assert task.loss_name == "ce"
    output = task.run(task.batches[0])
    want = F.cross_entropy(output["logits"].double().flatten(0, 1), ((ids + 1) % 20).flatten(), reduction="none")
    torch.testing.assert_close(task.losses(output, 0), want.view(2, 6).mean(1))


def test_forward_and_loss_of_ones_own():
    task = Task(
        nets.resnet(),
        [{"pixels": pair()[0], "target": torch.ones(6)}],
        forward=lambda model, batch: model(batch["pixels"]),
        loss=lambda output, batch: (output[:, 0] - batch["target"]).square(),
    )
    output = task.run(task.batches[0])
    assert torch.equal(task.losses(output, 0), (output[:, 0] - 1).square().double())


def test_a_loss_for_each_sample_is_wanted():
    task = Task(nets.resnet(), [pair()], loss=lambda output, batch: output.mean())
    with pytest.raises(ValueError, match=r"loss\(output, batch\) returned \[\]; wanted .* a tensor \[6\]"):
        task.losses(task.run(task.batches[0]), 0)


def test_losses_by_hand():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    labels = torch.tensor([1, 2])
    want = -torch.log_softmax(logits.double(), -1)[[0, 1], [1, 2]]
    torch.testing.assert_close(cross_entropy(logits, labels), want)
    words = torch.stack([logits, logits.flip(0)])  # [2 samples, 2 words, 3]
    some = torch.tensor([[1, -100], [2, 0]])  # -100: not counted
    got = cross_entropy(words, some)
    lost = -torch.log_softmax(words.double(), -1)
    torch.testing.assert_close(got, torch.stack([lost[0, 0, 1], (lost[1, 0, 2] + lost[1, 1, 0]) / 2]))
    p, q = torch.softmax(logits.double(), -1), torch.softmax(logits.double() * 2, -1)
    torch.testing.assert_close(divergence(logits, logits * 2), (p * (p / q).log()).sum(-1))
    assert divergence(logits, logits).abs().max() == 0


def test_divergence_is_from_the_model_as_it_was():
    model = nets.resnet()
    task = Task(model, [pair()[0]])
    task.prepare()
    with held(model):
        assert task.losses(task.run(task.batches[0]), 0).abs().max() == 0
        model[6].weight.data = torch.zeros_like(model[6].weight)
        assert task.losses(task.run(task.batches[0]), 0).min() > 0


def test_mistakes():
    task = Task(nets.resnet(), [(torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 0, -100]))])
    logits = torch.eye(5)[[0, 1, 1, 2, 3]]
    assert task.mistakes(logits, 0).tolist() == [0, 0, 1, 1, 0]


def test_layers_that_share_a_weight_are_one():
    task = Task(nets.Tied(), [torch.randn(2, 12)])
    assert [x.name for x in task.layers] == ["a", "middle"]
    assert [x.macs for x in task.layers] == [2 * 144, 144]
    assert len(task.modules[0]) == 2


def test_some_layers():
    assert [x.name for x in Task(nets.resnet(), [pair()], layers=["2.*", "6"]).layers] == ["2.conv1", "2.conv2", "6"]
    with pytest.raises(ValueError, match="pattern='haed' matches no layer"):
        Task(nets.resnet(), [pair()], layers=["haed"])


def test_unreached_layers_are_named(caplog):
    Task(nets.Functional(), [torch.randn(2, 8)])
    assert "does not reach unused" in caplog.text


def test_names_of_contents():
    x, y = pair()
    a, b = Task(nets.resnet(), [(x, y)]), Task(nets.resnet(), [(x, y), (x + 1, y), (x, y + 1)])
    assert a.fingerprint() == b.fingerprint() and a.digest(0) == b.digest(0)
    assert len({b.digest(i) for i in range(3)}) == 3
    a.model[6].bias.data[0] += 1e-6
    assert a.fingerprint()["model"] != b.fingerprint()["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model=int; wanted a torch.nn.Module"),
        ({"batches": []}, "batches is empty"),
        ({"batches": 5}, "batches=5; wanted a batch or an iterable"),
        ({"batches": [{"a": 1}]}, "without tensors"),
        ({"layers": "60"}, "layers='60'; wanted a list of patterns"),  # not layers 6 and 0
        ({"loss": "mse"}, "loss='mse'; wanted 'ce', 'kl' or a callable"),
        ({"model": nn.Sequential(nn.ReLU())}, "no layer that can be packed"),
        ({"model": nn.Conv2d(3, 4, 3)}, "no layer that can be packed; the model: it is the model itself; wrap it"),
    ],
)
def test_errors_name_what_was_wanted(arguments, message):
    arguments = {"model": nets.resnet(), "batches": [pair()], **arguments}
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
        Task(arguments.pop("model"), arguments.pop("batches"), **arguments)


def test_labels_beyond_the_classes():
    task = Task(nets.resnet(), [(torch.randn(2, 3, 8, 8), torch.tensor([-100, 5]))])
    with pytest.raises(ValueError, match=r"labels reach 5 for logits of 5 classes; wanted 0 to 4, or below 0"):
        task.losses(task.run(task.batches[0]), 0)


def test_a_model_of_two_inputs_is_told_how_to_get_them():
    with pytest.raises(
        TypeError, match=r"does not take the first part of a batch alone .*; wanted \(inputs, labels\) pa"
    ):
        Task(nn.Bilinear(4, 4, 2), [(torch.randn(2, 4), torch.randn(2, 4))])

    class Wrong(nn.Linear):
        def forward(self, x):
            return len(5)

    with pytest.raises(TypeError, match=r"^object of type 'int' has no len"):
        Task(Wrong(4, 4), [(torch.randn(2, 4), torch.arange(2))])


def test_labels_of_the_wrong_kind():
    task = Task(nets.resnet(), [(torch.randn(2, 3, 8, 8), torch.rand(2, 5))])
    with pytest.raises(ValueError, match=r"labels are torch.float32 \[2, 5\] for logits \[2, 5\]; wanted class"):
        task.losses(task.run(task.batches[0]), 0)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_width_rounds_to_its_own_number_of_levels(bits, symmetric):
    weight = torch.rand(3, 700) * 2 - 1
    got = rounded(weight, Scheme(bits, symmetric=symmetric, scale_dtype="float32"))
    levels = [len(row.unique()) for row in got]
    assert max(levels) <= 2**bits and min(levels) >= min(2**bits, 200) * 0.7
    step = (weight.amax(1) - weight.amin(1)) / (2**bits - 1)
    if not symmetric:
        assert ((got - weight).abs().amax(1) <= step * 0.5001).all()


@pytest.mark.parametrize("name", ["2.conv1", "6"])
def test_variants_are_what_packed_layers_compute_with(name):
    import mpqkern as mq

    model, scheme = nets.resnet(), Scheme(4, act_bits=8)
    task = Task(model, [pair()])
    variants = Variants(task, [None, scheme], "mse")
    layer = [x.name for x in task.layers].index(name)
    float_output = task.run(task.batches[0])
    with variants.applied({layer: 0}):
        assert torch.equal(task.run(task.batches[0]), float_output)
    with variants.applied({layer: 1}):
        got = task.run(task.batches[0])
    assert not torch.equal(got, float_output) and torch.equal(task.run(task.batches[0]), float_output)
    mq.swap_(model, {name: scheme}, rounding="mse")
    with torch.no_grad():
        torch.testing.assert_close(got, task.run(task.batches[0]), rtol=1e-4, atol=1e-5)


def test_variants_are_kept_only_as_far_as_memory_goes(monkeypatch):
    task = Task(nets.resnet(), [pair()])
    variants = Variants(task, [Scheme(2), Scheme(4)])
    most = 3 * task.layers[2].params * 4
    monkeypatch.setattr("mpqkern.scores.variants.CACHE_BYTES", most)
    for layer in range(len(task.layers)):
        for scheme in range(2):
            want = rounded(variants.parameter(layer).detach(), variants.schemes[scheme])
            assert torch.equal(variants.weight(layer, scheme), want)
            held_bytes = sum(t.nbytes for t in variants._kept.values())
            assert held_bytes <= max(most, want.nbytes)
