"""Which code for each weight: one file an idea, all of them from a float weight to `Codes`."""

from .calibrate import Rounded, calibrate
from .free import MSE, MinMax
from .gptq import GPTQ
from .method import Rounding, as_rounding
from .reconstruct import BRECQ, UWC, AdaRound

__all__ = ["BRECQ", "GPTQ", "MSE", "UWC", "AdaRound", "MinMax", "Rounded", "Rounding", "as_rounding", "calibrate"]
