"""What a run will need, computed before it has a GPU: parameters, memory, layout.

Sizes and a layout enter. Bytes and numbers of parameters leave; jobs/plan.py makes a plan of them.

Reading order: :mod:`.layout` (processes), :mod:`.shape` (parameters), :mod:`.worst_case` (rows of
an MoE layer and what they need), :mod:`.memory` (a GPU, part by part), :mod:`.experts_per_token`,
:mod:`.startup` (the check when a training starts). Nothing here imports Megatron.
"""
