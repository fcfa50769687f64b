"""Fixed scales for 8-bit activations: observers that watch them pass, and the calibration of a packed model."""

from .calibrate import ActivationReport, ActivationRow, calibrate_activations_
from .observers import OBSERVERS, Observer

__all__ = ["OBSERVERS", "ActivationReport", "ActivationRow", "Observer", "calibrate_activations_"]
