"""A double of DeepEP: the calls that Megatron-Core 0.19.2 makes, over gloo on a CPU.

It stands for the intranode kernels of DeepEP's main branch (``Buffer``) and of its branch hybrid-ep
(``HybridEPBuffer``), with their signatures, limits and results. Each function names the file whose
behavior it stands for. What the originals leave uninitialized is NaN here.
"""

from .buffer import Buffer
from .hybrid import HybridEPBuffer

__all__ = ["Buffer", "HybridEPBuffer"]
