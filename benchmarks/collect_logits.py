"""Writes a trained router's logits on real text, for the other benchmarks.

    dynmoe convert to-hf --load runs/quickstart/checkpoints --output MODEL
    python benchmarks/collect_logits.py --model MODEL --output logits.pt
    python benchmarks/select_experts.py --logits logits.pt

The file holds a tensor [T, E] in float16: the input of a layer's softmax, that is, the logits after
the routing normalization if the model has one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure
from megatron_dynmoe.settings.messages.command_line import CommandParser
from megatron_dynmoe.use.calibrate import read_tokens
from megatron_dynmoe.use.load import load_config, load_model, load_tokenizer

TEXT = sorted((measure.ROOT / "examples" / "data").glob("*.jsonl.gz"))


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="an exported model's folder")
    add("--output", type=Path, required=True)
    add("--data", type=Path, nargs="+", default=TEXT, help="texts (default: examples/data)")
    add("--tokens", type=int, default=16384, help="of all texts together, in equal parts")
    add("--layer", type=int, help="MoE layer, from 1 (default: the middle one)")
    args = parser.parse_args()
    try:
        logits_TE = collect(args.model, args.data, args.tokens, args.layer)
    except ValueError as error:
        parser.error(str(error))
    torch.save(logits_TE.half(), args.output)
    print(f"wrote {args.output}: {len(logits_TE)} tokens, {logits_TE.shape[1]} experts")


@torch.no_grad()
def collect(
    folder: Path, texts: list[Path], num_tokens: int, layer: int | None = None
) -> torch.Tensor:
    """[T, E], T the number of tokens rounded down to whole sequences of each text.

    Raises:
        ValueError: the model or a text cannot be read, or there is no such layer.
    """
    config = load_config(folder)
    model, tokenizer = load_model(folder, config, dtype="float32"), load_tokenizer(folder)
    collected = []
    for text in texts:
        tokens_NS = read_tokens(
            [str(text)],
            tokenizer,
            num_tokens=num_tokens // len(texts),
            sequence_length=min(config.max_position_embeddings, 2048),
        )
        for batch_BS in tokens_NS.split(8):
            layers = model(batch_BS, use_cache=False, output_router_logits=True).router_logits
            chosen = layer or (len(layers) + 1) // 2
            if not 1 <= chosen <= len(layers):
                raise ValueError(
                    f"--layer is {chosen}: the model has MoE layers 1 to {len(layers)}"
                )
            collected.append(layers[chosen - 1].flatten(0, 1).float())
    return torch.cat(collected)


if __name__ == "__main__":
    main()
