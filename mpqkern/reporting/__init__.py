"""One HTML file that shows what was measured, chosen, proven and packed. Needs no network and no script to be read.

A section a file: what it says, and what it draws as `marks`, which `svg` puts into the page and `png` into pictures.
"""

from .page import report

__all__ = ["report"]
