"""Mixed-precision quantization for PyTorch: packed 2/4/8-bit weights that compute as they are.

>>> import torch, mpqkern as mq
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
>>> ledger = mq.swap_(model, {"0": mq.Scheme(4), "2": mq.Scheme(8)})
>>> mq.verify(model, torch.randn(8, 64)).ok
True
"""

from . import gradients, ops  # noqa: F401  # first: they register torch.ops.mpqkern
from .activations import ActivationReport, calibrate_activations_
from .activations.gauss import gauss_quantize
from .assign import assign
from .audit import audit
from .capabilities import capabilities
from .catalog import catalog
from .checkpoint import load, save
from .compare import Comparison, compare
from .latency import Latency, measure_latency
from .ledger import Ledger
from .measuring.meter import Unfinished
from .nn import PackedConv2d, PackedLinear, PackedModule, fuse, swap_, unswap_
from .repeated import Repeated
from .reporting import report
from .rounding import Rounded, calibrate  # the package too, as mpqkern.rounding
from .scheme import Layer, Scheme
from .scores.entry import methods, plan, score
from .solve import Assignment, Budget, Infeasible, Scores, frontier, solve
from .transform import equalize_, fold_batchnorm_, smooth_
from .verify import Verification, verify
from .version import __version__

__all__ = [
    "ActivationReport",
    "Assignment",
    "Budget",
    "Comparison",
    "Infeasible",
    "Latency",
    "Layer",
    "Ledger",
    "PackedConv2d",
    "PackedLinear",
    "PackedModule",
    "Repeated",
    "Rounded",
    "Scheme",
    "Scores",
    "Unfinished",
    "Verification",
    "__version__",
    "assign",
    "audit",
    "calibrate",
    "calibrate_activations_",
    "capabilities",
    "catalog",
    "compare",
    "equalize_",
    "fold_batchnorm_",
    "frontier",
    "fuse",
    "gauss_quantize",
    "load",
    "measure_latency",
    "methods",
    "ops",
    "plan",
    "report",
    "rounding",
    "save",
    "score",
    "smooth_",
    "solve",
    "swap_",
    "unswap_",
    "verify",
]
