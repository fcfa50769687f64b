"""What bench/gpu*.py do beside asking a GPU: steps, outcomes, rates, files. The CPU stands in for the device."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))  # where scripts find each other

from bench import gpu, gpu_check, gpu_clock, gpu_speed

PYTHON = sys.executable


def ran(tmp_path: Path, code: str, *, limit: float = 20, left: float = 20, **more: object) -> gpu.Outcome:
    with (tmp_path / "log").open("w") as log:
        return gpu.run(gpu.Step("step", [PYTHON, "-c", code], limit, **more), log, left)  # type: ignore[arg-type]


def test_outcomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = ran(tmp_path, "print('first'); print('last')")
    assert good.passed and good.said == "last"
    bad = ran(tmp_path, "print('why'); raise SystemExit(3)")
    assert not bad.passed and bad.result == "failed, exit code 3"
    assert "why" in capsys.readouterr().out
    assert ran(tmp_path, "", missing="nvcc").said == "no nvcc"
    assert ran(tmp_path, "", left=0).said == "no time left"
    set_to = ran(tmp_path, "import os; print(os.environ['MPQ_OF_STEP'])", environment={"MPQ_OF_STEP": "seen"})
    assert set_to.said == "seen"


def test_a_step_that_hangs_is_cut_off_with_what_it_started(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(8); pathlib.Path({str(alive)!r}).touch()"
    start = time.monotonic()
    code = f"import subprocess, sys; print('at work', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    found = ran(tmp_path, code, left=3)
    assert found.result.startswith("cut off after") and found.said == "at work"
    assert time.monotonic() - start < 7
    time.sleep(max(0, start + 12 - time.monotonic()))
    assert not alive.exists()


def test_the_exit_code_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:  # type: ignore[type-arg]
    def of(*codes: int) -> int:
        made = [gpu.Step(f"step{i}", [PYTHON, "-c", f"raise SystemExit({c})"], 20) for i, c in enumerate(codes)]
        monkeypatch.setattr(gpu, "steps", lambda *_, **__: made)
        monkeypatch.setattr("sys.argv", ["gpu.py", "--device", "cpu", "--out", str(tmp_path)])
        return gpu.main()

    assert of(0, 0) == 0
    capsys.readouterr()
    assert of(1, 0) == 1
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert "failed, exit code 1" in rows[0] and "passed" in rows[1], "the second ran all the same"


def test_steps_say_what_they_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "tool", lambda name: f"/{name}")
    with_gpu = {s.name: s for s in gpu.steps(tmp_path, device="cuda", arch="90a-real")}
    assert not any(s.missing for s in with_gpu.values())
    assert with_gpu["build"].environment["MPQKERN_CUDA_ARCHS"] == "90a-real"
    assert all(s.missing for s in gpu.steps(tmp_path, device="cuda", arch=None))
    monkeypatch.setattr(gpu, "tool", lambda name: None)
    without = {s.name: s.missing for s in gpu.steps(tmp_path, device="cuda", arch="80-real")}
    assert {name for name, missing in without.items() if missing} == {"build", "memcheck", "racecheck"}


def test_copies_outgrow_the_cache() -> None:
    device = gpu_clock.Device("cpu", 1)
    assert device.copies(100) == 64 and device.copies(10**9) == 2
    assert 4 * 2**16 < device.copies(2**15) * 2**15 <= 5 * 2**16


def test_every_section_runs_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_speed.NETWORKS, "resnet18", dict(list(gpu_speed.NETWORKS["resnet18"].items())[-1:]))
    monkeypatch.setattr("sys.argv", ["gpu_speed.py", *gpu.TINY, "--out", str(tmp_path)])
    assert gpu_speed.main() == 0
    for section, count in (("linear", 14), ("gram", 36), ("conv", 5), ("probe", 8)):
        found = json.loads((tmp_path / f"cuda-{section}.json").read_text())
        assert found["peaks"]["read"] > 0 and "commit" in found["environment"]
        assert len(found["rows"]) == count
        for row in found["rows"]:
            assert row["us"] > 0 and row["of_read"] == pytest.approx(row["gb_s"] * 1e9 / found["peaks"]["read"])
            assert row.get("error", 0) < (0.02 if "a8" in row["what"] else 0.005), row
    missing = json.loads((tmp_path / "cuda-linear.json").read_text())["missing"]
    assert {name.split(" (")[0] for name in missing} == set(gpu_speed.PEERS), "none of them runs on a CPU"


def test_what_fails_is_said_and_the_rest_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def section(args, device, peak):  # type: ignore[no-untyped-def]
        def fail() -> dict[str, object]:
            raise RuntimeError("no such kernel\nand more")

        fast = {"what": "w4", "us": 2.0}
        yield {"m": 1}, [("torch", False, lambda: {"what": "torch", "us": 6.0}), ("w4", True, lambda: fast)]
        yield {"m": 4}, [("torch", False, fail), ("w2", True, fail), ("w4", True, lambda: fast)]

    monkeypatch.setitem(gpu_speed.SECTIONS, "linear", section)
    monkeypatch.setattr("sys.argv", ["gpu_speed.py", "linear", "--device", "cpu", "--out", str(tmp_path)])
    assert gpu_speed.main() == 1, "one of ours failed"
    found = json.loads((tmp_path / "cuda-linear.json").read_text())
    assert [row["x_torch"] for row in found["rows"]] == [1, 3, None]
    assert found["missing"]["w2 (4)"] == "RuntimeError: no such kernel"


@pytest.mark.parametrize("part", ["layouts", "analysis"])
def test_checks_pass_here(part: str) -> None:
    found = {case[0]: gpu_check.wrong(case, "cpu") for case in getattr(gpu_check, part)()}
    assert len(found) >= 9 and set(found.values()) == {None}


def test_checks_see_a_wrong_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(gpu_check.linears())
    assert gpu_check.wrong(case, "cpu") is None
    right = gpu_check.plain.linear(*case[2])
    off = right.clone()
    off[0, 3] = torch.nextafter(off[0, 3], torch.tensor(torch.inf, dtype=off.dtype))
    monkeypatch.setattr(gpu_check.plain, "linear", lambda *_: off)
    assert "relative error" in (gpu_check.wrong(case, "cpu") or "")


def test_fp16_subnormals_are_judged_by_products_of_weights_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*failing: str) -> str:
        monkeypatch.setattr(gpu_check, "wrong", lambda case, _: "off" if any(f in case[0] for f in failing) else None)
        monkeypatch.setattr("sys.argv", ["gpu_check.py", "--device", "cpu"])
        assert gpu_check.main() == bool(failing)
        return capsys.readouterr().out

    assert "fp16 subnormals: as they are" in told()
    assert "fp16 subnormals: as they are" in told("bfloat16", "8-bit activations", "conv")
    assert "fp16 subnormals: lost" in told("linear 8 bits, group 0, 9 x float16")
