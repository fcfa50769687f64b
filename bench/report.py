"""A report of all that there is, about a small real model: what the picture in the README shows.

python bench/report.py [report.html]
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch
from models import digits, trained_resnet8

import mpqkern as mq


def main(path: str = "report.html") -> None:
    torch.set_num_threads(1)
    model = trained_resnet8()
    x, y, held_x, held_y = digits()
    one, batches = (x[:1], y[:1]), [(x[:32], y[:32]), (x[32:64], y[32:64])]

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            out = model(held_x)
        loss = torch.nn.functional.cross_entropy(out, held_y)
        return {"loss": float(loss), "accuracy": float((out.argmax(1) == held_y).float().mean())}

    scores = mq.score(model, batches, method="clado")
    latency = mq.measure_latency(model, one[0])
    best = mq.solve(scores, mq.Budget(avg_bits=3.2), mq.Budget(mbytes=0.2))
    methods = ["clado", "single", "kl", "fisher", "mpqco", "roundoff", "size", "ompq"]
    comparison = mq.compare(model, batches, evaluate, [mq.Budget(avg_bits=b) for b in (2.5, 3, 4)], methods=methods)
    packed = copy.deepcopy(model)
    ledger = mq.swap_(packed, best)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        mq.save(packed, file)
        expected = {"float_model": model, "latency": latency, "scores": scores}
        ledger = mq.audit(ledger, packed, [one, *batches], file=file, **expected)
    written = mq.report(
        path,
        title="ResNet-8 on handwritten digits",
        assignment=best,
        scores=scores,
        frontier=mq.frontier(scores, "bytes"),
        comparison=comparison,
        ledger=ledger,
        latency=latency,
    )
    print(f"{written}: {written.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
