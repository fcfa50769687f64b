"""Two processes measure what one does, bit for bit; where one has to stop, nothing but its current item is lost."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as spawning

import mpqkern as mq

from . import nets

METHODS = ("greedy", "single", "kl", "fisher")
LIMIT = 3  # evaluations of the rank that stops; an item is one


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 8, generator=generator), torch.arange(4)) for _ in range(4)]


def measured(method, **options):
    return mq.score(nets.Functional().eval(), batches(), method=method, bits=(2, 8), **options)


def rank(number, folder, bank, limits):
    """One of two processes, through all methods; its limits are its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=number, world_size=2)
    try:
        for method in METHODS:
            try:
                scores = measured(method, bank=bank, max_evals=limits[number])
                np.savez(f"{folder}/{method}{number}.npz", unary=scores.unary, made=scores.provenance["evaluations"])
            except mq.Unfinished:
                np.savez(f"{folder}/{method}{number}.npz", stopped=True)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks found: in memory, stopped at a limit of one of them, and after that."""
    root, found = tmp_path_factory.mktemp("ranks"), {}
    bank = str(root / "bank")
    for name, place, limits in (
        ("memory", None, (None, None)),
        ("stopped", bank, (LIMIT, None)),
        ("resumed", bank, (None, None)),
    ):
        (root / name).mkdir()
        spawning.spawn(rank, (str(root / name), place, limits), nprocs=2)
        found[name] = {m: [dict(np.load(root / name / f"{m}{n}.npz")) for n in (0, 1)] for m in METHODS}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_measure_what_one_does(found, method):
    alone = measured(method)
    total = alone.provenance["evaluations"]
    for name in ("memory", "resumed"):
        for one in found[name][method]:
            assert np.array_equal(one["unary"], alone.unary)
    made = [int(one["made"]) for one in found["memory"][method]]
    assert sum(made) == total and min(made) > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_was_measured_before_a_rank_stopped_is_kept(found, method):
    total = measured(method).provenance["evaluations"]
    if total // 2 < LIMIT:  # the whole share of a rank is within the limit
        assert all("unary" in one for one in found["stopped"][method])
        assert sum(int(one["made"]) for one in found["resumed"][method]) == 0
        return
    assert all("stopped" in one for one in found["stopped"][method])
    again = sum(int(one["made"]) for one in found["resumed"][method])
    assert again <= total - LIMIT - 1  # the other rank had made some as well
