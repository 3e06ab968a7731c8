"""The choice of the code that runs attention, norms and experts, and of the device: GPU or CPU.

Megatron's arguments enter, and a choice leaves. Without CUDA, ``cpu.py`` stands in for
``torch.cuda``.
"""
