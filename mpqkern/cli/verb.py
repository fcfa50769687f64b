"""Verb: what a command of the command line is, and what it answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

GOOD, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes; the last as shells have it


@dataclass(frozen=True)
class Answer:
    """Printed as text or, with --json, as JSON."""

    text: str
    data: Any
    code: int = GOOD


@dataclass(frozen=True)
class Verb:
    """`options` adds what it takes to its parser, `run` does the work; `again` says how to go on after Ctrl-C."""

    name: str
    help: str
    description: str
    examples: tuple[str, ...]
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Answer]
    again: str = field(default="nothing was written")
