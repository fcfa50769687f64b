"""The command line: one file a verb or two, all of them with the names and options of the Python functions."""

from .main import main

__all__ = ["main"]
