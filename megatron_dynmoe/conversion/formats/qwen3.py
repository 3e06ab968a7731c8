"""Transformers' own Qwen3, for models without experts and with norms of queries and keys."""

from __future__ import annotations

from typing import Any

from megatron_dynmoe.conversion.formats import llama
from megatron_dynmoe.conversion.formats.common import HEAD_NORMS, dense_config, how_to_load
from megatron_dynmoe.conversion.formats.format import Format
from megatron_dynmoe.conversion.formats.qwen3_moe import QWEN3_WORDS, qwen3_config
from megatron_dynmoe.conversion.model_settings import Needed


def _write(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return llama.dense_words(config, dtype) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    # The size of a head is Qwen3's own default, whatever the hidden size is.
    return dense_config(qwen3_config({"head_dim": 128} | theirs))


FORMAT = Format(
    name="qwen3",
    summary="native Qwen3, for models without experts",
    rows=(*llama.FORMAT.rows, *HEAD_NORMS),
    recognizes=lambda theirs: theirs.get("model_type") == "qwen3",
    write=_write,
    read=_read,
    words=lambda: QWEN3_WORDS,
    needed=(*llama.DENSE_ONLY, Needed("qk_norm", True, "no norms of queries and keys")),
    counts=("sliding_window",),
    flags=("use_sliding_window",),
    how_to_load=how_to_load("Qwen3"),
    column={
        **llama.FORMAT.column,
        "what it is": "`Qwen3ForCausalLM`",
        "runs in": "Transformers and any engine that knows Qwen3",
        "biases of q, k, v; norms of q and k": "norms, always",
    },
)
