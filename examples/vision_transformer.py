"""A vision transformer with 8-bit activations: integer products, scales that are fixed beforehand, one graph as a file.

    python -m examples.vision_transformer [--quick] [--average 3]

26 layers on handwritten digits. Widths are chosen by the divergence from the float model, which needs no labels;
weights are rounded with GPTQ; activations are rounded by their own maxima at first, then by calibrated limits.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpqkern as mq
from bench.models.data import digits
from bench.models.training import trained_vit
from mpqkern.ledger import table


def judged(model: nn.Module, x: Tensor, y: Tensor) -> tuple[str, str]:
    with torch.inference_mode():
        logits = model(x)
    return f"{float(F.cross_entropy(logits, y)):.3f}", f"{float((logits.argmax(1) == y).float().mean()):.1%}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="trained for seconds, few samples")
    parser.add_argument("--average", type=float, default=3, help="bits per weight")
    args = parser.parse_args(arguments)
    epochs, samples = (2, 32) if args.quick else (60, 256)
    model = trained_vit(epochs)
    x, _, *held_out = digits()
    batches = [x[:samples]]

    schemes = [mq.Scheme(bits, act_bits=8) for bits in (2, 4, 8)]
    scores = mq.score(model, batches, method="kl", bits=schemes)
    best = mq.solve(scores, mq.Budget(avg_bits=args.average))
    rounded = mq.calibrate(model, best, batches, rounding="gptq")

    lines = [("weights", "activations", "loss", "accuracy", "packed weights")]
    floats = sum(4 * layer.params for layer in mq.catalog(model))
    lines.append(("float", "float", *judged(model, *held_out), f"{floats:,} B"))
    for name, rounding in (("nearest", "minmax"), ("GPTQ", rounded)):
        packed = copy.deepcopy(model)
        ledger = mq.swap_(packed, best, rounding=rounding)
        lines.append((name, "8 bits, by row", *judged(packed, *held_out), f"{ledger.bytes:,} B"))
    report = mq.calibrate_activations_(packed, batches)
    lines.append(("GPTQ", "8 bits, fixed", *judged(packed, *held_out), f"{ledger.bytes:,} B"))
    print(best, report, table(lines, left=(0, 1)), sep="\n\n")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vit.pt2"
        batch = {"x": {0: torch.export.Dim("batch", min=1, max=4096)}}
        torch.export.save(torch.export.export(packed, (x[:2],), dynamic_shapes=batch), path)
        graph = torch.export.load(path).module()
        same = torch.equal(graph(held_out[0]), packed(held_out[0]))
    print(f"exported as one graph and read back, it computes {'the same' if same else 'SOMETHING ELSE'}")


if __name__ == "__main__":
    main()
