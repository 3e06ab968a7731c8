"""What a person would train with instead: Transformers' Mixtral, of the same shape as our model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.training import BALANCE_LOSS, Routing
from benchmarks.training import REFERENCE as PREFIX


@dataclass
class Reference:
    """One Mixtral in training, with PyTorch's AdamW and clipping; attributes as of ``Provider``."""

    batches: Iterator[list[dict[str, Any]]]
    routing: Routing
    args: Any
    model: Any
    optimizer: Any
    scheduler: Any

    def step(self) -> None:
        """One training step, on the next batch."""
        batch = next(self.batches)
        for micro_batch in batch:
            labels = micro_batch["labels"]
            outputs = self.model(
                input_ids=micro_batch["tokens"],
                labels=labels,
                shift_labels=labels,  # Megatron's labels are the next tokens already
                output_router_logits=True,  # adds the balance loss
                use_cache=False,
            )
            (outputs.loss / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def experts_per_token(self) -> float:
        return self.routing.experts


def build_reference(
    args: Any, batches: Iterable[list[dict[str, Any]]], name: str, routing: Routing
) -> Reference:
    """A Mixtral of the shape, optimizer and schedule that Megatron's arguments say.

    Raises:
        ValueError: it cannot be made so.
    """
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

    if routing.kind != "top_k" or args.world_size != 1:
        raise ValueError(f"{name} routes by top_k in one process: leave out {routing}")
    torch.manual_seed(args.seed)
    _, coefficient = BALANCE_LOSS
    config = MixtralConfig(
        vocab_size=args.padded_vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_attention_heads,
        max_position_embeddings=args.max_position_embeddings,
        rms_norm_eps=args.layernorm_epsilon,
        num_local_experts=args.num_experts,
        num_experts_per_tok=int(routing.experts),
        # Megatron adds a loss up for each layer, divided by k (docs/huggingface.md).
        router_aux_loss_coef=coefficient * args.num_layers / routing.experts,
        tie_word_embeddings=False,
        sliding_window=None,
        attn_implementation="sdpa",
        experts_implementation=name.removeprefix(PREFIX),
        dtype=args.params_dtype,
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    model = MixtralForCausalLM(config).to(device, args.params_dtype).train()
    # Megatron decays no norms and biases either.
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (args.adam_beta1, args.adam_beta2)
    # The default of Transformers' trainer, adamw_torch_fused.
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=args.adam_eps, fused=True)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, args.lr_warmup_iters, args.train_iters, min_lr=args.min_lr
    )
    return Reference(iter(batches), routing, args, model, optimizer, scheduler)
