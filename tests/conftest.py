"""Shared fixtures: one thread, fixed seed, and every kernel path that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from mpqkern import ops, plain


@pytest.fixture(autouse=True)
def steady() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept from or for the user's own runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPQKERN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=ops.ISAS)
def path(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """The ops as served by plain PyTorch or by one instruction set."""
    name = request.param
    if name == "plain":
        yield SimpleNamespace(name=name, **{op: getattr(plain, op) for op in ops.SCHEMAS})
        return
    if ops.why_plain is not None:
        pytest.skip(f"no compiled kernels: {ops.why_plain}")
    try:
        ops.isa(name)
    except RuntimeError:
        pytest.skip(f"this processor has no {name}")
    yield SimpleNamespace(name=name, **{op: getattr(torch.ops.mpqkern, op) for op in ops.SCHEMAS})
    ops.isa("best")
