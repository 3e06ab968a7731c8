"""Megatron's checkpoints, guarded: a manifest for each, comparison on load, the newest good one.

Megatron's save and load enter through ``upstream``; a whole checkpoint, or an error that names the
file, leaves on all ranks alike.
"""
