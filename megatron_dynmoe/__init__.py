"""Mixture-of-experts models whose tokens choose how many experts they use, on Megatron-Core.

Importing this package changes nothing and loads neither torch nor Megatron: upstream is touched
only when an entry point (``megatron_dynmoe.pretrain``, ``megatron_dynmoe.run``) or the layer
spec (``megatron_dynmoe.specs``) is used.
"""

__version__ = "0.1.0"
