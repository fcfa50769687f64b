"""Shared fixtures: one thread, fixed seed, and every kernel path that this processor has."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mpqkern import ops, plain
from mpqkern.cli import main

from . import ptxsim


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


@pytest.fixture(scope="session")
def library() -> ptxsim.Library:
    """The CUDA kernels, interpreted."""
    path = ptxsim.build()
    if path is None:
        pytest.skip("no nvcc on PATH to compile the kernels with")
    return ptxsim.Library(path)


NET = """
import torch
from torch import nn

print("a model's own words")

def make(width=8):
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

def batches():
    for _ in range(3):
        yield torch.randn(16, 12), torch.randint(4, (16,))
"""


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """cli("solve --avg-bits 4") -> exit code, stdout, stderr; in a folder that has net.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path.copy())  # to which the folder is added
    monkeypatch.delitem(sys.modules, "net", raising=False)  # that of another folder
    monkeypatch.setenv("MPQKERN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "net.py").write_text(NET)

    def go(line: str) -> tuple[int, str, str]:
        try:
            code = main(shlex.split(line))
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return go


@pytest.fixture
def scored(cli) -> None:  # type: ignore[no-untyped-def]
    """A run directory with scores."""
    assert cli("score --model net.py:make --data net.py:batches --method kl")[0] == 0
