"""What rounding is told of a layer's inputs: sums that equal unfold's, also in pairs, and the weights they ask for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpqkern import packed
from mpqkern.rounding import statistics
from mpqkern.rounding.statistics import Statistics, input_rows

CONVS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": "valid"},
    {"kernel_size": (2, 3), "padding": "same", "dilation": (2, 1)},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "groups": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 6},
    {"kernel_size": 1, "groups": 3},
]


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("how", CONVS, ids=str)
def test_rows_of_a_convolution_are_what_its_weights_are_multiplied_with(how: dict, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    module, x = nn.Conv2d(6, 12, bias=False, **how).double(), torch.randn(3, 6, 9, 8).double()
    monkeypatch.setattr(statistics, "POSITIONS", 10**6)  # all of them, in an order of their own
    rows = input_rows(module, x, draw())
    weight = packed.weight_rows(module.weight.detach()).unflatten(0, (module.groups, -1))
    products = (rows @ weight.mT).transpose(1, 2).flatten(0, 1)  # [N, M]
    wanted = module(x).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(products.sort(1).values, wanted.sort(1).values)


def test_positions_are_random_few_and_the_same_for_the_same_seed():
    module, x = nn.Conv2d(2, 3, 3), torch.arange(2 * 2 * 40 * 40.0).view(2, 2, 40, 40)
    rows = input_rows(module, x, draw())
    assert rows.shape == (1, 2 * statistics.POSITIONS, 18)
    corners = rows[0, :, 0]
    assert len(corners.unique()) == len(corners)  # none twice
    assert len((corners % 40).unique()) > 20  # not on a lattice
    assert torch.equal(rows, input_rows(module, x, draw()))
    assert not torch.equal(rows, input_rows(module, x, torch.Generator().manual_seed(1)))


def test_rows_of_a_linear_layer_are_all_there_are():
    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(input_rows(nn.Linear(4, 6), x, draw()), x.view(1, 30, 4))


def test_one_image_without_a_batch():
    x = torch.randn(2, 9, 9)
    module = nn.Conv2d(2, 3, 3)
    assert torch.equal(input_rows(module, x, draw()), input_rows(module, x.unsqueeze(0), draw()))


def test_sums(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "CHUNK", 7)
    module = nn.Conv2d(4, 4, 1, groups=2)
    y, x = torch.randn(2, 20, 2), torch.randn(2, 20, 2)
    found, same = Statistics.of(module, products=True, sums=True), Statistics.of(module)
    for part in (slice(0, 9), slice(9, 20)):
        found.add(y[:, part], x[:, part])
        same.add(y[:, part])
    y, x = y.double(), x.double()
    for got, want in ((found.h, y.mT @ y), (found.g, y.mT @ x), (found.y, y.sum(1)), (found.x, x.sum(1))):
        torch.testing.assert_close(got, want)
    assert found.count == same.count == 20
    assert same.g is same.h and same.x is same.y
    torch.testing.assert_close(same.h, y.mT @ y)


def test_the_target_is_the_least_squares_answer():
    """With the damping as further inputs that are alike in both models."""
    torch.manual_seed(0)
    y, x, w = torch.randn(30, 5).double(), torch.randn(30, 5).double(), torch.randn(4, 5)
    found = Statistics.of(nn.Linear(5, 4), products=True, sums=True)
    found.add(y[None], x[None])
    wanted, h = found.target(w, damp=0.1)
    noise = (0.1 * (y.T @ y).diagonal().mean()).sqrt() * torch.eye(5).double()
    more_y, more_x = torch.cat([y, noise]), torch.cat([x, noise])
    torch.testing.assert_close(wanted, torch.linalg.lstsq(more_y, more_x @ w.double().T).solution.T)
    torch.testing.assert_close(h[0], more_y.T @ more_y)


def test_inputs_that_are_alike_ask_for_the_weights_as_they_are():
    found = Statistics.of(nn.Linear(3, 2))
    found.add(torch.randn(1, 9, 3))
    w = torch.randn(2, 3)
    assert torch.equal(found.target(w, 0.01)[0], w.double())


def test_a_layer_that_meets_only_zeros_keeps_its_weights():
    found = Statistics.of(nn.Linear(3, 2), products=True, sums=True)
    found.add(torch.zeros(1, 9, 3), torch.zeros(1, 9, 3))
    w = torch.randn(2, 3)
    torch.testing.assert_close(found.target(w, 0.01)[0], w.double())


def test_patches_on_the_border_hold_the_padding():
    module = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    x = torch.arange(16.0).view(1, 1, 4, 4)
    rows = input_rows(module, x, draw())[0]
    want = F.unfold(F.pad(x, (1, 1, 1, 1), mode="circular"), 3)[0].T
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, want.tolist()))
