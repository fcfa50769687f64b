"""Options of a wrong type are named together with their value and what was wanted."""

import pytest
import torch

import mpqkern as mq
from mpqkern.activations.gauss import gauss_quantize
from mpqkern.measuring.observers import Ema, Percentile
from mpqkern.rounding import BRECQ, GPFQ, GPTQ, HQQ, AdaRound

from . import nets

MODEL, BATCH = nets.resnet(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("size", {"time_limit": "5"}),
        ("size", {"max_evals": True}),
        ("size", {"max_evals": "3"}),
        ("size", {"max_evals": 2.5}),
        ("size", {"memory": "1GB"}),
        ("size", {"seed": None}),
        ("clado", {"trim": "0.1", "pairs": "none", "bits": (8,)}),
        ("greedy", {"refresh": "2", "lazy": True}),
        ("ompq", {"beta": "1"}),
        ("csmpq", {"balance": True}),
        ("hawq", {"tol": "1"}),
        ("hawq", {"max_probes": 1.5}),
        ("limpq", {"steps": "10"}),
        ("limpq", {"lr": None}),
        ("limpq", {"momentum": "0.9"}),
        ("limpq", {"step_max": "1"}),
        ("limpq", {"alpha": "2"}),
    ],
    ids=str,
)
def test_of_score(method, options):
    (name, value), *_ = options.items()
    with pytest.raises(TypeError, match=rf"^{name}={value!r}; wanted "):
        mq.score(MODEL, BATCH, method=method, **options)


def test_of_plan_assign_and_compare():
    budget = mq.Budget(avg_bits=4)
    with pytest.raises(TypeError, match=r"^memory=None; wanted bytes"):
        mq.plan(MODEL, BATCH, memory=None)
    with pytest.raises(TypeError, match=r"^drop='1'; wanted 0 or more, or None"):
        mq.assign(MODEL, BATCH, method="greedy", drop="1")
    with pytest.raises(TypeError, match=r"^seed='1'; wanted a whole number"):
        mq.assign(MODEL, BATCH, budget, method="random", seed="1")
    for name, value in (("time_limit", "5"), ("rel_gap", None)):
        with pytest.raises(TypeError, match=rf"^{name}={value!r}; wanted"):
            mq.assign(MODEL, BATCH, budget, method="size", solver={name: value})
    with pytest.raises(TypeError, match=r"^seed='1'; wanted a whole number"):
        mq.compare(MODEL, BATCH, lambda model: 0.0, [budget], methods=["size"], seed="1")


@pytest.mark.parametrize(
    ("call", "options"),
    [
        *((HQQ, option) for option in ({"p": "1"}, {"beta": None}, {"growth": True}, {"steps": 2.0}, {"stop": True})),
        *((GPFQ, option) for option in ({"radius": "1"}, {"percentile": None}, {"strength": True})),
        *((BRECQ, option) for option in ({"iterations": "9"}, {"batch": 1.5}, {"patience": True}, {"lam": "1"})),
        *((gauss_quantize, option) for option in ({"bits": 4.5}, {"std_bits": "4"}, {"wide": 1})),
        *((mq.calibrate_activations_, option) for option in ({"forward": 3},)),
        *((GPTQ, {"damp": "0.1"}), (Ema, {"momentum": "0"}), (Percentile, {"percent": True})),
        *((mq.calibrate, option) for option in ({"seed": "1"}, {"memory": "1GB"}, {"time_limit": "5"})),
        *((mq.equalize_, option) for option in ({"iterations": 1.5}, {"iterations": True})),
        *((mq.smooth_, option) for option in ({"alpha": "half"}, {"alpha": True})),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_of_whatever_rounds_and_rewrites(call, options):
    ((name, value),) = options.items()
    given = {mq.calibrate: (MODEL, {"*": 4}, BATCH), mq.equalize_: (MODEL, BATCH), mq.smooth_: (MODEL, BATCH)}
    given |= {mq.calibrate_activations_: (MODEL, BATCH), gauss_quantize: (BATCH,)}
    with pytest.raises(TypeError, match=rf"^{name}={value!r}; wanted "):
        call(*given.get(call, ()), **({"bits": 4} if call is gauss_quantize else {}) | options)


def test_ways_of_rounding_and_observers_are_named_by_the_option_that_takes_them():
    with pytest.raises(ValueError, match=r"^start='x'; wanted 'minmax'"):
        AdaRound(start="x")
    packed = nets.resnet()
    mq.swap_(packed, {"*": mq.Scheme(8, act_bits=8)})
    with pytest.raises(TypeError, match=r"^observer= made 3; wanted something with update"):
        mq.calibrate_activations_(packed, BATCH, observer=lambda: 3)
    with pytest.raises(TypeError, match=r"^layers=3; wanted a list of patterns"):
        mq.calibrate_activations_(packed, BATCH, layers=3)


def test_a_bank_is_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for bank in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(ValueError, match=r"^bank='.*file.*' is, or lies in, a file; wanted a folder"):
            mq.score(MODEL, BATCH, method="roundoff", bank=bank)
