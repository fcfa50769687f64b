"""From PTX to machine code, by ptxas."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .cubin import Kernel, complaints, read

ROOT = Path(__file__).resolve().parent.parent.parent
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a")


@dataclass
class Assembled:
    text: str  # the PTX
    arch: str
    kernels: dict[str, Kernel]
    complaints: list[str]


def modules(library: Path) -> list[str]:
    """The PTX of every source in what ptxsim.build() made."""
    found = re.findall(rb"\.version [^\0]*", library.read_bytes())
    return [text.decode() for text in found if b".entry" in text]


def archs_of(module: str) -> tuple[str, ...]:
    """Those that take it: PTX for sm_90a is for nothing else."""
    target = re.search(r"^\.target (\w+)", module, re.M)[1]  # type: ignore[index]
    return (target,) if target.endswith("a") else tuple(a for a in ARCHS if a >= target)


def assemble(texts: Iterable[str], archs: tuple[str, ...] = ARCHS) -> list[Assembled]:
    """Each text for each of `archs` that takes it; kept in build/sass until the text or ptxas changes."""
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        raise RuntimeError("no ptxas on PATH")
    version = subprocess.run([ptxas, "--version"], capture_output=True, check=True).stdout

    def one(task: tuple[str, str]) -> Assembled:
        text, arch = task
        name = hashlib.sha256(b"|".join((version, arch.encode(), text.encode()))).hexdigest()[:20]
        elf, log = (ROOT / "build" / "sass" / f"{name}.{end}" for end in ("cubin", "log"))
        if not (elf.is_file() and log.is_file()):
            _run(ptxas, text, arch, elf, log)
        said = log.read_text()
        return Assembled(text, arch, read(elf.read_bytes(), said), complaints(said))

    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(one, [(t, a) for t in texts for a in archs if a in archs_of(t)]))


def _run(ptxas: str, text: str, arch: str, elf: Path, log: Path) -> None:
    elf.parent.mkdir(parents=True, exist_ok=True)
    mine = elf.with_name(f"{os.getpid()}-{elf.name}")  # several runs may do this at a time
    source = mine.with_suffix(".ptx")
    source.write_text(text)
    command = [ptxas, f"-arch={arch}", "-v", "-warn-spills", "-o", str(mine), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    source.unlink()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    log.write_text(done.stdout + done.stderr)
    mine.replace(elf)
