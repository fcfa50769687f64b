"""Rewrites of a float model that keep what it computes and make it easier to quantize."""

from .batchnorm import fold_batchnorm_
from .equalize import equalize_
from .rewriting import Report
from .smooth import smooth_

__all__ = ["Report", "equalize_", "fold_batchnorm_", "smooth_"]
