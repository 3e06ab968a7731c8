"""Compares the exported model's speed with Mixtral's in Transformers, at equal size and experts.

    python benchmarks/exported.py [--threads 1] [--shape small]

Mixtral runs with Transformers' ``grouped_mm``, ours with each implementation of experts. Threshold
and routing are real: the threshold is the one for which a token uses k experts on average on this
input. All take turns in one process, in float32, and processor time is measured. Workloads:
``forward`` (one row), ``decode`` (greedy, with a cache, the prompt not counted) and ``generate``
(what ``dynmoe generate`` calls, with the experts of each token, against Mixtral's ``generate``).
Rows are appended to benchmarks/results/exported.csv.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks import measure
from benchmarks.places import take_turns
from megatron_dynmoe.huggingface import DynMoEForCausalLM, DynMoEModelConfig
from megatron_dynmoe.settings.messages.command_line import CommandParser
from megatron_dynmoe.use.generate import generate

RESULTS = measure.RESULTS / "exported.csv"
BASELINE = "Mixtral, grouped_mm"
# hidden, ffn of an expert, experts, k, layers, heads: the quickstart's, and a part of Dynamic MoE's
SHAPES = {"small": (128, 256, 16, 2, 6, 4), "medium": (512, 1408, 16, 2, 4, 8)}
VOCABULARY = 4096
WORKLOADS = ("forward", "decode", "generate")


class NoDisplay:
    """A display of tokens that shows nothing and keeps what ``generate`` reads of one."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def add_tokens(self, tokens: list[int]) -> None:
        self.tokens += tokens

    def add_counts(self, counts: torch.Tensor) -> None:
        pass

    def finish(self) -> None:
        pass


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--tokens", type=int, default=512, help="of a forward")
    parser.add_argument("--new-tokens", type=int, default=32, help="of decode and generate")
    parser.add_argument("--batch", type=int, default=1, help="rows of decode")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--implementations", nargs="+", default=["eager", "grouped_mm"])
    parser.add_argument("--output", type=Path, default=RESULTS, help="the file of the rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = measure.Rows(args.output, "torch", "transformers")
    mixtral, ours = build(args.shape)
    mean = calibrate(ours, ids(1, args.tokens), mixtral.config.num_experts_per_tok)
    for workload in args.workloads:
        work = partial(WORK[workload], args=args)
        providers = {BASELINE: partial(work, mixtral, "grouped_mm")}
        for name in args.implementations:
            providers[f"ours, {name}"] = partial(work, ours, name)
        taken = take_turns(providers, args.rounds)
        for name, seconds in taken.items():
            speed = measure.ratio(taken[BASELINE], seconds)
            spread = measure.spread([1000 * value for value in seconds])
            print(f"{args.shape} {workload}: {name}: {spread.median:.2f} ms, speed {speed}")
            rows.put(
                {
                    "workload": f"{args.shape} {workload}",
                    "tokens": args.tokens if workload == "forward" else args.new_tokens,
                    "batch": args.batch if workload == "decode" else 1,
                    "threads": args.threads,
                    "provider": name,
                    "experts_per_token": f"{mean if name != BASELINE else 2:.3f}",
                    "rounds": len(seconds),
                    "median_ms": f"{spread.median:.3f}",
                    "p20_ms": f"{spread.p20:.3f}",
                    "p80_ms": f"{spread.p80:.3f}",
                    "speed": str(speed),
                    "load_1min": measure.load(),
                }
            )


def build(shape: str) -> tuple[MixtralForCausalLM, DynMoEForCausalLM]:
    """Both models with the same weights, of which those of the gates make logits of variance 1."""
    hidden, ffn, experts, k, layers, heads = SHAPES[shape]
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            **common, intermediate_size=ffn, num_local_experts=experts, num_experts_per_tok=k
        )
    ).eval()
    ours = DynMoEForCausalLM(
        DynMoEModelConfig(
            **common,
            num_experts=experts,
            moe_intermediate_size=ffn,
            routing="top_p",
            weights="renormalized",
        )
    ).eval()
    weights = {}
    for name, value in mixtral.state_dict().items():
        weights[name.replace("mlp.gate.weight", "mlp.router.weight")] = value
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(value, std=hidden**-0.5)
    ours.load_state_dict(weights)
    return mixtral, ours


def ids(batch: int, length: int) -> torch.Tensor:
    """Tokens, [batch, length]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


@torch.no_grad()
def calibrate(model: DynMoEForCausalLM, input_ids: torch.Tensor, target: float) -> float:
    """Set the threshold for which a token uses ``target`` experts on average; return the mean."""
    low, high = 0.0, 1.0
    for _ in range(14):
        model.config.threshold = (low + high) / 2
        mean = model(input_ids).experts_per_token.double().mean().item()
        middle = model.config.threshold
        low, high = (middle, high) if mean < target else (low, middle)
    return mean


def seconds(run: Callable[[], Any]) -> float:
    """Processor seconds of a call."""
    started = time.process_time()
    run()
    return time.process_time() - started


@torch.no_grad()
def forward(model: Any, implementation: str, args: Any) -> float:
    """Processor seconds of one forward, without a cache."""
    model.set_experts_implementation(implementation)
    return seconds(partial(model, ids(1, args.tokens), use_cache=False))


@torch.no_grad()
def decode(model: Any, implementation: str, args: Any) -> float:
    """Processor seconds of greedy steps after a prompt of 32 tokens."""
    model.set_experts_implementation(implementation)
    output = model(ids(args.batch, 32), use_cache=True)

    def steps() -> None:
        cache, last = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
        for _ in range(args.new_tokens):
            step = model(last, past_key_values=cache, use_cache=True)
            last = step.logits[:, -1:].argmax(dim=-1)

    return seconds(steps)


def continue_text(model: Any, implementation: str, args: Any) -> float:
    """Processor seconds of a whole ``generate``: of ours the one that ``dynmoe generate`` calls."""
    model.set_experts_implementation(implementation)
    prompt, how = ids(1, 32), {"do_sample": False, "max_new_tokens": args.new_tokens}
    if isinstance(model, DynMoEForCausalLM):
        display: Any = NoDisplay()
        tokens = prompt[0].tolist()
        return seconds(partial(generate, model, tokens, display, count_experts=True, **how))
    mask = torch.ones_like(prompt)
    return seconds(partial(model.generate, prompt, attention_mask=mask, **how))


WORK: dict[str, Callable[..., float]] = {
    "forward": forward,
    "decode": decode,
    "generate": continue_text,
}

if __name__ == "__main__":
    main()
