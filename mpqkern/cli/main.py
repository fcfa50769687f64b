"""main: arguments in, results on stdout, everything else on stderr, an exit code out."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from typing import Any, NoReturn

from ..measuring.meter import Unfinished
from ..solve import Infeasible
from ..version import __version__
from . import apply, bench, env, report, scan, score, solve, verify
from .verb import FAILED, INTERRUPTED, USAGE, Verb

VERBS = (env.ENV, scan.SCAN, score.SCORE, solve.SOLVE, solve.FRONTIER, apply.APPLY, verify.VERIFY, bench.BENCH,
         report.REPORT)  # fmt: skip
EXAMPLE = "mpqkern.cli.example"
CHAIN = (
    f"mpqkern score --model {EXAMPLE}:net --data {EXAMPLE}:batches --method clado",
    "mpqkern solve --avg-bits 4",
    "mpqkern apply",
    "mpqkern verify",
    "mpqkern report",
)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parser().parse_args(argv)
    except _Misused as error:
        return _stopped(argparse.Namespace(debug=False, json="--json" in argv), str(error), USAGE)
    verb: Verb = args.verb
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("mpqkern: %(message)s"))
    log = logging.getLogger("mpqkern")
    log.addHandler(handler)
    try:
        with redirect_stdout(sys.stderr):  # a model's own code may print; stdout is for results
            answer = verb.run(args)
    except KeyboardInterrupt:
        return _stopped(args, f"stopped; {verb.again}", INTERRUPTED)
    except SystemExit as stop:  # a training script, say, that parses arguments of its own as it is imported
        return _stopped(args, f"the code of --model or --data ended the program (exit {stop.code})", USAGE)
    except (Infeasible, Unfinished) as error:
        return _stopped(args, str(error).replace("the same call with its bank goes", "the same command goes"), FAILED)
    except Exception as error:
        # What a caller got wrong is an error of one of these types; any other is named, to be looked into.
        expected = isinstance(error, (ValueError, TypeError, OSError, TimeoutError, ImportError))
        text = str(error) if expected else f"{type(error).__name__}: {error}; --debug shows where"
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        return _stopped(args, text, USAGE)
    finally:
        log.removeHandler(handler)
    _show(json.dumps(_plain(answer.data), indent=1) if args.json else answer.text)
    return answer.code


def _show(text: str) -> None:
    """On stdout; whoever reads it may have left, as `head` does, and that is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end


def _stopped(args: argparse.Namespace, text: str, code: int) -> int:
    """One line, whatever the error's text is."""
    if args.debug:
        traceback.print_exc()
    line = " ".join(text.split())
    print(f"mpqkern: {line}", file=sys.stderr)
    if args.json:
        _show(json.dumps({"error": line}))
    return code


def _plain(value: Any) -> Any:
    """What JSON can say: an infinite bound is no number there."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Misused(Exception):
    """Arguments that are none."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as all errors are, and JSON where that is asked for."""
        raise _Misused(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mpqkern",
        description="Chooses 2, 4 or 8 bits for each layer of a PyTorch model, packs it, and shows what came of it.",
        epilog=_examples(CHAIN),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mpqkern {__version__}")
    with suppress(ImportError):  # completion in bash, zsh and tcsh, for those who have shtab
        import shtab

        shtab.add_argument_to(parser, "--print-completion")
    commands = parser.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS:
        command = commands.add_parser(
            verb.name,
            help=verb.help,
            description=verb.description,
            epilog=_examples(verb.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.options(command)
        command.add_argument("--json", action="store_true", help="print JSON, for programs")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(verb=verb)
    return parser


def _examples(lines: Sequence[str]) -> str:
    return "\n".join([f"example{'s' * (len(lines) > 1)}:", *(f"  {line}" for line in lines)])
