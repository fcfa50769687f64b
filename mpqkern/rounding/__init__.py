"""Which code for each weight: one file an idea, all of them from a float weight to `Codes`."""

from .calibrate import Rounded, calibrate
from .free import MSE, MinMax
from .gpfq import GPFQ
from .gptq import GPTQ
from .hqq import HQQ
from .method import Rounding, as_rounding
from .qronos import Qronos
from .reconstruct import BRECQ, UWC, AdaRound

__all__ = [
    "BRECQ",
    "GPFQ",
    "GPTQ",
    "HQQ",
    "MSE",
    "UWC",
    "AdaRound",
    "MinMax",
    "Qronos",
    "Rounded",
    "Rounding",
    "as_rounding",
    "calibrate",
]
