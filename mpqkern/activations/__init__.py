"""Fixed scales for 8-bit activations: the calibration of a packed model by what observers see pass."""

from ..measuring.observers import OBSERVERS, Observer
from .calibrate import ActivationReport, ActivationRow, calibrate_activations_

__all__ = ["OBSERVERS", "ActivationReport", "ActivationRow", "Observer", "calibrate_activations_"]
