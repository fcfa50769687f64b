"""Writes docs/cuda-kernels.md."""

from __future__ import annotations

import re
import subprocess
import sys

from .. import ptxsim
from .table import PAGE, page, rows

path = ptxsim.build()
if path is None:
    sys.exit("no nvcc on PATH")
said = subprocess.run(["ptxas", "--version"], capture_output=True, text=True, check=True).stdout
PAGE.write_text(page(rows(ptxsim.Library(path)), re.search(r"release ([\d.]+)", said)[1]))  # type: ignore[index]
print(PAGE)
