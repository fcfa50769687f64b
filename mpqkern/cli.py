"""The command line: mpqkern env."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from .capabilities import capabilities, describe
from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mpqkern", description="Packed 2/4/8-bit weights for PyTorch models.")
    parser.add_argument("--version", action="version", version=f"mpqkern {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    env = commands.add_parser(
        "env",
        help="which kernels run here, and why not others",
        description="Shows versions, the instruction set, and the kernel behind each op.",
        epilog="example: MPQKERN_ISA=avx2 python -m mpqkern env --json",
    )
    env.add_argument("--json", action="store_true", help="print JSON for programs")
    args = parser.parse_args(argv)
    found = capabilities()
    print(json.dumps(found, indent=2) if args.json else describe(found))
    return 0
