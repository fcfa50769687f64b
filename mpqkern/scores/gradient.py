"""First-order baselines: what a layer's rounding does, seen through gradients of the loss.

With y a layer's output, dy_b what scheme b adds to it when nothing else is rounded, g = dL_n/dy the gradient of
sample n's loss, w the layer's weight and dw_b what scheme b adds to that:

    fisher      mean_n sum_i (g_i dy_b,i)^2                    the diagonal of the Fisher information stands for the
                                                               Hessian of the layer's outputs (NVIDIA ModelOpt)
    mpqco       1/2 mean_n (dw_b . grad_w log p_n)^2           p_n the probability of sample n's label: the Gauss-Newton
                                                               matrix of cross-entropy (Chen et al. 2021,
                                                               arXiv 2110.06554; as a baseline in Deng et al. 2023,
                                                               arXiv 2307.05657)
    delta_loss  sum_i |dL/dw_i dw_b,i| + sum_i |dL/dx_i dx_b,i|  the second term where activations are rounded
                                                               (AutoRound's AutoScheme)

A layer is linear in its weight, so dw . grad_w is the sum of g dy: one backward pass a batch and the layer's own
product under each scheme give the first two for every sample at once. Weights never receive gradients.

The divergence of a model from itself is flat, so where that is the loss, fisher and mpqco take its second derivative
instead, the Fisher information: labels are drawn from the model's own answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..held import sound_backward
from ..measuring.bank import Item
from ..measuring.meter import Work
from ..measuring.task import cross_entropy, logits_of
from ..rounding.twin import rounded_input
from .run import Run
from .table import Scores


def score_fisher(run: Run) -> Scores:
    """Squared gradient times squared change at each layer's output, summed over the outputs, mean over samples."""

    def make(index: int, _: int) -> Item:
        output, calls = _recorded(run, index)
        grads = _gradients(_log_likelihood(run, index, output), [c.probe for c in calls])
        found = np.zeros((len(run.task.layers), len(run.schemes)))
        for call, grad in zip(calls, grads, strict=True):
            for b, change in _changes(run, call):
                found[call.layer, b] += float((grad.double() * change).square().sum())
        return {"squares": found}

    items = _measured(run, "fisher", make)
    return run.scores(sum(item["squares"] for item in items) / run.task.samples)


def work_fisher(run: Run) -> Work:
    return Work(len(run.task.batches), 3.0 + len(run.schemes), graph_bytes(run))


def score_mpqco(run: Run, *, of: str = "probability") -> Scores:
    """Squared slope, along the rounding of a layer's weight, of the logarithm of what the model gives the label.

    of   "probability": the label's probability after softmax, which is what makes the square a Gauss-Newton term of
         cross-entropy; with a loss of your own, exp(-loss). "logit": the label's logit itself, as the published
         comparison code divides by; it blows up where a logit is near zero.

    A sample with several labels counts once, with the mean of their logarithms.
    """
    if of not in ("probability", "logit"):
        raise ValueError(f"of={of!r}; wanted 'probability' or 'logit'")

    def make(index: int, _: int) -> Item:
        output, calls = _recorded(run, index)
        values = _log_likelihood(run, index, output) if of == "probability" else _log_logit(run, index, output)
        size, probes = run.task.sizes[index], [c.probe for c in calls]
        first = _gradients(values, probes, sample=0, keep=True)
        grads = _gradients(values, probes, keep=True)
        slopes = np.zeros((len(run.task.layers), len(run.schemes), size))
        for call, own, grad in zip(calls, first, grads, strict=True):
            by_sample = _layout(own, size)
            changes = dict(_changes(run, call))
            if by_sample is not None:
                for b, change in changes.items():
                    slopes[call.layer, b] += by_sample(grad.double() * change).sum(1).cpu().numpy()
                continue
            for n in range(size):  # samples are mixed in this output: a backward pass for each
                grad = _gradients(values, [call.probe], sample=n, keep=True)[0].double()
                for b, change in changes.items():
                    slopes[call.layer, b, n] += float((grad * change).sum())
        return {"slopes": slopes}

    items = _measured(run, "mpqco", make)
    return run.scores(sum(np.square(item["slopes"]).sum(-1) for item in items) / (2 * run.task.samples))


def work_mpqco(run: Run, *, of: str = "probability") -> Work:
    return Work(len(run.task.batches), 5.0 + len(run.schemes), graph_bytes(run))


def score_delta_loss(run: Run, *, at: str = "quantized") -> Scores:
    """First-order change of the loss, weight by weight without regard to sign, of each batch's mean loss.

    at   where the gradient is taken. "quantized": with all layers under the scheme in question, a backward pass a
         scheme, as published; it sees the layers' errors together. "float": at the model as it is, one pass for all
         schemes; close to a minimum it is mostly noise.

    Signs cancel within a batch only, so the size of the batches matters.
    """
    if at not in ("quantized", "float"):
        raise ValueError(f"at={at!r}; wanted 'quantized' or 'float'")
    task, layers = run.task, range(len(run.task.layers))
    if at == "float" and task.from_itself:
        raise ValueError("at='float' with loss='kl', which is flat there; wanted at='quantized' or labels")
    rounded = [b for b, scheme in enumerate(run.schemes) if scheme is not None]
    passes = [({}, rounded)] if at == "float" else [(dict.fromkeys(layers, b), [b]) for b in rounded]
    items = _measured(run, "delta_loss", lambda index, part: _moved(run, index, *passes[part]), parts=len(passes))
    found = np.zeros((len(layers), len(run.schemes)))
    for i, item in enumerate(items):
        index, part = divmod(i, len(passes))
        found[:, passes[part][1]] += item["moved"] * (task.sizes[index] / task.samples)
    return run.scores(found)


def work_delta_loss(run: Run, *, at: str = "quantized") -> Work:
    passes = 1 if at == "float" else sum(scheme is not None for scheme in run.schemes)
    gradients = sum(run.variants.parameter(i).nbytes for i in range(len(run.task.layers)))
    return Work(passes * len(run.task.batches), 3.0 * passes, graph_bytes(run) + gradients)


def _measured(run: Run, title: str, make: Callable[[int, int], Item], parts: int = 1) -> list[Item]:
    """The items (batch 0, part 0), (batch 0, part 1), ...; the parameters take no part in gradients."""
    for parameter in run.task.model.parameters():
        parameter.requires_grad_(False)
    wanted = [(index, part) for index in range(len(run.task.batches)) for part in range(parts)]
    by_key = {run.key(index, part): (index, part) for index, part in wanted}
    shown = {key: f"batch {index}" + f", part {part}" * (parts > 1) for key, (index, part) in by_key.items()}
    run.task.prepare()
    run.meter.begin(title, len(shown))
    items = run.bank.measure(shown, lambda key: make(*by_key[key]), run.meter)
    found = dict(zip(shown, items, strict=True))
    return [found[run.key(*each)] for each in wanted]  # equal batches have one key


# ---- fisher and mpqco: gradients at outputs ------------------------------------------------------------


@dataclass
class Call:
    """One call of a layer's module on the way to the loss."""

    layer: int
    module: nn.Module
    args: tuple
    output: Tensor
    probe: Tensor  # zeros that were added to the output, to collect its gradient


def _recorded(run: Run, index: int) -> tuple[Any, list[Call]]:
    """The model's output for a batch, with its graph, and all calls of the layers."""
    calls: list[Call] = []

    def recorder(layer: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            probe = torch.zeros_like(output, requires_grad=True)
            # a copy, as the code that follows may write to what it gave the layer
            args = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, args)
            calls.append(Call(layer, module, args, output.detach(), probe))
            return output + probe

        return hook

    with torch.enable_grad(), ExitStack() as undo:
        for layer, modules in enumerate(run.task.modules):
            for module in modules:
                undo.callback(module.register_forward_hook(recorder(layer)).remove)
        return run.task.run(run.task.batches[index]), calls


def _changes(run: Run, call: Call) -> Iterator[tuple[int, Tensor]]:
    """float64: what each scheme adds to the output of a call, whose input is that of the float model."""
    for b, scheme in enumerate(run.schemes):
        if scheme is not None:
            with torch.no_grad(), run.variants.applied({call.layer: b}):
                rounded = call.module(*call.args)
            yield b, rounded.double() - call.output.double()


def _log_likelihood(run: Run, index: int, output: Any) -> Tensor:
    """[samples]: minus the loss; where that is flat, the log-probability of labels drawn from the answers."""
    with torch.enable_grad():
        if not run.task.from_itself:
            return -run.task.losses(output, index)
        logits = logits_of(output)
        return -cross_entropy(logits, _drawn(run, index, logits))


def _log_logit(run: Run, index: int, output: Any) -> Tensor:
    """[samples]: the logarithm of the label's logit, over all but the samples the mean; labels < 0 are left out."""
    labels = None if run.task.from_itself else run.task.labels(index)
    with torch.enable_grad():
        logits = logits_of(output)
        labels = _drawn(run, index, logits) if labels is None else labels
        own = logits.double().gather(-1, labels.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
        counted = (labels >= 0).double()
        values = torch.where(labels >= 0, own.abs(), 1.0).log().flatten(1) if labels.dim() > 1 else own.abs().log()
        return values.sum(1) / counted.flatten(1).sum(1).clamp(min=1) if labels.dim() > 1 else values


def _drawn(run: Run, index: int, logits: Tensor) -> Tensor:
    """Labels drawn from the model's own answers."""
    chances = logits.detach().double().softmax(-1).cpu()
    drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=run.generator(index, "labels"))
    return drawn.view(chances.shape[:-1]).to(logits.device)


def _layout(first: Tensor, size: int) -> Callable[[Tensor], Tensor] | None:
    """How to see an output as [samples, rest], told from the gradient of the first sample's loss: only that
    sample's part of it is not zero. None where there is no such way."""
    ways: list[Callable[[Tensor], Tensor]] = []
    if first.numel() % size == 0:
        ways.append(lambda x: x.reshape(size, -1))
    for axis in range(1, first.dim()):
        if first.shape[axis] == size:
            ways.append(lambda x, axis=axis: x.movedim(axis, 0).reshape(size, -1))
    return next((way for way in ways if not way(first)[1:].any()), None)


# ---- delta_loss: gradients at weights and inputs -------------------------------------------------------


def _moved(run: Run, index: int, choice: Mapping[int, int], schemes: Sequence[int]) -> Item:
    """[layers, schemes]: the absolute first-order changes, by the gradient with `choice` applied."""
    layers = range(len(run.task.layers))
    weights = [run.variants.parameter(layer) for layer in layers]
    inputs: list[tuple[int, Tensor, Tensor]] = []  # layer, its input, zeros added to it to collect the gradient

    def recorder(layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple) -> tuple:
            probe = torch.zeros_like(args[0], requires_grad=True)
            inputs.append((layer, args[0].detach().clone(), probe))
            return (args[0] + probe, *args[1:])

        return hook

    with torch.enable_grad(), ExitStack() as undo:
        if any(run.schemes[b].act_bits is not None for b in schemes):
            for layer, modules in enumerate(run.task.modules):  # before the hooks that round, to see what they get
                for module in modules:
                    undo.callback(module.register_forward_pre_hook(recorder(layer)).remove)
        undo.enter_context(run.variants.applied(choice))
        for weight in weights:
            undo.callback(weight.requires_grad_, False)
            weight.requires_grad_(True)
        losses = run.task.losses(run.task.run(run.task.batches[index]), index)
        undo.enter_context(sound_backward(run.task.model))
        grads = _gradients(losses / len(losses), [*weights, *(probe for _, _, probe in inputs)])
    found = np.zeros((len(layers), len(schemes)))
    for column, b in enumerate(schemes):
        for layer in layers:
            found[layer, column] = _absolute(grads[layer], run.variants.change(layer, b))
        if run.schemes[b].act_bits is not None:
            for (layer, x, _), grad in zip(inputs, grads[len(weights) :], strict=True):
                change = rounded_input(x, run.schemes[b], run.task.layers[layer].kind) - x
                found[layer, column] += _absolute(grad, change)
    return {"moved": found}


def _absolute(grad: Tensor, change: Tensor) -> float:
    return float((grad.double() * change.double()).abs().sum())


# ---- both ----------------------------------------------------------------------------------------------


def _gradients(values: Tensor, inputs: Sequence[Tensor], *, sample: int | None = None, keep: bool = False) -> Any:
    """Of the sum of `values`, or of one of them, with respect to each input; zeros where it does not depend on one."""
    if not values.requires_grad:
        raise ValueError("the loss has no gradient; wanted a forward and a loss that torch can differentiate")
    of = torch.ones_like(values)
    if sample is not None:
        of = torch.zeros_like(values).index_fill_(0, torch.tensor(sample, device=values.device), 1)
    return torch.autograd.grad(values, inputs, of, retain_graph=keep, materialize_grads=True)


def graph_bytes(run: Run) -> int:
    """For the largest batch: what the layers got and gave, gradients, and about as much again in the graph."""
    index = max(range(len(run.task.batches)), key=lambda i: run.task.sizes[i])
    _, calls = _recorded(run, index)
    return sum(2 * call.args[0].nbytes + 4 * call.output.nbytes for call in calls)
