"""Continues a text with an exported model, token by token, with the experts of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_dynmoe.use.token_display import TokenDisplay


def generate(
    model: Any,
    prompt_ids: list[int],
    display: TokenDisplay,
    *,
    count_experts: bool,
    max_new_tokens: int,
    **sampling: Any,
) -> None:
    """Continue the prompt; pass every token and, if wanted, its experts, to the display.

    The last token has no experts: the model has chosen it, and has not read it.

    Args:
        prompt_ids: at least one token.
        display: shows tokens as they come; with beams it shows them at the end.
        count_experts: whether to pass counts to the display; this needs one of our models.
        max_new_tokens: the most new tokens; an end-of-text token ends the text earlier.
        sampling: ``do_sample``, ``num_beams`` and further fields of transformers'
            ``GenerationConfig``.
    """
    import torch
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        def put(self, value: Tensor) -> None:
            display.add_tokens(value.flatten().tolist())

        def end(self) -> None:
            pass

    has_beams = sampling.get("num_beams", 1) > 1

    def take_counts(_module: Any, _inputs: Any, output: Any) -> None:
        display.add_counts(output.experts_per_token[:, 0])

    hook = None
    if count_experts and not has_beams:
        hook = model.register_forward_hook(take_counts)
    ids = torch.tensor([prompt_ids], device=model.device)
    try:
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(max_new_tokens=max_new_tokens, **sampling),
            streamer=None if has_beams else Streamer(),
        )
    finally:
        if hook is not None:
            hook.remove()
    if has_beams:
        display.add_tokens(generated[0].tolist())
        if count_experts:  # beams were reordered, so the model reads the text once more
            with torch.no_grad():
                display.add_counts(model(generated[:, :-1]).experts_per_token[:, 0])
    display.finish()
