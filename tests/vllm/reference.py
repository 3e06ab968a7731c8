"""What a served model has to say: forwards in Transformers, one prompt at a time, no cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load(folder: Path, **settings: Any) -> Any:
    """An exported folder's model with this checkout's code, in float32."""
    from transformers import AutoModelForCausalLM

    import megatron_dynmoe.huggingface  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


@torch.no_grad()
def continue_greedily(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """The most probable token, ``num_tokens`` times."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def log_probs(model: Any, tokens: list[int]) -> Tensor:
    """Of each token as the next after each position but the last, [S - 1, vocabulary] float64."""
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    return logits.double().log_softmax(dim=-1)


def of_tokens(model: Any, tokens: list[int]) -> list[float]:
    """Of each token but the first after those before it."""
    chosen = torch.tensor(tokens[1:]).unsqueeze(-1)
    return log_probs(model, tokens).gather(-1, chosen).squeeze(-1).tolist()


def in_nucleus(model: Any, prompt: list[int], new: list[int], heat: float, top_p: float) -> bool:
    """Whether top-p sampling at a temperature can have drawn the new tokens.

    It can draw a token if those more probable do not sum to ``top_p`` yet, to rounding.
    """
    hot = (log_probs(model, prompt + new)[len(prompt) - 1 :] / heat).softmax(dim=-1)
    of_new = hot.gather(-1, torch.tensor(new).unsqueeze(-1))
    more_probable = (hot * (hot > of_new)).sum(dim=-1)
    return bool((more_probable < top_p + 1e-5).all())
