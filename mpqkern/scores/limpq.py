"""LIMPQ: learned step sizes as importance (Tang et al. 2022, arXiv 2203.08368).

A copy of the model is trained for a while with every layer at every width (`Supernet`): a step adds up the gradients
of one pass for each width in all layers and one pass with a random width for each layer, then updates once. What
a layer's weight step s_w and activation step s_a at b bits have grown to is what b bits cost there:

    unary[l, (w, a)] = s_a[l][a] + alpha * s_w[l][w]

the objective of the paper's integer program. Activations count only in schemes with `act_bits`: `bits=(2, 4, 8)`
scores weights alone, `bits=[Scheme(w, act_bits=a) for ...]` pairs. Steps are in units of the tensors they round, so
do not fold BatchNorms into the weights beforehand.

Training is one sequence of steps: under torch.distributed every rank does all of it, with the same result.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..held import hooked, sound_backward
from ..measuring.meter import Unfinished, Work
from ..measuring.task import Task, digest, logits_of
from ..numbers import check_number
from ..scheme import Scheme
from .indicators import check_costs, from_indicators
from .lsq import INITS, SMALLEST, Level, Supernet
from .run import Run
from .table import Scores

STEPS = 300
LR_END = 1e-5
GRADIENT_MAX = 1.0
SAVE_EVERY = 25  # training steps
AFTERWARDS = ("alpha", "wired", "rounding")


def score(
    run: Run,
    *,
    alpha: float = 2.0,
    steps: int = STEPS,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 2.5e-5,
    smoothing: float = 0.1,
    first_last: bool = True,
    init: str = "statistics",
    step_max: float | None = None,
    wired: str = "repair",
    train_weights: bool = True,
) -> Scores:
    """Learned steps of every layer and width; both kinds are in the provenance under "indicators".

    alpha          weight of weight steps against activation steps. 2 is the paper's for ResNet-50; it takes 3 for
                   ResNet-18 and 1 for MobileNet
    steps          updates, each from one batch; the batches come in a new order each time round. The paper goes
                   through its training set 3 to 5 times
    lr             of SGD with gradients clipped to +-1, falling to 1e-5 along a cosine; this, momentum and
                   weight_decay are the paper's
    smoothing      of labels, where the loss is cross-entropy
    first_last     leave the model's first and last layer in float, as the paper does, which later fixes them at
                   8 bits. Layers without steps cost nothing at the widest scheme, and at any other as much as
                   all other layers can cost together: they are narrowed last
    init           "statistics" of weights and of the first inputs, or "same": 0.1 / bits everywhere
    step_max       limit that steps are put back to after an update; the authors clamp to 1.0 as they use them,
                   which suits inputs of about unit size only
    wired          what is done with a narrower width that has a smaller step than a wider one. "repair": it costs
                   the wider one's step times the ratio of the two widths' steps in the median layer.
                   "forbid", the authors': it costs 1e8
    train_weights  False is method "limpq_lite": only steps and BatchNorms of the copy train

    Without labels the loss is the divergence from the float model. Dropout is off. A bank keeps the state of the
    training, not single measurements: other batches start a training of their own.
    """
    _check(steps=steps, lr=lr, momentum=momentum, weight_decay=weight_decay, smoothing=smoothing, step_max=step_max)
    if init not in INITS:
        raise ValueError(f"init={init!r}; wanted 'statistics' or 'same'")
    check_costs(alpha, wired)
    levels = levels_of(run.schemes)
    key = f"{digest(map(run.task.digest, range(len(run.task.batches))))}/training"
    evaluations = steps * (len(levels) + 1)
    run.meter.begin("limpq", evaluations)
    if key in run.bank and "indicators" in run.bank[key]:
        run.meter.step("from the bank", evaluations, made=False)
        text = run.bank[key]["indicators"].tobytes()
    else:
        run.task.prepare()
        net = Supernet(run.task, levels, first_last=first_last, init=init, train_weights=train_weights)
        sgd = Sgd(net.trained(), lr, steps, momentum, weight_decay)
        _train(run, net, sgd, key, smoothing, step_max)
        text = json.dumps(net.indicators()).encode()
        run.bank.put(key, indicators=np.frombuffer(text, np.uint8))
    found = json.loads(text)
    weight, act = ({name: both[kind] for name, both in found.items()} for kind in "wa")
    return from_indicators(run.task.layers, weight, act, alpha=alpha, schemes=run.schemes, wired=wired)


def work(run: Run, *, steps: int = STEPS, train_weights: bool = True, **_: Any) -> Work:
    passes = steps * (len(levels_of(run.schemes)) + 1)
    weights = sum(p.nbytes for p in run.task.model.parameters())
    # the copy; gradients and momentum; what each module hands on, beside it the scaled and the rounded input of a layer
    held = weights * (3 if train_weights else 1) + 3 * _outputs_bytes(run.task)
    return Work(passes, 3 * passes / len(run.task.batches), held)


score_lite = partial(score, train_weights=False)
work_lite = partial(work, train_weights=False)


def levels_of(schemes: Sequence[Scheme | None]) -> list[Level]:
    """What the passes of one training step compute with, widest first: as many as there are widths.

    The widths of weights and of activations go down side by side; the shorter list dwells.

    >>> levels_of([Scheme(2, act_bits=8), Scheme(4, act_bits=8)])
    [Level(weight=4, act=8), Level(weight=2, act=8)]
    """
    weights = sorted({s.bits for s in schemes if s is not None}, reverse=True)
    acts = sorted({s.act_bits for s in schemes if s is not None and s.act_bits is not None}, reverse=True)
    if not weights or min(weights + acts) < 2:
        raise ValueError(f"bits={', '.join(map(str, schemes))}; wanted widths of 2 bits or more to learn steps for")
    last = max(len(weights), len(acts)) - 1

    def spread(bits: list[int]) -> list[int | None]:
        return [bits[round(i * (len(bits) - 1) / max(last, 1))] if bits else None for i in range(last + 1)]

    return list(map(Level, spread(weights), spread(acts)))


class Sgd:
    """Momentum, clipped gradients, and a rate that falls along a cosine."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], lr: float, steps: int, momentum: float, weight_decay: float
    ) -> None:
        self.parameters, self.lr, self.steps = parameters, lr, steps
        self.momentum, self.weight_decay = momentum, weight_decay
        self.velocity = [torch.zeros_like(p) for p in parameters]

    def update(self, step: int) -> None:
        """Uses the gradients up."""
        rate = LR_END + (self.lr - LR_END) * (1 + math.cos(math.pi * step / self.steps)) / 2
        for parameter, velocity in zip(self.parameters, self.velocity, strict=True):
            if parameter.grad is None:
                continue
            value = parameter.data
            gradient = parameter.grad.clamp_(-GRADIENT_MAX, GRADIENT_MAX).add_(value, alpha=self.weight_decay)
            value.sub_(velocity.mul_(self.momentum).add_(gradient), alpha=rate)
            parameter.grad = None


def _train(run: Run, net: Supernet, sgd: Sgd, key: str, smoothing: float, step_max: float | None) -> None:
    """Goes on from the state in the bank, if there is one. All that is random depends on seed and step alone."""
    levels, batches, start = len(net.levels), len(run.task.batches), 0
    if key in run.bank:
        start = _restore(run.bank[key]["state"], net, sgd)
        run.meter.step("from the bank", start * (levels + 1), made=False)
    for step in range(start, sgd.steps):
        epoch, position = divmod(step, batches)
        index = int(_random(run.seed, 0, epoch).permutation(batches)[position])
        passes = [[level] * len(net.layers) for level in range(levels)]
        passes.append(_random(run.seed, 1, step).integers(levels, size=len(net.layers)).tolist())
        for choice in passes:
            _backward(net, choice, index, smoothing)
        sgd.update(step)
        net.bound_steps(step_max)
        stopped = None
        try:
            run.meter.step(f"step {step + 1}", levels + 1)
        except Unfinished as limit:
            stopped = limit
        if run.bank.path is not None and (stopped or (step + 1) % SAVE_EVERY == 0):
            run.bank.put(key, state=_saved(step + 1, net, sgd))
        if stopped:
            raise stopped


def _backward(net: Supernet, choice: Sequence[int], index: int, smoothing: float) -> None:
    """Adds the gradients of one pass."""
    net.choose(choice)
    with torch.enable_grad():
        loss = _loss(net.task, index, smoothing)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of batch {index} became {loss.item()} in training; wanted a smaller lr")
        with sound_backward(net.task.model):
            loss.backward()


def _loss(task: Task, index: int, smoothing: float) -> Tensor:
    output = task.run(task.batches[index])
    loss = task.losses(output, index).mean()
    if task.loss_name != "ce" or not smoothing:
        return loss
    guesses = -logits_of(output).double().log_softmax(-1).mean(-1)[task.labels(index) >= 0]
    return (1 - smoothing) * loss + smoothing * guesses.sum() / max(guesses.numel(), 1)


def _saved(step: int, net: Supernet, sgd: Sgd) -> np.ndarray:
    file = io.BytesIO()
    torch.save({"step": step, "net": net.state(), "velocity": sgd.velocity}, file)
    return np.frombuffer(file.getvalue(), np.uint8)


def _restore(saved: np.ndarray, net: Supernet, sgd: Sgd) -> int:
    state = torch.load(io.BytesIO(saved.tobytes()), weights_only=True, map_location=net.task.device)
    net.load_state_dict(state["net"], strict=False)
    sgd.velocity = state["velocity"]
    return state["step"]


def _random(seed: int, use: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**32, use, number])


def _outputs_bytes(task: Task) -> int:
    """What all modules that have no children return for the first batch."""
    total = 0

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal total
        total += output.nbytes if isinstance(output, Tensor) else 0

    with hooked(m.register_forward_hook(hook) for m in task.model.modules() if not any(m.children())):
        task.run(task.batches[0])
    return total


def _check(**options: Any) -> None:
    """Each as `name=value`."""
    wanted = {
        "steps": (lambda v: v >= 1, "a whole number above 0"),
        "lr": (lambda v: v > 0, "a number above 0"),
        "momentum": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
        "weight_decay": (lambda v: v >= 0, "0 or more"),
        "smoothing": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
        "step_max": (lambda v: v > SMALLEST, f"None or a number above {SMALLEST}"),
    }
    for name, value in options.items():
        good, text = wanted[name]
        check_number(name, value, text, good, whole=name == "steps", optional=name == "step_max")
