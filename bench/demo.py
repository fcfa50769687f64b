"""The main job on a small real model: pack it to 8, 4 and 2 bits, save, load, and compare with float.

python bench/demo.py [--json demo.json]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
from harness import measure, write
from models import ResNet8, digits, trained_resnet8

import mpqkern as mq
from mpqkern.ledger import table


def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.inference_mode():
        return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    model = trained_resnet8()
    _, _, x, y = digits()
    ready = time.perf_counter() - start
    print(f"ResNet8 on handwritten digits, ready after {ready:.0f} s; {mq.ops.isa()} kernels, 1 thread")

    rows = []
    models = {"float": model}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        weights = sum(4 * layer.params for layer in mq.catalog(model))
        rows.append({"what": "float", "weight_bytes": weights, "bytes": mq.save(model, path)})
        for bits in (8, 4, 2):
            packed = copy.deepcopy(model)
            ledger = mq.swap_(packed, {"*": mq.Scheme(bits)})
            if not (report := mq.verify(packed, x[:16])).ok:
                raise SystemExit(f"the kernels disagree with their reference:\n{report}")
            rows.append({"what": f"{bits} bits", "weight_bytes": ledger.bytes, "bytes": mq.save(packed, path)})
            models[f"{bits} bits"] = mq.load(ResNet8, path).eval()  # what is measured is what was read back

    with torch.inference_mode():
        one = measure({name: (lambda i, m=m: m(x[i % 500 : i % 500 + 1])) for name, m in models.items()})
        many = measure({name: (lambda i, m=m: m(x[:64])) for name, m in models.items()})
    lines = [("weights", "accuracy", "packed weights", "file", "1 image", "64 images")]
    for row in rows:
        name = row["what"]
        row["accuracy"] = accuracy(models[name], x, y)
        row["ms_1"], row["ms_64"] = one[name].seconds * 1e3, many[name].seconds * 1e3
        sizes = f"{row['weight_bytes']:,} B", f"{row['bytes']:,} B"
        lines.append((name, f"{row['accuracy']:.1%}", *sizes, f"{row['ms_1']:.2f} ms", f"{row['ms_64']:.1f} ms"))
    print(table(lines))
    print(f"(accuracy on {len(y)} test images: one standard error is about {(0.02 * 0.98 / len(y)) ** 0.5:.1%})")
    write(args.json, {"bench": "demo", "rows": rows})


if __name__ == "__main__":
    main()
