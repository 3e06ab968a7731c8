"""Every change to Megatron's own functions: one table in ``patches.py``, each row with its reason.

``run.py`` applies it before anything uses Megatron. Rows name functions of Megatron and what takes
their place; each says which change of upstream ends it. Other rooms replace nothing of Megatron's.
(``backends/cpu.py`` and ``dry_run/`` replace functions of PyTorch, to stand in for ``torch.cuda``.)
"""
