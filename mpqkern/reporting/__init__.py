"""One HTML file that shows what was measured, chosen, proven and packed. Needs no network and no script to be read."""

from .page import report

__all__ = ["report"]
