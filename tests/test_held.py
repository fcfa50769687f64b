"""Whatever happens inside `held`, the model is as it was."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from mpqkern.held import held

from . import nets


def everything(model):
    """All that a measurement might have left behind."""
    return (
        [m.training for m in model.modules()],
        [[list(getattr(m, n)) for n in ("_forward_hooks", "_forward_pre_hooks")] for m in model.modules()],
        [m.__dict__.get("forward") for m in model.modules()],
        [(id(p), p.data_ptr(), p.requires_grad, id(p.grad)) for p in model.parameters()],
        [(id(b), b.clone().tolist()) for b in model.buffers()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2:],
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
    )


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_everything_is_as_found(error):
    model = nets.resnet()
    model[2].train()
    model[3].conv1.weight.requires_grad_(False)
    model[6].bias.grad = torch.ones(5)
    model[0].register_forward_hook(lambda *_: None)
    own = model[4].forward
    model[4].forward = own
    before = everything(model)
    try:
        with held(model, grad=True):
            assert not model.training and torch.is_grad_enabled()
            assert not any(m.training for m in model.modules())
            assert not torch.backends.mha.get_fastpath_enabled()
            model.train()
            random.random(), np.random.rand()
            model(torch.randn(4, 3, 8, 8))  # moves the statistics of the norms
            model[0].weight.data = torch.zeros_like(model[0].weight)
            model[3].conv1.weight.requires_grad_(True)
            model[3].norm1._buffers["running_mean"] = torch.ones(12)
            model[6].bias.grad = None
            model[6].weight.grad = torch.ones_like(model[6].weight)
            model[6].register_forward_pre_hook(lambda *_: None)
            model[0]._forward_hooks.clear()
            model[4].forward = model[5].forward = lambda x: x
            model[6]._parameters["bias"] = nn.Parameter(torch.zeros(5))
            torch.set_grad_enabled(False)
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert everything(model) == before


def test_compiled_models_call_their_hooks():
    """Compiled code has no place for those that come later."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).relu()

    model, x, seen = Net().eval(), torch.ones(2, 3), []
    model.compile(backend="eager")
    with torch.no_grad():  # as in `held`, so that nothing else asks for compiling anew
        want = model(x)
    with held(model):
        model.layer.register_forward_pre_hook(lambda *_: seen.append(1))
        assert torch.equal(model(x), want)
    assert seen == [1]


def test_handles_of_hooks_still_work():
    model = nets.resnet()
    handle = model[0].register_forward_hook(lambda *_: None)
    with held(model):
        pass
    handle.remove()
    assert not model[0]._forward_hooks
