"""Learned step sizes: a model that can compute at several widths, with one step for each layer and width.

A step s rounds values v to clamp(round(v / s), low, high) * s. The step is trained like a weight: rounding passes
the gradient of v straight through inside the range and stops it outside, and the step itself gets

    sum_n g_n * (round(v_n / s) - v_n / s inside, low below, high above) / sqrt(high * N)

(Esser et al. 2020, arXiv 1902.08153). Weights use -2^(b-1) .. 2^(b-1)-1, activations 0 .. 2^b-1, or the range
of weights where the first batch holds negative numbers. One step serves a whole tensor.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..catalog import input_of
from ..held import hooked
from ..measuring.task import Task

SMALLEST = 1e-5  # of a step
INITS = ("statistics", "same")


class Level(NamedTuple):
    """What a layer computes with in one pass: bits of its weight and of its input, None for float."""

    weight: int
    act: int | None


def limits(bits: int, signed: bool) -> tuple[int, int]:
    """The lowest and the highest code.

    >>> limits(4, True), limits(4, False)
    ((-8, 7), (0, 15))
    """
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def lsq(values: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """`values` rounded with a learned step, a tensor of one number.

    >>> lsq(torch.tensor([-0.9, 0.2, 0.4, 9.0]), torch.tensor(0.5), 2, True)
    tensor([-1.0000,  0.0000,  0.5000,  0.5000])
    """
    return _Lsq.apply(values, step, *limits(bits, signed))


class _Lsq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        # A half-precision quotient would have no digits left behind the point.
        wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        scaled = wide / step
        ctx.save_for_backward(scaled)
        ctx.low, ctx.high, ctx.dtype = low, high, step.dtype
        return (scaled.clamp(low, high).round_() * step).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (scaled,) = ctx.saved_tensors
        inside = (scaled >= ctx.low) & (scaled <= ctx.high)
        by_step = None
        if ctx.needs_input_grad[1]:
            slope = scaled.clamp(ctx.low, ctx.high).round_().sub_(scaled * inside)
            gain = 1 / math.sqrt(ctx.high * scaled.numel())
            by_step = (gradient * slope).sum(dtype=torch.float64).to(ctx.dtype) * gain
        return gradient * inside if ctx.needs_input_grad[0] else None, by_step, None, None


class Steps(nn.Module):
    """The steps of one layer: for each width of its weight, and for each of its input."""

    def __init__(self, weight: Tensor, levels: Sequence[Level], signed: bool, init: str) -> None:
        super().__init__()
        self.weight_bits = _widths(level.weight for level in levels)
        self.act_bits = _widths(level.act for level in levels)
        self.signed = signed
        self.level: Level | None = None  # None: float
        w = weight.detach().double()
        reach = float(w.mean().abs() + 3 * w.std(correction=0))  # the larger of |mean - 3 sigma| and |mean + 3 sigma|
        first = [0.1 / b if init == "same" else max(reach / 2 ** (b - 1), SMALLEST) for b in self.weight_bits]
        options = {"dtype": torch.float64, "device": weight.device}
        self.weight = nn.Parameter(torch.tensor(first, **options))
        self.act = nn.Parameter(torch.tensor([0.1 / b for b in self.act_bits], **options))
        self.register_buffer("seen", torch.full((len(self.act_bits),), init == "same"))

    def round_weight(self, weight: Tensor) -> Tensor:
        if self.level is None:
            return weight
        at = self.weight_bits.index(self.level.weight)
        return lsq(weight, self.weight[at], self.level.weight, True)

    def round_input(self, x: Tensor) -> Tensor:
        """The first input at a width sets its step: 2 mean|x| / sqrt(high)."""
        if self.level is None or self.level.act is None or not x.numel():
            return x
        at = self.act_bits.index(self.level.act)
        if not self.seen[at]:
            high = limits(self.level.act, self.signed)[1]
            self.act.data[at] = (2 * x.detach().double().abs().mean() / math.sqrt(high)).clamp(min=SMALLEST)
            self.seen[at] = True
        return lsq(x, self.act[at], self.level.act, self.signed)


class Supernet(nn.Module):
    """A copy of a task's model whose layers compute at any of some levels; the task's own model stays as it is.

    `layers` are the layers of the task that have `steps`: those that the first batch reaches, without the model's
    first and last if `first_last`. Each BatchNorm has one state a level and follows the layer called last before
    it; one that follows a layer in float has a single state. In batch statistics are all those that train.
    """

    def __init__(
        self, task: Task, levels: Sequence[Level], *, first_last: bool, init: str, train_weights: bool
    ) -> None:
        super().__init__()
        self.levels = list(levels)
        self.model = _copied(task.model).eval()
        self.task = copy.copy(task)
        self.task.model = self.model
        names = {id(module): name for name, module in task.model.named_modules()}
        self.task.modules = [[self.model.get_submodule(names[id(m)]) for m in twins] for twins in task.modules]
        calls, negative = self._calls()
        own = {id(module): layer for layer, twins in enumerate(self.task.modules) for module in twins}
        reached = [id(module) for module in calls if isinstance(module, (nn.Linear, nn.Conv2d))]
        ends = {own.get(m) for m in (reached[:1] + reached[-1:])} if first_last else set()
        self.layers = sorted({own[m] for m in reached if m in own} - ends)
        if not self.layers:
            raise ValueError(
                f"first_last={first_last}: no layer is left to learn steps for; wanted first_last=False, and a "
                "forward= that calls the model it is given"
            )
        for parameter in self.model.parameters():
            parameter.requires_grad_(train_weights and parameter.is_floating_point())
        self.steps = nn.ModuleList()
        for layer in self.layers:
            signed = any(negative[id(module)] for module in self.task.modules[layer] if id(module) in negative)
            self.steps.append(Steps(self.task.modules[layer][0].weight, self.levels, signed, init))
            for module in self.task.modules[layer]:
                module.forward = _rounding(module, self.steps[-1])
        self.norms = nn.ModuleList()
        self._followed: list[int] = []  # position in `layers` of the layer that each of `norms` follows
        last: int | None = None
        for module in calls:
            if isinstance(module, _BatchNorm):
                self._switch(module, last, train_weights)
            else:
                last = own.get(id(module))

    def choose(self, choice: Sequence[int]) -> None:
        """From now on layer `layers[i]` computes at `levels[choice[i]]`."""
        for steps, level in zip(self.steps, choice, strict=True):
            steps.level = self.levels[level]
        for norms, followed in zip(self.norms, self._followed, strict=True):
            norms.level = choice[followed]

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def bound_steps(self, step_max: float | None) -> None:
        """Back into [SMALLEST, step_max], where an update may have left it."""
        for steps in self.steps:
            steps.weight.data.clamp_(SMALLEST, step_max)
            steps.act.data.clamp_(SMALLEST, step_max)

    def state(self) -> dict[str, Tensor]:
        """What training changes."""
        frozen = {n for n, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: value for name, value in self.state_dict().items() if name not in frozen}

    def indicators(self) -> dict[str, dict[str, dict[str, float]]]:
        """Steps of each layer, {name: {"w": {bits: step}, "a": {bits: step}}}; none where no input came by."""
        found = {}
        for layer, steps in zip(self.layers, self.steps, strict=True):
            if bool(steps.seen.all()):
                weight, act = steps.weight.tolist(), steps.act.tolist()
                found[self.task.layers[layer].name] = {
                    "w": {str(b): s for b, s in zip(steps.weight_bits, weight, strict=True)},
                    "a": {str(b): s for b, s in zip(steps.act_bits, act, strict=True)},
                }
        return found

    def _calls(self) -> tuple[list[nn.Module], dict[int, bool]]:
        """Layers and BatchNorms in order of their first calls, and by id whether the input has negative numbers."""
        calls: dict[int, nn.Module] = {}
        negative: dict[int, bool] = {}

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = input_of(args, kwargs)
            calls.setdefault(id(module), module)
            negative[id(module)] = negative.get(id(module), False) or bool((x < 0).any())

        kinds = (nn.Linear, nn.Conv2d, _BatchNorm)
        found = [module for module in self.model.modules() if isinstance(module, kinds)]
        with hooked(module.register_forward_pre_hook(hook, with_kwargs=True) for module in found), torch.no_grad():
            self.task.run(self.task.batches[0])
        return list(calls.values()), negative

    def _switch(self, module: _BatchNorm, layer: int | None, train_weights: bool) -> None:
        if layer not in self.layers:
            module.train(train_weights)
            return
        norms = _Norms(module, len(self.levels))
        self.norms.append(norms)
        self._followed.append(self.layers.index(layer))
        module.requires_grad_(False)
        module.forward = norms.forward  # the function: a module would be registered as a child


class _Norms(nn.Module):
    """One BatchNorm a level."""

    def __init__(self, norm: _BatchNorm, levels: int) -> None:
        super().__init__()
        self.level = 0
        self.each = nn.ModuleList(copy.deepcopy(norm) for _ in range(levels))
        self.each.requires_grad_(True).train()

    def forward(self, x: Tensor) -> Tensor:
        return self.each[self.level].forward(x)  # hooks belong to the module that this stands for


def _rounding(module: nn.Module, steps: Steps) -> Any:
    """The forward of a layer with its weight and its input rounded."""

    def linear(input: Tensor) -> Tensor:
        return F.linear(steps.round_input(input), steps.round_weight(module.weight), module.bias)

    def conv(input: Tensor) -> Tensor:
        return module._conv_forward(steps.round_input(input), steps.round_weight(module.weight), module.bias)

    return conv if isinstance(module, nn.Conv2d) else linear


def _widths(bits: Any) -> list[int]:
    return sorted({b for b in bits if b is not None}, reverse=True)


def _copied(model: nn.Module) -> nn.Module:
    """A copy that calls none of the modules of the original.

    Functions are not copied, so one put in a module's `forward` would go on calling the module it was made for. Where
    that is the module's own code, compiled, the copy runs it as it was written.
    """
    made = copy.deepcopy(model)
    for (name, module), twin in zip(model.named_modules(), made.modules(), strict=True):
        own = vars(module).get("forward")
        if not isinstance(own, FunctionType) or own.__closure__ is None or type(module).__name__ == "OptimizedModule":
            continue  # the last, of torch.compile, makes a forward anew for its copy
        written = getattr(own, "_torchdynamo_orig_callable", None)
        if getattr(written, "__self__", None) is not module or written.__func__ is not type(module).forward:
            raise ValueError(
                f"module {name!r} has a function as its forward, which a copy to train would share; wanted a method "
                "of its class, or limpq before it is replaced"
            )
        del vars(twin)["forward"]
    return made
