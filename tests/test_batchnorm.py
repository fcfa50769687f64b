"""fold_batchnorm_: exact where it can be done, nothing touched where it cannot, all or nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpqkern as mq
from bench.models.networks import ResNet8

from . import nets
from .reference.rewriting import bits, distance, stopping


def lived(model: nn.Module) -> nn.Module:
    """With norms that have seen something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.1, 3),
                (module.weight, -2, 2),
                (module.bias, -1, 1),
            ):
                if tensor is not None:
                    nn.init.uniform_(tensor, low, high)
    return model.eval()


def norms(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_by_hand() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, eps=1.0)).eval()
    for tensor, value in zip([*model.parameters(), *model.buffers()], (2, 3, 8, 1, 5, 3), strict=False):
        tensor.data.fill_(value)
    report = mq.fold_batchnorm_(model, torch.ones(4, 1))
    # 8 (2 x + 3 - 5) / sqrt(3 + 1) + 1 = 8 x - 7
    assert (model[0].weight.item(), model[0].bias.item()) == (8, -7)
    assert isinstance(model[1], nn.Identity) and model[1].training is False
    assert [(row.name, row.note) for row in report.done] == [("0 -> 1", "weights scaled by 4 to 4")]
    assert "done" in str(report) and not report.left


class Rows(nn.Module):
    """A norm over the features of a sequence, which BatchNorm1d wants at axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).transpose(1, 2)).relu_()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), (2, 6, 5, 5)),
        (nn.Sequential(nn.Conv2d(6, 4, 3, groups=2), nn.BatchNorm2d(4, affine=False)), (2, 6, 5, 5)),
        (nn.Sequential(nn.Conv2d(6, 6, 3, groups=6, padding_mode="circular"), nn.BatchNorm2d(6)), (2, 6, 5, 5)),
        (nn.Sequential(nn.Linear(6, 4, bias=False), nn.Identity(), nn.BatchNorm1d(4)), (7, 6)),
        (nn.Sequential(nn.Linear(6, 4), nn.Dropout(), nn.BatchNorm1d(4, affine=False), nn.SiLU()), (7, 6)),
        (Rows(), (2, 3, 6)),
    ],
)
def test_every_kind_of_layer_and_norm(model: nn.Module, shape: tuple[int, ...]) -> None:
    for module in model.modules():  # made before the seed was set
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    lived(model)
    x = torch.randn(shape)
    want = model(x)
    report = mq.fold_batchnorm_(model, (x, torch.zeros(len(x))))
    assert len(report.done) == 1 and not norms(model)
    assert distance(want, model(x)) < 1e-4 and report.error <= report.tolerance < 1e-4


def test_resnet8() -> None:
    torch.manual_seed(1)
    model, x = lived(ResNet8()), torch.randn(16, 1, 8, 8)
    names, want = [name for name, _ in model.named_modules()], model(x)
    report = mq.fold_batchnorm_(model, x)
    assert len(report.done) == 7 and not report.left and not norms(model)
    assert distance(want, model(x)) < 1e-5 and [name for name, _ in model.named_modules()] == names
    other = torch.randn(4, 1, 8, 8)
    assert distance(lived(ResNet8())(other), model(other)) > 0.1  # not just any model
    assert not mq.fold_batchnorm_(model, x).rows


class Odd(nn.Module):
    """What a convolution and a norm may do to each other besides following one another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.norm = how, nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.twin = nn.Conv2d(3, 4, 1) if how in ("shared", "expert") else None
        if how == "shared":
            self.twin.weight = self.conv.weight
        if how == "statistics":
            self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        if how == "subclass":
            self.norm = type("Norm", (nn.BatchNorm2d,), {})(4)
        if how == "parametrized":
            nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        between = F.relu(y) if self.how == "relu" else y[:, [1, 0, 2, 3]] if self.how == "index" else y
        between = y.view(2, 2, 2, 4, 4).transpose(1, 2).reshape(2, 4, 4, 4) if self.how == "shuffled" else between
        z = self.norm(x[:, [0, 1, 2, 2]] if self.how == "unfed" else between)
        if self.how == "twice":
            z = self.norm(z)
        if self.how == "weight":
            z = z * self.norm.weight.sum()
        if self.how == "shortcut":
            return z + y
        return z + self.twin(x) if self.how == "shared" else z


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("shortcut", "the output of conv also goes into add"),
        ("relu", "relu lies between conv and it"),
        ("index", "no Linear or Conv2d feeds it directly"),
        ("unfed", "no Linear or Conv2d feeds it directly"),
        ("shuffled", "the channels of conv are rearranged before it"),
        ("twice", "it is called 2 times in a pass"),
        ("weight", "its weight is read outside its own calls"),
        ("shared", "conv feeds it: its weight is shared with twin.weight"),
        ("statistics", "it has no running statistics (track_running_stats=False)"),
        ("subclass", "a Norm is not folded"),
        ("expert", "twin, which the batch does not reach, might on other data feed the same or read the same"),
        ("parametrized", "conv feeds it: its weight is parametrized; remove the parametrization first"),
    ],
)
def test_what_cannot_be_folded_is_left_with_the_reason(how: str, reason: str) -> None:
    model = Odd(how).eval() if how == "statistics" else lived(Odd(how))
    before = bits(model)
    report = mq.fold_batchnorm_(model, torch.randn(2, 3, 4, 4))
    assert bits(model) == before and not report.done
    assert [(row.name, row.note) for row in report.left] == [("norm", reason)]


def test_odd_models_keep_their_answers() -> None:
    model, x = nets.resnet(), torch.randn(4, 3, 8, 8)
    want = model(x)
    assert len(mq.fold_batchnorm_(model, x).done) == 4 and distance(want, model(x)) < 1e-5
    ids = {"ids": torch.randint(20, (3, 5)), "mask": torch.ones(3, 5), "labels": torch.zeros(3)}
    for model, batch in ((nets.Functional(), torch.randn(3, 8)), (nets.Keywords(), ids)):
        assert not mq.fold_batchnorm_(model, batch).rows


def test_hooks_modes_and_trainability_stay() -> None:
    model = lived(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    seen: list[str] = []
    model[1].register_forward_hook(lambda *_: seen.append("norm"))
    handle = model[0].register_forward_hook(lambda *_: seen.append("conv"))
    model[0].weight.requires_grad_(False)
    model.train()
    weight = model[0].weight
    mq.fold_batchnorm_(model, torch.randn(2, 3, 4, 4))
    assert model[1].training and model[0].weight is weight and not weight.requires_grad and model[0].bias.requires_grad
    seen.clear()
    handle.remove()
    model(torch.randn(2, 3, 4, 4))
    assert seen == ["norm"]


class Hidden(nn.Module):
    """Its norm also runs from a list, which no replacement reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.good = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.steps = [self.norm]

    def forward(self, x: Tensor) -> Tensor:
        return self.steps[0](self.conv(self.good(self.first(x))))


def test_a_change_of_the_outputs_is_refused_and_named() -> None:
    model = lived(Hidden())
    before = bits(model)
    with pytest.raises(
        ValueError, match=r"rewriting 'conv -> norm' moves the outputs by \d.*e.* the model is as it was"
    ):
        mq.fold_batchnorm_(model, torch.randn(4, 3, 4, 4))
    assert bits(model) == before


@pytest.mark.parametrize("at", range(1, 6))  # the pass that looks, the answers before, two with rounding, those after
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_stopped_at_any_pass_the_model_is_as_found(at: int, error: type[BaseException]) -> None:
    model = lived(nets.resnet()).train()
    before = bits(model)
    with pytest.raises(error, match="stopped"):
        mq.fold_batchnorm_(model, torch.randn(4, 3, 8, 8), forward=stopping(at, error))
    assert bits(model) == before


def test_called_in_inference_mode() -> None:
    model = lived(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)))
    with torch.inference_mode():
        x = torch.randn(2, 3, 4, 4)
        reports = mq.fold_batchnorm_(model, x), mq.equalize_(model, x)
    assert [len(report.done) for report in reports] == [1, 1]
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.inference_mode():
        frozen = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
        with pytest.raises(ValueError, match="model holds tensors made in inference mode"):
            mq.fold_batchnorm_(frozen, torch.randn(3, 2))


def test_errors_say_what_was_wanted() -> None:
    model = lived(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    with pytest.raises(TypeError, match=r"model=dict; wanted a torch.nn.Module"):
        mq.fold_batchnorm_({}, torch.randn(2, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batches is empty"):
        mq.fold_batchnorm_(model, [])
    with pytest.raises(TypeError, match="batches='x'"):
        mq.fold_batchnorm_(model, "x")
    with pytest.raises(ValueError, match=r"a batch is a tuple of 3; wanted .* or forward="):
        mq.fold_batchnorm_(model, (torch.randn(2, 3),) * 3)
    with pytest.raises(ValueError, match="no float tensor to compare"):
        mq.fold_batchnorm_(model, torch.randn(2, 3), forward=lambda m, x: m(x).argmax(1))


def test_outputs_that_nothing_can_be_compared_with():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(ValueError, match="outputs are all infinities or NaN"):
        mq.fold_batchnorm_(model, torch.full((2, 3, 5, 5), float("nan")))
    assert isinstance(model[1], nn.BatchNorm2d)
