"""Options that several verbs share."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from ..solve import Budget
from . import values
from .loading import FORM

RUN = "mpqkern-run"
BUDGETS = {
    "avg_bits": ("bits per parameter, on average", float),
    "bytes": ("bytes of all weights, as packed", values.size),
    "mbytes": ("the same in MiB", float),
    "fraction": ("share of what the weights take in float32", float),
    "gbops": ("bit operations of one sample, in 1e9", float),
    "ms": ("milliseconds of the whole model, by latency.json or measured now", float),
}


def add_run(parser: ArgumentParser) -> None:
    parser.add_argument("--run", default=RUN, metavar="DIR", help=f"the run directory (./{RUN})")


def add_model(parser: ArgumentParser, data: str = "callable without arguments -> batches") -> None:
    """A model and its data; what is not given is as it was in the run."""
    parser.add_argument("--model", metavar="M", help=f"{FORM} without arguments -> nn.Module")
    parser.add_argument("--checkpoint", metavar="FILE", help="its weights: safetensors, or a state_dict of torch.save")
    parser.add_argument("--seed", type=int, help="of weights and data that are drawn at random (0)")
    parser.add_argument("--data", metavar="D", help=data)
    parser.add_argument("--batches", type=int, metavar="N", help="take only the first N batches")
    parser.add_argument("--forward", metavar="F", help="callable (model, batch) -> output, for models called otherwise")


def add_loss(parser: ArgumentParser) -> None:
    parser.add_argument("--loss", help="ce, kl, or a callable (output, batch) -> one loss a sample")


def add_schemes(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--bits", type=values.scheme, nargs="+", metavar="B", help="widths or schemes, as 2 4 w8a8 w4g64 float (2 4 8)"
    )


def schemes(args: Namespace) -> list[Any]:
    return args.bits or [values.scheme(text) for text in ("2", "4", "8")]


def add_method(parser: ArgumentParser) -> None:
    parser.add_argument("--method", help="whose scores to go by (the last that were made)")


def add_budgets(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("budgets", "all that are given hold at once")
    for name, (text, kind) in BUDGETS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=text)
    group.add_argument("--count", choices=("packed", "nominal"), help="whether bytes count scales and padding")


def budgets(args: Namespace) -> list[Budget]:
    """All but milliseconds, which need a table."""
    found = []
    for name in BUDGETS:
        value = getattr(args, name)
        if value is not None and name != "ms":
            found.append(Budget(**{name: value, "count": None if name == "gbops" else args.count}))
    return found


def add_constraints(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("constraints", "NAME is a layer, a glob, re:... or a type such as Linear")
    group.add_argument("--pin", type=values.pin, action="append", metavar="NAME=4", help="this layer has this width")
    group.add_argument("--forbid", type=values.ban, action="append", metavar="NAME=2,4", help="it has none of these")
    group.add_argument("--tie", nargs="+", action="append", metavar="NAME", help="these layers have the same")
    group.add_argument("--at-most", type=values.most, action="append", metavar="2=3", help="3 layers of 2 bits at most")
    group.add_argument("--first-last", type=values.choice, metavar="8", help="width of the first and the last layer")
    group.add_argument("--time-limit", type=float, metavar="S", help="seconds; the best answer until then is taken")


def constraints(args: Namespace) -> dict[str, Any]:
    return {
        "pins": dict(args.pin or ()),
        "forbid": dict(args.forbid or ()),
        "ties": args.tie or [],
        "at_most": dict(args.at_most or ()),
        "first_last": args.first_last,
    }
