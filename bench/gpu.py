"""Everything that only a machine with a GPU can tell: builds, tests, checks and measures there, in ten minutes.

make gpu                                       # with the python3 that has torch; nothing is fetched
python bench/gpu.py --out /tmp/gpu --minutes 9
python bench/gpu.py --only library exact       # some steps
python bench/gpu.py --device cpu --out /tmp/gpu --only exact linear gram conv probe    # a dry run, sizes tiny

A step that fails or is cut off does not stop the next ones. gpu.log in the folder has all that they said,
cuda-*.json what they measured so far. The exit code is 0 when all passed, else 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
CUDA = Path("/usr/local/cuda/bin")
NEEDS = {"torch": "2.11", "numpy": "", "tqdm": "", "setuptools": "77", "pytest": "8", "hypothesis": ""}
SHOWN = 12  # last lines of a step that failed
SPEED = {"linear": 160, "gram": 45, "conv": 150, "probe": 40}  # sections of gpu_speed.py, and seconds for each
TINY = ["--device", "cpu", "--shapes", "256x256", "--m", "1", "--networks", "resnet18", "--batch", "1", "--rounds", "2"]


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    limit: float  # seconds
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""  # what it cannot do without


@dataclass(frozen=True)
class Outcome:
    step: str
    result: str  # "passed" or not
    seconds: float
    said: str  # its last line

    @property
    def passed(self) -> bool:
        return self.result == "passed"


def tool(name: str) -> str | None:
    """A program of this Python environment, of the system, or of CUDA, whose folder is not always on PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], str(CUDA)]))


def installed(package: str) -> str:
    """Its version.

    >>> installed("a-package-that-nobody-has")
    'none'
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def architecture(capability: tuple[int, int]) -> str:
    """What the build is for: this GPU only.

    >>> architecture((9, 0)), architecture((8, 6))
    ('90a-real', '86-real')
    """
    major, minor = capability
    return f"{major}{minor}{'a' if major >= 9 else ''}-real"


def steps(out: Path, *, device: str, arch: str | None) -> list[Step]:
    """In the order of what is worth most: a run may be cut short."""
    python, sanitizer = sys.executable, tool("compute-sanitizer")
    nvcc = tool("nvcc")
    build = {"MPQKERN_CUDA": "ON", "MPQKERN_CUDA_ARCHS": arch or "", "MAX_JOBS": str(os.cpu_count() or 1)}
    build |= {"CUDACXX": nvcc} if nvcc else {}
    absent = "" if arch or device == "cpu" else "GPU that torch can use"
    check = [python, "bench/gpu_check.py", "--device", device]
    told = "import mpqkern, sys; from mpqkern.capabilities import describe; c = mpqkern.capabilities(); " \
           "print(describe(c)); print('CUDA kernels:', c['cuda_built']); sys.exit(not c['cuda_built'])"  # fmt: skip
    # -k: the fixtures' "gpu" and the tests "on a gpu"; and arguments' checks, which need the build only
    tests = [python, "-m", "pytest", "-q", "-k", "gpu or checks", *sorted(map(str, ROOT.glob("tests/test_cuda*.py")))]
    speed = [python, "bench/gpu_speed.py", "--out", str(out), *(TINY if device == "cpu" else [])]
    # each tensor an allocation of its own: a read beyond one is then a read beyond memory
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def watched(name: str, *options: str) -> Step:
        command = [sanitizer or "", "--tool", name, *options, "--error-exitcode", "9", *check]
        return Step(name, command, 120, alone, absent or ("" if sanitizer else "compute-sanitizer"))

    return [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 300, build,
             absent or ("" if nvcc else "nvcc")),
        Step("library", [python, "-c", told], 60, {}, absent),
        Step("exact", check, 90, {}, absent),
        Step("tests", tests, 150, {}, absent),
        *(Step(name, [*speed, name], limit, {}, absent) for name, limit in SPEED.items()),
        watched("memcheck", "--report-api-errors", "no"),  # torch asks the driver what it may not have
        watched("racecheck"),
    ]  # fmt: skip


def run(step: Step, log: TextIO, left: float) -> Outcome:
    """Runs a step for at most its limit and what is `left`; processes that it started end with it."""
    if step.missing:
        return Outcome(step.name, "left out", 0, f"no {step.missing}")
    limit = min(step.limit, left)
    if limit <= 0:
        return Outcome(step.name, "left out", 0, "no time left")
    start, at = time.monotonic(), log.tell()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | dict(step.environment)
    try:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        return Outcome(step.name, "failed", 0, str(error))
    try:
        code = process.wait(limit)
        result = "passed" if code == 0 else f"failed, exit code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        result = f"cut off after {limit:.0f} s"
    seconds = time.monotonic() - start
    lines = said(Path(log.name), at)
    if result != "passed":
        print("\n".join(f"  {line[:160]}" for line in lines[-SHOWN:]))
    return Outcome(step.name, result, seconds, lines[-1][:90] if lines else "")


def said(path: Path, at: int) -> list[str]:
    """What came into the log since."""
    with path.open("rb") as log:
        log.seek(at)
        return [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]


def summary(outcomes: list[Outcome]) -> str:
    """
    >>> print(summary([Outcome("build", "passed", 61.2, "done"), Outcome("tests", "left out", 0, "no time left")]))
    build  passed     61 s  done
    tests  left out    0 s  no time left
    """
    names, results = (max(len(getattr(o, key)) for o in outcomes) for key in ("step", "result"))
    return "\n".join(
        f"{o.step.ljust(names)}  {o.result.ljust(results)}  {o.seconds:3.0f} s  {o.said}".rstrip() for o in outcomes
    )


def capability() -> tuple[int, int] | None:
    """Of the GPU, asked in a process of its own: this one holds no device."""
    asked = "import torch; print(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None"
    try:
        found = subprocess.run(
            [sys.executable, "-c", asked], capture_output=True, text=True, timeout=120
        ).stdout.split()
    except subprocess.TimeoutExpired:
        return None
    return (int(found[-2]), int(found[-1])) if len(found) >= 2 else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="a folder for log and figures")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--only", nargs="+", help="names of steps")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    out = args.out.resolve()
    found = capability() if args.device == "cuda" else None
    todo = steps(out, device=args.device, arch=architecture(found) if found else None)
    for name in args.only or []:
        if name not in [step.name for step in todo]:
            parser.error(f"--only {name}; wanted some of {', '.join(step.name for step in todo)}")
    for name, version in NEEDS.items():
        print(f"{name}: {installed(name)}{f', wanted >= {version}' if version else ''}")
    for name in ("cmake", "ninja", "nvcc", "compute-sanitizer"):
        print(f"{name}: {tool(name) or 'none'}")
    out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with (out / "gpu.log").open("w") as log:
        for step in todo:
            if args.only and step.name not in args.only:
                continue
            print(f"{step.name} ...", flush=True)
            log.write(f"\n==== {step.name}: {' '.join(step.command)}\n")
            log.flush()
            outcomes.append(run(step, log, end - time.monotonic()))
            log.seek(0, os.SEEK_END)
    print("\n" + summary(outcomes))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
