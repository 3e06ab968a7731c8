"""Whose code runs attention, norms and experts, and on what: a GPU, or the CPU in its place.

Megatron's arguments enter, a choice leaves; ``cpu.py`` answers for ``torch.cuda`` without CUDA.
"""
