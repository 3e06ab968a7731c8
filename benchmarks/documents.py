"""Compares the time of attention over documents that are kept apart with causal attention.

    python benchmarks/documents.py [--documents 64 256 1024] [--threads 1]

The attention of torch_native, forward and backward, over rows of tokens of which each holds
documents of random (geometric) lengths with a given mean. The providers take turns:

    causal         whole rows, one document each
    by document    documents kept apart by their lengths
    by mask        documents kept apart by upstream's mask, in the same attention
    local, by mask the same in upstream's local attention
    lengths        finding the lengths, once per micro-batch
    mask           making the masks as upstream's data loader does, once per micro-batch

A round's ratio is against causal in that round. Rows are appended to OUTPUT/documents.csv.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from benchmarks.layer_providers import start_megatron
from megatron_dynmoe.settings.messages.command_line import CommandParser

CAUSAL = "causal"
EOD, TOKEN = 0, 1


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--documents", nargs="+", type=int, default=[64, 256, 1024], help="mean tokens of one")
    add("--sequence", type=int, default=2048, help="tokens of a row (default: %(default)s)")
    add("--rows", type=int, default=2, help="of a micro-batch (default: %(default)s)")
    add("--heads", type=int, default=8)
    add("--groups", type=int, default=8, help="of keys and values")
    add("--rounds", type=int, default=15)
    add("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    add("--output", type=Path, default=measure.RESULTS, help="folder (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start_megatron()
    rows = measure.Rows(args.output / "documents.csv", "torch", "megatron-core")
    for mean in args.documents:
        compare(mean, args, rows)


def compare(mean: int, args, rows: measure.Rows) -> None:
    """Measure and write down all providers with documents of a mean length."""
    generator = torch.Generator().manual_seed(0)
    is_eod = torch.rand(args.rows, args.sequence, generator=generator) < 1 / mean
    tokens = torch.where(is_eod, EOD, TOKEN)
    found = providers(tokens, args)
    for function in found.values():
        function()  # warms up
    names, taken = list(found), {name: [] for name in found}
    for number in range(args.rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        for name, seconds in zip(
            order, measure.timed(*(found[name] for name in order)), strict=True
        ):
            taken[name].append(seconds)
    workload = (
        f"{args.rows} rows of {args.sequence} tokens, {args.heads} heads of 64, {args.groups} "
        f"groups, documents of {mean} tokens, "
    )
    is_gpu = measure.on_gpu()
    workload += "bfloat16" if is_gpu else f"float32, {torch.get_num_threads()} threads"
    for name, seconds in taken.items():
        written = rows.put(
            {
                "workload": workload,
                "provider": name,
                "rounds": len(seconds),
                "median_ms": f"{1e3 * measure.spread(seconds).median:.4g}",
                "ratio_to_causal": str(measure.ratio(seconds, taken[CAUSAL])),
                "load_1min": measure.load(),
            }
        )
        print(
            f"{workload}: {name}: {written['median_ms']} ms, {written['ratio_to_causal']} of causal"
        )


def providers(tokens: torch.Tensor, args) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dynmoe.backends.attention.documents import document_lengths
    from megatron_dynmoe.backends.torch_native import ScaledDotProductAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=64 * args.heads,
        num_attention_heads=args.heads,
        num_query_groups=args.groups,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
    )
    ours, local = (
        cls(
            config=config,
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
        )
        for cls in (ScaledDotProductAttention, DotProductAttention)
    )

    def masks() -> tuple[torch.Tensor, torch.Tensor]:
        rows = [
            _get_ltor_masks_and_position_ids(row, EOD, True, True, True, True) for row in tokens
        ]
        mask, _, positions = (torch.stack(part) for part in zip(*rows, strict=True))
        return mask, positions

    place = {"device": "cuda", "dtype": torch.bfloat16} if measure.on_gpu() else {}
    mask, positions = (made.to(place.get("device")) for made in masks())
    shape = (tokens.shape[1], tokens.shape[0])
    query = torch.randn(*shape, args.heads, 64, requires_grad=True, **place)
    key, value = torch.randn(2, *shape, args.groups, 64, **place).requires_grad_().unbind()
    direction = torch.randn(*shape, 64 * args.heads, **place)

    def both_ways(attention: torch.nn.Module, what: torch.Tensor | None) -> None:
        output = attention(query, key, value, what)
        torch.autograd.grad(output, (query, key, value), direction)

    return {
        CAUSAL: partial(both_ways, ours, None),
        "by document": partial(both_ways, ours, document_lengths(positions)),
        "by mask": partial(both_ways, ours, mask),
        "local, by mask": partial(both_ways, local, mask),
        "lengths": partial(document_lengths, positions),
        "mask": masks,
    }


if __name__ == "__main__":
    main()
