"""Every patch of Megatron that a training on a GPU needs, each with its reason.

``backends/cpu.py`` replaces more functions without a GPU, ``dry_run/`` in its own process, and
``checkpoints/load.py`` one while it loads.
"""
