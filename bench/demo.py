"""The main job on a small real model: compare methods, solve, round, pack, verify, save, load elsewhere, report.
Where matplotlib is installed, the plots of the report are PNG files too, in plots/ beside it.

python bench/demo.py [--report build/demo/report.html] [--json demo.json]
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from harness import measure, write
from models import ResNet8
from models.cases import resnet8

import mpqkern as mq
from mpqkern.ledger import table

METHODS = ["clado", "greedy", "single", "kl", "fisher", "mpqco", "csmpq", "ompq", "roundoff", "size", "uniform"]
ELSEWHERE = """
import sys, torch, mpqkern as mq
from models import ResNet8
torch.set_num_threads(1)
with torch.inference_mode():
    torch.save(mq.load(ResNet8, sys.argv[1]).eval()(torch.load(sys.argv[2])), sys.argv[3])
"""


def loaded_elsewhere(file: Path, x: torch.Tensor) -> torch.Tensor:
    """What the saved model gives in a process of its own."""
    given, taken = file.with_name("given.pt"), file.with_name("taken.pt")
    torch.save(x, given)
    command = [sys.executable, "-c", ELSEWHERE, *map(str, (file, given, taken))]
    subprocess.run(command, cwd=Path(__file__).parent, check=True)
    return torch.load(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("build/demo/report.html"), help="write the report here")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.report.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"\n[{time.perf_counter() - start:.0f} s] {text}", flush=True)

    model, batches, held_out, evaluate = resnet8()
    images = torch.cat([x for x, _ in held_out])
    one = tuple(part[:1] for part in held_out[0])
    say(f"ResNet-8 on handwritten digits; {mq.ops.isa()} kernels, 1 thread. Methods under the same budgets, held out:")
    comparison = mq.compare(model, batches, evaluate, [mq.Budget(avg_bits=b) for b in (2.5, 3, 4)], methods=METHODS)
    print(comparison)

    say("The best assignment within 125 kB that is no slower than float, for weights rounded by GPTQ:")
    latency = mq.measure_latency(model, one[0])
    scores = mq.score(model, batches, method="clado", rounding="gptq")
    best = mq.solve(scores, mq.Budget(bytes=125_000), latency.budget(ms=latency.total))
    print(best)

    say("Packed, verified against fp64, saved, and loaded in another process:")
    plans = {"8 bits": 8, "4 bits": 4, "2 bits": 2, "2 bits, GPTQ": 2, "mixed, GPTQ": best}
    models, sizes = {"float": model}, {"float": sum(4 * layer.params for layer in mq.catalog(model))}
    files = {"float": mq.save(model, folder / "float.safetensors")}
    for name, plan in plans.items():
        packed, file = copy.deepcopy(model), folder / f"{name.replace(', ', '-').replace(' ', '-')}.safetensors"
        data = {"rounding": "gptq", "batches": batches} if "GPTQ" in name else {}
        ledger = mq.swap_(packed, plan if plan is best else {"*": plan}, **data)
        if not (checked := mq.verify(packed, images[:16])).ok:
            raise SystemExit(f"the kernels disagree with their reference:\n{checked}")
        sizes[name], files[name] = ledger.bytes, mq.save(packed, file)
        models[name] = mq.load(ResNet8, file).eval()  # what is measured is what was read back
    with torch.inference_mode():
        if not torch.equal(loaded_elsewhere(file, images), models["mixed, GPTQ"](images)):
            raise SystemExit("the saved model computes something else in another process")
        singly = measure({name: (lambda i, m=m: m(images[i % 500 : i % 500 + 1])) for name, m in models.items()})
        many = measure({name: (lambda i, m=m: m(images[:64])) for name, m in models.items()})

    rows = [
        {
            "what": name,
            **evaluate(m),
            "weight_bytes": sizes[name],
            "bytes": files[name],
            "ms_1": singly[name].seconds * 1e3,
            "ms_64": many[name].seconds * 1e3,
        }
        for name, m in models.items()
    ]
    lines = [("weights", "accuracy", "loss", "packed weights", "file", "1 image", "64 images")]
    for r in rows:
        bytes_ = f"{r['weight_bytes']:,} B", f"{r['bytes']:,} B"
        lines.append(
            (
                r["what"],
                f"{r['accuracy']:.1%}",
                f"{r['loss']:.3f}",
                *bytes_,
                f"{r['ms_1']:.2f} ms",
                f"{r['ms_64']:.1f} ms",
            )
        )
    print(table(lines))
    print(
        f"(accuracy on {len(images)} test images: one standard error is about {(0.02 * 0.98 / len(images)) ** 0.5:.1%})"
    )

    say("As predicted?")
    expected = {"float_model": model, "latency": latency, "scores": scores, "file": file}
    ledger = mq.audit(ledger, packed, [one, *batches], **expected)
    print(ledger)
    written = mq.report(
        args.report,
        title="ResNet-8 on handwritten digits",
        assignment=best,
        scores=scores,
        frontier=mq.frontier(scores, "bytes"),
        comparison=comparison,
        ledger=ledger,
        latency=latency,
        pictures=folder / "plots" if find_spec("matplotlib") else None,
    )
    write(args.json, {"bench": "demo", "rows": rows})
    say(f"Done. Open {written} in a browser.")


if __name__ == "__main__":
    main()
