"""What ptxas makes of the kernels, without a GPU and without a disassembler: registers, memory, and the machine
instructions themselves, of which only those that checks ask about are known, each learnt from probes.

python -m tests.sass writes docs/cuda-kernels.md.
"""

from .assemble import ARCHS, Assembled, assemble, modules
from .cubin import Kernel
from .faults import DEMANDS, faults
from .opcodes import PROBES, learn

__all__ = ["ARCHS", "DEMANDS", "PROBES", "Assembled", "Kernel", "assemble", "faults", "learn", "modules"]
