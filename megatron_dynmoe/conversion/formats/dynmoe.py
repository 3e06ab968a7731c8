"""Our own format, which can express every model that is converted."""

from __future__ import annotations

import inspect
from collections.abc import Set
from typing import Any

from megatron_dynmoe.conversion.formats.common import (
    ATTENTION,
    DENSE_ROWS,
    HEAD_NORMS,
    MLP,
    USUAL_NORMS,
    USUAL_ROWS,
)
from megatron_dynmoe.conversion.formats.format import Format
from megatron_dynmoe.conversion.model_settings import check_config
from megatron_dynmoe.conversion.names import row

ROWS = (
    *USUAL_ROWS,
    *USUAL_NORMS,
    row(ATTENTION + "q_proj.bias", "q_bias"),
    row(ATTENTION + "k_proj.bias", "k_bias"),
    row(ATTENTION + "v_proj.bias", "v_bias"),
    *HEAD_NORMS,
    *DENSE_ROWS,
    row(MLP + "router.weight", "router"),
    row(MLP + "router.theta_offset", "theta_offset"),
    row(MLP + "experts.gate_up_proj", "expert_gate", "expert_up"),
    row(MLP + "experts.down_proj", "expert_down"),
    row(MLP + "shared_expert.gate_proj.weight", "shared_gate"),
    row(MLP + "shared_expert.up_proj.weight", "shared_up"),
    row(MLP + "shared_expert.down_proj.weight", "shared_down"),
    row(MLP + "shared_expert_gate.weight", "shared_expert_gate"),
)


def _write(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    from megatron_dynmoe.huggingface.shipping import AUTO_MAP

    return config | {
        "architectures": ["DynMoEForCausalLM"],
        "model_type": "dynmoe",
        "auto_map": dict(AUTO_MAP),
        "dtype": dtype,
    }


def _words() -> Set[str]:
    """The parameters of its configuration."""
    from megatron_dynmoe.huggingface.configuration_dynmoe import DynMoEModelConfig

    parameters = inspect.signature(DynMoEModelConfig).parameters.values()
    return {one.name for one in parameters if one.kind is not one.VAR_KEYWORD}


FORMAT = Format(
    name="dynmoe",
    summary="ours, expresses everything",
    rows=ROWS,
    recognizes=lambda theirs: theirs.get("model_type") == "dynmoe",
    write=_write,
    read=check_config,
    words=_words,
    keeps_other_words=True,
    ships_code=True,
    how_to_load="""\
```python
import megatron_dynmoe.huggingface  # without the package: trust_remote_code=True in both calls
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
tokens = tokenizer("It was", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))
print(model(**tokens).experts_per_token)  # [layers with experts, batch, tokens]
```
""",
    column={
        "what it is": "ours",
        "runs in": "Transformers 5, with this package or with `trust_remote_code=True`",
        "routing": "top-k and all [rules](rules.md)",
        "theta (DRN), threshold per layer, caps": "yes",
        "weights raw / renormalized": "both",
        "routing computed in": "`router_dtype`: float32",
        "grouped-query attention, head size": "yes",
        "rotary base / part of a head": "any / any",
        "biases of q, k, v; norms of q and k": "yes",
        "shared experts": "yes",
        "layers without experts": "any",
        "tied embeddings": "yes",
    },
)
