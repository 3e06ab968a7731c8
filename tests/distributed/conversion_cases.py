"""What the worker calls for test_conversion: a conversion, real text, and a look at the logits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

BOOK = Path(__file__).parents[2] / "examples" / "data" / "book.jsonl.gz"


def convert() -> None:
    """Entry: dynmoe convert with the case's command line."""
    from megatron_dynmoe.cli.convert import main

    raise SystemExit(main())


def prepare_text() -> None:
    """Entry: a tokenizer of 504 pieces and the tokens of a real book, under one prefix."""
    from megatron_dynmoe.cli.preprocess import main
    from megatron_dynmoe.data.train_tokenizer import train_tokenizer

    prefix = sys.argv[1]
    model = train_tokenizer([str(BOOK)], prefix, 504)
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    sys.argv[1:] = ["--input", str(BOOK), "--append-eod", *tokenizer, "--output-prefix", prefix]
    main()


@contextlib.contextmanager
def computed(recorder: Any) -> Iterator[None]:
    """Hook: write down what the model computes for the first batch of an evaluation.

    The file beside ``--load`` holds ``tokens`` [B, S], ``logits`` [B, S, V] and, of each layer
    with experts in order, ``maps`` [S, B, E], and ``probs`` if the routing compares them.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.training import get_args

    from megatron_dynmoe import kernels
    from megatron_dynmoe.moe.router import DynamicRouter
    from megatron_dynmoe.routing.normalize import normalize

    seen: dict[str, list[torch.Tensor]] = {"probs": [], "maps": []}
    forward, choose_route = GPTModel.forward, kernels.choose_route
    own = {router: router.routing for router in (TopKRouter, DynamicRouter)}

    def dump(self, input_ids, position_ids, attention_mask, *args, **kwargs):
        if not self.training and "logits" not in seen:
            seen["logits"] = []
            logits = forward(self, input_ids, position_ids, attention_mask)
            shape = (input_ids.shape[1], input_ids.shape[0], -1)
            by_layer = {name: [x.view(shape) for x in seen[name]] for name in ("probs", "maps")}
            path = f"{get_args().load}.computed.pt"
            torch.save({"tokens": input_ids, "logits": logits, **by_layer}, path)
        return forward(self, input_ids, position_ids, attention_mask, *args, **kwargs)

    def keep(logits, threshold, *, theta=None, **settings):
        routed = choose_route(logits)(logits, threshold, theta=theta, **settings)
        logits = logits.float() if theta is None else normalize(logits.float(), theta)
        seen["probs"].append(logits.softmax(dim=-1))
        return routed

    def keeping(routing):
        def keep_map(self, logits, *args, **kwargs):
            weights, chosen = routing(self, logits, *args, **kwargs)
            seen["maps"].append(chosen)
            return weights, chosen

        return keep_map

    GPTModel.forward, kernels.choose_route = dump, lambda logits: keep
    for router, routing in own.items():
        router.routing = keeping(routing)
    try:
        yield
    finally:
        GPTModel.forward, kernels.choose_route = forward, choose_route
        for router, routing in own.items():
            router.routing = routing


def save_dense() -> None:
    """Entry: a random Llama in a folder, with weights so large that all of them matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=504,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(sys.argv[1])
