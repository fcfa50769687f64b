"""mpqkern env: which kernels run here."""

from __future__ import annotations

from argparse import Namespace

from ..capabilities import capabilities, describe
from .verb import Answer, Verb


def run(args: Namespace) -> Answer:
    found = capabilities()
    return Answer(describe(found), found)


ENV = Verb(
    "env",
    "which kernels run here, and why not others",
    "Shows versions, the instruction set, and the kernel behind each op.",
    ("MPQKERN_ISA=avx2 mpqkern env --json",),
    lambda parser: None,
    run,
)
