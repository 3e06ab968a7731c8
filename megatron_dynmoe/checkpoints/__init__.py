"""Guards Megatron's checkpoints with a manifest, which every load compares with the files.

Megatron's save and load enter through ``upstream``. A whole checkpoint leaves, the newest good one
if somebody asks for a fallback; or else the same error on all ranks, which names the file.
"""
