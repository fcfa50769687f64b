"""Runs CUDA kernels without a GPU: nvcc's own host code and PTX, interpreted with NumPy.

csrc/cuda/*.cu is compiled unchanged and linked with fakecudart.c in the CUDA runtime's place, so launchers,
grids and argument passing are run too. Every memory access is checked: bounds, alignment, shared memory that
nobody wrote, races between barriers, copies' data used too early, registers and shared memory that a wgmma is still
at. Memory traffic is counted by source line.

Not covered: what ptxas makes of the PTX, time, memory order between blocks, and races on global memory.
"""

from .conv import Conv
from .library import Library, build
from .memory import Global, Traffic
from .packed import Packed
from .program import PtxError
from .task import TYPES, Task

__all__ = ["TYPES", "Conv", "Global", "Library", "Packed", "PtxError", "Task", "Traffic", "build"]
