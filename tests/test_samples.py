"""Samples: errors that are what they say, robust means, bootstraps; a bank that serves them all; shared by ranks."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as spawning
from torch import nn

import mpqkern as mq
from mpqkern.scores import clado

from . import nets


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


def batches(n=3, size=20):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 8, generator=generator), torch.arange(size) % 4) for _ in range(n)]


def clado_of(model, batches, **options):
    return mq.score(model, batches, method="clado", bits=(2, 4), **options)


@pytest.fixture
def measured(tmp_path):
    scores = clado_of(net(), batches(), bank=tmp_path)
    return scores, clado.samples(scores, tmp_path)


def test_means_of_samples_are_the_scores(measured):
    scores, samples = measured
    assert samples.count == 60 == scores.provenance["samples"]
    np.testing.assert_array_equal(samples.alone(1).mean(-1), scores.unary[1])
    np.testing.assert_array_equal(samples.pair(2, 0).mean(-1), scores.pairwise[2, :, 0, :])
    again = samples.scores()
    assert np.array_equal(again.pairwise, scores.pairwise) and again.provenance == scores.provenance


def test_a_sample_by_itself(measured):
    """One sample in a batch of its own has the differences that it has among the others."""
    _, samples = measured
    x, y = batches()[1]
    alone = clado_of(net(), [(x[7:8], y[7:8])])
    np.testing.assert_allclose(samples.alone(0)[:, 27], alone.unary[0], atol=1e-6)
    np.testing.assert_allclose(samples.pair(0, 2)[:, :, 27], alone.pairwise[0, :, 2, :], atol=1e-6)
    assert alone.provenance["unary_errors"] is None


def test_errors(measured):
    scores, samples = measured
    unary, pairwise = samples.errors()
    assert unary[0, 0] == pytest.approx(np.std(samples.alone(0)[0], ddof=1) / 60**0.5, rel=1e-12)
    assert unary.tolist() == scores.provenance["unary_errors"]
    assert not pairwise[1, :, 1, :].any() and (pairwise[0, :, 1, :] > 0).all()
    # a bootstrap knows nothing of that formula
    generator = torch.Generator().manual_seed(0)
    drawn = [samples.resample(generator) for _ in range(400)]
    np.testing.assert_allclose(np.std([s.unary for s in drawn], axis=0), unary, rtol=0.2)
    spread = np.std([s.pairwise for s in drawn], axis=0)
    np.testing.assert_allclose(spread, pairwise, rtol=0.2, atol=1e-12)


def test_the_same_seed_draws_the_same(measured):
    _, samples = measured
    one, two, other = (samples.resample(torch.Generator().manual_seed(seed)).pairwise for seed in (3, 3, 4))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_trimmed_means_do_not_follow_a_few(measured):
    _, samples = measured
    trimmed = samples.scores(trim=0.1)
    values = np.sort(samples.alone(0)[0])
    assert trimmed.unary[0, 0] == pytest.approx(values[6:54].mean(), rel=1e-12)
    item = samples.batches[0][1][0]
    item["loss"][0, 0, 3] += 1e6
    assert samples.scores(trim=0.1).unary[0, 0] == pytest.approx(trimmed.unary[0, 0], abs=0.02)
    assert samples.scores().unary[0, 0] > 1e4


def test_shrinking_by_the_error(measured):
    scores, samples = measured
    noise = samples.errors()[1]
    shrunk = samples.scores(shrink="error")
    at = (0, 0, 1, 1)
    m, e = scores.pairwise[at], noise[at]
    assert shrunk.pairwise[at] == pytest.approx(m**3 / (m**2 + e**2), rel=1e-12)
    assert np.array_equal(shrunk.unary, scores.unary)
    assert (np.sign(shrunk.pairwise) == np.sign(scores.pairwise)).all()
    assert (np.abs(shrunk.pairwise) <= np.abs(scores.pairwise)).all()


def test_a_bank_serves_every_way_to_conclude(measured, tmp_path):
    _, samples = measured
    for options in ({"trim": 0.1}, {"shrink": "error"}):
        again = clado_of(net(), batches(), bank=tmp_path, **options)
        assert again.provenance["evaluations"] == 0
        assert np.array_equal(again.pairwise, samples.scores(**options).pairwise)
    with pytest.raises(ValueError, match="options was"):
        clado_of(net(), batches(), bank=tmp_path, pairs="none")


def test_what_samples_need(measured, tmp_path):
    scores, _ = measured
    with pytest.raises(ValueError, match="lacks 3 batches of these scores"):
        clado.samples(scores, tmp_path / "other")
    with pytest.raises(ValueError, match="no 'batches'; wanted scores of method 'clado'"):
        clado.samples(mq.score(net(), batches(), method="size"), tmp_path)
    one = clado_of(net(), [(torch.randn(1, 8), torch.zeros(1, dtype=torch.long))], bank=tmp_path / "one")
    with pytest.raises(ValueError, match="2 samples or more, and here is 1"):
        clado.samples(one, tmp_path / "one").errors()


def rank(number, folder, bank, limits):
    """One of two processes; its limits are its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=number, world_size=2)
    try:
        scores = clado_of(nets.resnet(), images(), bank=bank, max_evals=limits[number])
        evaluations = scores.provenance["evaluations"]
        np.savez(f"{folder}/{number}.npz", unary=scores.unary, pairwise=scores.pairwise, evaluations=evaluations)
    except mq.Unfinished:
        np.savez(f"{folder}/{number}.npz", stopped=True)
    finally:
        torch.distributed.destroy_process_group()


def images():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)) for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["memory", "folder"])
def test_ranks_share_the_batches(tmp_path, shared):
    alone = clado_of(nets.resnet(), images())
    bank = str(tmp_path / "bank") if shared else None

    def both(name, limits):
        folder = tmp_path / name
        folder.mkdir()
        spawning.spawn(rank, (str(folder), bank, limits), nprocs=2)
        return [dict(np.load(folder / f"{number}.npz")) for number in (0, 1)]

    if shared:  # one rank stops within its first batch, and so both do; nothing is lost
        assert all("stopped" in found for found in both("stopped", (20, None)))
    found = both("whole", (None, None))
    for one in found:
        assert np.array_equal(one["unary"], alone.unary) and np.array_equal(one["pairwise"], alone.pairwise)
    batch = alone.provenance["losses"]
    made = [int(one["evaluations"]) for one in found]
    if shared:
        # rank 1 had done its batch; of rank 0's two the first items, up to the limit, were there
        assert made[1] == 0 and batch < made[0] <= 2 * batch - 20
    else:
        assert made == [2 * batch, batch]
