"""Which code for each weight: one file an idea, all of them from a float weight to `Codes`."""

from .calibrate import Rounded, calibrate
from .free import MSE, MinMax
from .gptq import GPTQ
from .method import Rounding, as_rounding

__all__ = ["GPTQ", "MSE", "MinMax", "Rounded", "Rounding", "as_rounding", "calibrate"]
