"""How fast are the CUDA kernels, against torch's on the same GPU and against what the GPU can do at best?

python bench/gpu_speed.py                        # all sections, some minutes; one file each in bench/results
python bench/gpu_speed.py linear --m 1 16 --bits 4 --shapes 8192x8192 --out .
python bench/gpu_speed.py --device cpu --shapes 256x256 --m 1 --networks resnet18 --batch 1 --out /tmp   # a dry run

A time is that of one call in the replay of a CUDA graph of fifty or more, the median of `rounds` replays. Weights
and features rotate through copies of more than four times the L2 cache together, as a network's layers do. Data is
random: GPUs multiply zeros faster. "of read" and "of matmul" are shares of what torch's own reductions and products
reach in the same process; "x torch" is torch's time over ours, with weights in the type of the activations.
Results are held against float products of the same stored weight. Files are written row by row: a run that is cut
short leaves what it has.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_clock import Device, Row, ceilings, rates, short
from gpu_probe import probe
from harness import write
from layers import NETWORKS, Layer
from peers.gpu import GROUP, Made
from peers.gpu import LINEAR as PEERS
from torch import Tensor, nn

import mpqkern as mq
from mpqkern.ledger import table

RESULTS = Path(__file__).parent / "results"


# ---- linear layers ----------------------------------------------------------------------------------------


def floats(layer: nn.Module, device: Device) -> Made:
    size = layer.weight.nbytes
    return Made([copy.deepcopy(layer) for _ in range(device.copies(size))], layer.weight.float(), size)


def ours(layer: nn.Module, scheme: mq.Scheme, device: Device) -> Made:
    kind = mq.PackedLinear if isinstance(layer, nn.Linear) else mq.PackedConv2d
    packed = kind.from_float(layer, scheme)
    size = packed.packed_bytes()
    return Made([copy.deepcopy(packed) for _ in range(device.copies(size))], packed.dequantize().float(), size)


def raced(
    head: Row,
    made: Made,
    x: Tensor,
    product: Callable[[Tensor, Tensor], Tensor],
    device: Device,
    peak: dict[str, float],
) -> Row:
    """Times one contender and looks at its results."""
    n, f = len(made.forwards), made.forwards
    y = f[0](x)
    want = product(x.float(), made.weight)
    error = float((y.float() - want).norm() / want.norm())
    row = head | device.seconds(lambda i: f[i % n](x), n) | {"error": error}
    macs = y.numel() * made.weight[0].numel()
    return rates(row, peak, bytes=made.bytes + x.nbytes + y.nbytes, operations=2 * macs)


Job = tuple[str, bool, Callable[[], Row]]  # a name, whether it is a kernel of ours, and what measures it


def linear(args: argparse.Namespace, device: Device, peak: dict[str, float]) -> Iterator[tuple[Row, list[Job]]]:
    schemes = [mq.Scheme(b, group_size=GROUP, act_bits=a) for b in args.bits for a in (None, 8)]
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        for dtype in (torch.float16, torch.bfloat16):
            layer = nn.Linear(k, n, bias=False, device=device.kind, dtype=dtype)
            makers: dict[str, Callable[[], Made]] = {"torch": lambda layer=layer: floats(layer, device)}
            makers |= {str(s): lambda s=s, layer=layer: ours(layer, s, device) for s in schemes}
            peers = {name: make for name, (bits, make) in PEERS.items() if bits in args.bits}
            makers |= {name: lambda make=make, layer=layer: make(layer, device.copies) for name, make in peers.items()}
            made: dict[str, Made] = {}
            for m in args.m:
                x = torch.randn(m, k, device=device.kind).to(dtype)

                def job(name: str, x=x, made=made, makers=makers, shape=shape, m=m, dtype=dtype) -> Row:  # type: ignore[no-untyped-def]
                    if name not in made:
                        made[name] = makers[name]()
                    head = {"what": name, "dtype": short(dtype), "shape": shape, "m": m}
                    return raced(head, made[name], x, F.linear, device, peak)

                where = {"shape": shape, "dtype": short(dtype), "m": m}
                yield where, [(w, w != "torch" and w not in PEERS, lambda w=w, job=job: job(w)) for w in makers]


# ---- convolutions -----------------------------------------------------------------------------------------


def conv(args: argparse.Namespace, device: Device, peak: dict[str, float]) -> Iterator[tuple[Row, list[Job]]]:
    """fp16, channels last: what cuDNN likes best."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # in the products that results are held against
    schemes = [mq.Scheme(4), mq.Scheme(8), mq.Scheme(4, act_bits=8), mq.Scheme(8, act_bits=8)]
    layers: list[Layer] = list(dict.fromkeys(layer for name in args.networks for layer in NETWORKS[name]))
    for shape in layers:
        how = (shape.kernel, shape.stride, shape.kernel // 2, 1, shape.groups)
        layer = nn.Conv2d(shape.cin, shape.cout, *how, bias=False, device=device.kind, dtype=torch.float16)
        layer.to(memory_format=torch.channels_last)
        for batch in args.batch:
            x = torch.randn(batch, shape.cin, shape.size, shape.size, device=device.kind).half()
            x = x.contiguous(memory_format=torch.channels_last)

            def job(scheme: mq.Scheme | None, x=x, layer=layer, shape=shape, batch=batch, how=how[1:]) -> Row:  # type: ignore[no-untyped-def]
                made = ours(layer, scheme, device) if scheme else floats(layer, device)
                networks = [name for name in args.networks if shape in NETWORKS[name]]
                head = {"what": str(scheme or "torch"), "dtype": "float16", "layer": str(shape), "batch": batch}
                row = raced(head, made, x, lambda x, w: F.conv2d(x, w, None, *how), device, peak)
                return row | {"times": {name: NETWORKS[name][shape] for name in networks}}

            where = {"layer": str(shape), "batch": batch}
            yield where, [(str(s or "torch"), s is not None, lambda s=s, job=job: job(s)) for s in (None, *schemes)]


# ---- Gram matrices ----------------------------------------------------------------------------------------


def gram(args: argparse.Namespace, device: Device, peak: dict[str, float]) -> Iterator[tuple[Row, list[Job]]]:
    """Of features like ResNet's after the stem; torch.mm knows no centring."""
    columns = 64 * 56 * 56 if device.cuda else 512
    calls = {
        "torch": lambda x: torch.mm(x, x.T),
        "gram": lambda x: torch.ops.mpqkern.gram([x]),
        "gram, not centred": lambda x: torch.ops.mpqkern.gram([x], False),
    }
    for n in (32, 64, 128, 256):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            first = torch.randn(n, columns, device=device.kind).to(dtype)
            features = [first.clone() for _ in range(device.copies(first.nbytes))]

            def job(what: str, features=features, n=n, dtype=dtype) -> Row:  # type: ignore[no-untyped-def]
                head = {"what": what, "dtype": short(dtype), "n": n, "columns": columns}
                count = len(features)
                row = head | device.seconds(lambda i: calls[what](features[i % count]), count)
                row = rates(row, peak, bytes=features[0].nbytes, operations=2 * n * n * columns)
                return row | {"of_copy": features[0].nbytes * 1e6 / row["us"] / peak["copy"]}

            where = {"n": n, "dtype": short(dtype)}
            yield where, [(what, what != "torch", lambda what=what, job=job: job(what)) for what in calls]


SECTIONS = {"linear": linear, "gram": gram, "conv": conv, "probe": probe}


def measure(name: str, args: argparse.Namespace, device: Device, out: Path) -> int:
    """Runs a section, and writes after each place; how many of our own kernels failed."""
    peak = ceilings(device)
    print(f"{name}: " + ", ".join(f"{what} {value / 1e12:.3f} T/s" for what, value in peak.items()))
    rows, missing, failed = [], {}, 0
    for where, jobs in SECTIONS[name](args, device, peak):
        found: list[Row] = []
        for what, own, job in jobs:
            try:
                found.append(job())
            except Exception as error:  # the next cells are still worth measuring
                place = ", ".join(map(str, where.values()))
                missing[f"{what} ({place})"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                failed += own
        base = next((r["us"] for r in found if r["what"] == "torch"), None)
        rows += [row | {"x_torch": base / row["us"] if base else None} for row in found]
        result = {"bench": f"cuda {name}", "arguments": vars(args), "peaks": peak, "missing": missing, "rows": rows}
        write(out, result)
    print(table(lines(rows), left=(0,)))
    for what, reason in missing.items():
        print(f"left out: {what}: {reason}")
    print(f"{len(rows)} figures; {failed} of our own are missing")
    return failed


def lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """What a reader looks for; a file has the rest."""
    plain = ("what", "layer", "shape", "n", "dtype", "batch", "m", "us")
    titles = {key: key for key in plain} | {"spread": "+-", "x_torch": "x torch", "of_read": "of read"}
    titles |= {"of_copy": "of copy", "of_matmul": "of matmul", "error": "error"}
    forms = {"us": "{:.1f}", "spread": "{:.0%}", "error": "{:.1e}"}
    used = [key for key in titles if any(row.get(key) is not None for row in rows)]
    text = [
        tuple(
            forms.get(key, "{:.2f}" if isinstance(row.get(key), float) else "{}").format(row[key])
            if row.get(key) is not None else "-"
            for key in used
        )
        for row in rows
    ]  # fmt: skip
    return [tuple(titles[key] for key in used), *text]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all when none is named")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008", "8192x8192"], help="N x K")
    parser.add_argument("--m", type=int, nargs="+", default=[1, 4, 16, 64, 128, 256, 1024], help="rows of activations")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder for cuda-<section>.json")
    args = parser.parse_args()
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"section {name!r}; wanted one of {', '.join(SECTIONS)}")
    torch.manual_seed(0)
    device = Device(args.device, args.rounds)
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        todo = args.sections or list(SECTIONS)
        failed = sum(measure(name, args, device, args.out / f"cuda-{name}.json") for name in todo)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
