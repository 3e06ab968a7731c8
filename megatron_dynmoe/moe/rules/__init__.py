"""Rules of routing, one per file: how logits become weights and a routing map.

A router holds one rule. It gives the rule the logits and the rule's state, and passes the result on
to the losses, the counters and the experts. The controller moves the rule's knob. The settings that
a routing takes are a row of ``settings/routings.py``.
"""

from __future__ import annotations

from megatron_dynmoe.moe.rules.expert_threshold import ExpertThreshold
from megatron_dynmoe.moe.rules.null_experts import NullExperts
from megatron_dynmoe.moe.rules.relu import ReLU
from megatron_dynmoe.moe.rules.rule import Rule
from megatron_dynmoe.moe.rules.seq_top_k import SeqTopK
from megatron_dynmoe.moe.rules.top_p import TopP

# The rule of each --moe-dynamic-routing.
RULES: dict[str, type[Rule]] = {
    "top_p": TopP,
    "dtop_p": TopP,
    "expert_threshold": ExpertThreshold,
    "null_experts": NullExperts,
    "seq_top_k": SeqTopK,
    "relu": ReLU,
}
