"""The model whose back end is looked at."""

from typing import Any

from tests.moe import one_rank


def config(**settings: Any) -> Any:
    """A TransformerConfig of a small model; ``settings`` override."""
    defaults = {"normalization": "RMSNorm", "num_attention_heads": 4, "hidden_size": 32}
    return one_rank.transformer_config(**(defaults | settings))
