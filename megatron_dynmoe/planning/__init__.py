"""What a run will need, computed before it has a GPU: parameters, memory, FLOPs, hours.

Reading order: :mod:`.shape` (parameters), :mod:`.worst_case` (rows of an MoE layer and what they
need), :mod:`.memory` (a GPU, part by part), :mod:`.counts` (experts per token), :mod:`.plan` (all
together), :mod:`.startup` (the check when a training starts). Only :mod:`.settings`, which reads
Megatron's flags with Megatron's own parser, and the FLOPs in :mod:`.plan` import Megatron.
"""
