"""How long each layer takes with each scheme, on this machine: measured inside the model, kept on disk."""

from .measure import measure_latency
from .table import Latency

__all__ = ["Latency", "measure_latency"]
