"""Files appear whole or not at all, under the name that was asked for, for all to read."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern.files import written

MODEL = nn.Sequential(nn.Linear(4, 4))
SCORES = mq.score(MODEL, torch.randn(2, 4), method="roundoff", bits=(2, 4))
WRITERS = {
    "save": lambda path: mq.save(MODEL, path),
    "report": lambda path: mq.report(path, scores=SCORES),
    "scores": lambda path: SCORES.save(path),
    "assignment": lambda path: mq.Assignment({"0": mq.Scheme(4)}).save(path),
}


@pytest.fixture(params=WRITERS.values(), ids=WRITERS)
def write(request):
    return request.param


def test_a_failure_leaves_what_was_there(write, tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*/file'"):
        write(path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_place_that_is_none_is_named_as_it_was_asked_for(write, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path='.*/gone/file'; wanted a file in a folder that exists"):
        write(tmp_path / "gone" / "file")
    with pytest.raises(IsADirectoryError, match=r"path='.*' is a folder; wanted a file"):
        write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_others_may_read_what_the_umask_lets_them(write, tmp_path) -> None:
    before = os.umask(0o022)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_what_is_no_plain_file_is_written_to_and_not_replaced(tmp_path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    with written(pipe) as file:
        file.write(b"through")
    reader.join(5)
    assert got == [b"through"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_apply_looks_first_and_rounds_then(cli, scored, monkeypatch) -> None:
    cli("solve --avg-bits 4"), cli("apply")
    before = Path("mpqkern-run/model.safetensors").read_bytes(), Path("mpqkern-run/ledger.json").read_bytes()

    def late(*_: object, **__: object) -> None:
        raise AssertionError("rounded before it was known where to")

    monkeypatch.setattr("mpqkern.cli.apply.swap_", late)
    assert cli("apply --out gone/there")[::2] == (
        2,
        "mpqkern: path='gone/there'; wanted a file in a folder that exists\n",
    )
    Path("mpqkern-run/latency.json").write_text("half of")
    assert "latency.json: text='half of'" in cli("apply")[2]
    after = Path("mpqkern-run/model.safetensors").read_bytes(), Path("mpqkern-run/ledger.json").read_bytes()
    assert after == before
