"""A convolutional network under a budget of bytes: measure, choose, calibrate, pack, check, save.

    python -m examples.cnn [--quick] [--fraction 0.08]

ResNet-8 on handwritten digits (scikit-learn's; trained once, for half a minute). Which layers deserve 8 bits and which
do with 2 is measured with CLADO; the same bytes are then rounded plainly and with GPTQ, and compared with one width for
all layers.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import mpqkern as mq
from bench.models.data import digits
from bench.models.networks import ResNet8
from bench.models.training import trained_resnet8
from mpqkern.ledger import table


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> str:
    with torch.inference_mode():
        return f"{float((model(x).argmax(1) == y).float().mean()):.1%}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a narrow network, trained for seconds")
    parser.add_argument("--fraction", type=float, default=0.08, help="of the float weights' bytes")
    args = parser.parse_args(arguments)
    width, epochs, samples = (8, 3, 32) if args.quick else (32, 12, 256)
    model = trained_resnet8(width, epochs)
    x, y, *held_out = digits()
    batches = [(x[:samples], y[:samples])]

    scores = mq.score(model, batches, method="clado", bits=(2, 4, 8))
    best = mq.solve(scores, mq.Budget(fraction=args.fraction))
    print(best)
    rounded = mq.calibrate(model, best, batches, rounding="gptq", correct_bias=True)

    lines = [("weights", "accuracy", "packed weights")]
    floats = sum(4 * layer.params for layer in mq.catalog(model))
    lines.append(("float", accuracy(model, *held_out), f"{floats:,} B"))
    plans = [(f"all {bits} bits", {"*": bits}, "minmax") for bits in (8, 4, 2)]
    for name, plan, rounding in [*plans, ("chosen", best, "minmax"), ("chosen, GPTQ", best, rounded)]:
        packed = copy.deepcopy(model)
        ledger = mq.swap_(packed, plan, rounding=rounding)
        lines.append((name, accuracy(packed, *held_out), f"{ledger.bytes:,} B"))
    print(table(lines))

    checked = mq.verify(packed, held_out[0][:16])
    if not checked.ok:
        raise SystemExit(f"the kernels disagree with their reference:\n{checked}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        size = mq.save(packed, path)
        loaded = mq.load(lambda: ResNet8(width), path).eval()
        same = torch.equal(loaded(held_out[0]), packed(held_out[0]))
    print(f"saved in {size:,} B; read back, it computes {'the same' if same else 'SOMETHING ELSE'}")


if __name__ == "__main__":
    main()
