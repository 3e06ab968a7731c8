"""Continues a text with an exported model, and shows how many experts each token used.

    dynmoe generate --model DIR --prompt "Once upon a time"

It needs neither Megatron nor a GPU, and runs no code from the model's folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_dynmoe.settings.messages.command_line import (
    CommandParser,
    UsageError,
    add_budget_flag,
    add_runtime_flags,
    ending_plainly,
    has_colors,
    number,
)

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("none", "color", "digits")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; exit with 0, 1 (error), 2 (usage) or 130 (interrupted)."""
    parser = _parser()
    args = parser.parse_args(argv)
    with ending_plainly(parser.prog, "the text ends here"):
        _run(args)
        sys.stdout.flush()
    sys.exit(0)


def _run(args: argparse.Namespace) -> None:
    prompt = _read_prompt(args)
    import torch

    from megatron_dynmoe.use.budgets import keep_to_config
    from megatron_dynmoe.use.generate import generate
    from megatron_dynmoe.use.load import (
        be_quiet,
        check_ids,
        default_device,
        ids_to_suppress,
        load_config,
        load_model,
        load_tokenizer,
    )
    from megatron_dynmoe.use.token_display import TokenDisplay, printable

    # 1. Check everything that can be wrong with the input before the weights are read.
    be_quiet()
    config = load_config(args.model)
    _override_routing(config, args)
    tokenizer = load_tokenizer(args.model)
    prompt_ids = _encode(tokenizer, prompt)
    check_ids(max(prompt_ids), config)
    max_new_tokens = _fit(config, len(prompt_ids), args.max_new_tokens)
    mode = _mode(args.experts)
    if mode != "none" and (reason := _fixed_experts(config)):
        _note(f"{reason}, so there is nothing to show")
        mode = "none"

    # 2. Load.
    model = load_model(args.model, config, dtype=args.dtype, device=args.device or default_device())
    if args.threshold is None:
        keep_to_config(model)
    else:
        model.generation_config.experts_per_token = None
    config = model.config

    # 3. Generate.
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    paint, legend = _painter(mode, config)
    if mode == "none" and sys.stdout.isatty():
        display = TokenDisplay(tokenizer, lambda piece: write(printable(piece)))
    else:
        display = TokenDisplay(tokenizer, write, paint)
    write(legend)
    torch.manual_seed(args.seed)
    try:
        generate(
            model,
            prompt_ids,
            display,
            count_experts=mode != "none",
            max_new_tokens=max_new_tokens,
            num_beams=args.num_beams,
            suppress_tokens=ids_to_suppress(model, tokenizer),
            **_sampling(args),
        )
    finally:  # this also runs after an interrupt
        write("\n")
        if mode != "none":
            write("\n" + _summary(display.counts_LT, len(prompt_ids), config))


def _override_routing(config: Any, args: argparse.Namespace) -> None:
    from megatron_dynmoe.use.budgets import set_budget

    for flag, field, value in (
        ("--budget", None, args.budget),
        ("--threshold", "inference_threshold", args.threshold),
        ("--max-experts-per-token", "inference_max_experts_per_token", args.max_experts_per_token),
    ):
        if value is None:
            continue
        if reason := _fixed_experts(config):
            remedy = "leave it out"
            if getattr(config, "num_experts_per_tok", None) is not None:
                remedy += ", or give the model a threshold with dynmoe calibrate"
            raise UsageError(f"{flag} is {value}, but {reason}: {remedy}")
        if field == "inference_max_experts_per_token" and value > config.num_experts:
            raise UsageError(f"{flag} is {value}: the model has {config.num_experts} experts")
        if field is not None:
            setattr(config, field, value)
    if args.threshold is not None:
        config.inference_experts_per_token = None
    if args.budget is not None:
        set_budget(config, args.budget)
    else:
        name = "inference_experts_per_token"
        set_budget(config, getattr(config, name, None), f"config.json's {name}")


def _fixed_experts(config: Any) -> str | None:
    """Why a model's tokens do not choose how many experts they use; None if they do."""
    is_ours = config.model_type == "dynmoe" and "sparse" in config.mlp_layer_types
    if is_ours and config.routing != "top_k":
        return None
    per_token = getattr(config, "num_experts_per_tok", None)
    if per_token is None:
        return f"this model ({config.model_type}) has no experts to choose from"
    return f"every token of this model ({config.model_type}) uses {per_token} experts"


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    from megatron_dynmoe.huggingface.encoding import encode_prompt

    ids = encode_prompt(tokenizer, prompt)
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise ValueError(
            "the prompt is empty, and the tokenizer has no token for the beginning of a text: "
            "give at least one character"
        )
    return ids


def _fit(config: Any, prompt_length: int, max_new_tokens: int) -> int:
    """How many new tokens fit into the positions that the model was trained for."""
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if prompt_length >= positions:
        raise ValueError(
            f"the prompt has {prompt_length} tokens, and the model {positions} positions: "
            "shorten the prompt"
        )
    if prompt_length + max_new_tokens > positions:
        max_new_tokens = positions - prompt_length
        _note(f"at most {max_new_tokens} new tokens fit in the model's {positions} positions")
    return max_new_tokens


def _mode(asked_for: str | None) -> str:
    if asked_for is not None:
        return asked_for
    return "color" if has_colors(sys.stdout) else "digits"


def _painter(mode: str, config: Any) -> tuple[Callable[[str, float], str] | None, str]:
    """The function that paints a piece, and the legend."""
    from megatron_dynmoe.use.token_display import ColorScale, paint_digits, printable

    if mode == "none":
        return None, ""
    cap = config.inference_max_experts_per_token or config.max_experts_per_token
    most = cap or config.num_experts
    meaning = f"mean experts of a token over the MoE layers, 1 to {most}"
    if mode == "digits":
        if not sys.stdout.isatty():
            return paint_digits, f"[n]: {meaning}\n\n"
        return (lambda piece, mean: paint_digits(printable(piece), mean)), f"[n]: {meaning}\n\n"
    scale = ColorScale(most)
    return (
        lambda piece, mean: scale.paint(printable(piece), mean),
        f"{scale.legend()}  {meaning}\n\n",
    )


def _summary(counts_LT: Tensor, prompt_length: int, config: Any) -> str:
    """Mean experts per token of prompt and generated tokens, over all layers and by layer.

    They are of the tokens that the model has read, so of all but the last one.
    """
    if not counts_LT.numel():
        return ""
    parts = {
        "prompt": counts_LT[:, :prompt_length].double(),
        "generated": counts_LT[:, prompt_length:].double(),
    }
    parts = {name: part for name, part in parts.items() if part.numel()}
    lines = ["experts per token" + "".join(f"{name:>12}" for name in parts)]
    layers = [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    for row, layer in enumerate(layers):
        means = "".join(f"{part[row].mean().item():12.2f}" for part in parts.values())
        lines.append(f"{f'layer {layer + 1}':<17}{means}")
    means = "".join(f"{part.mean().item():12.2f}" for part in parts.values())
    lines.append(f"{'all':<17}{means}")
    if (budget := config.inference_experts_per_token) is not None:
        lines.append(f"{'asked for':<17}" + f"{budget:12.2f}" * len(parts))
    lines.append(f"{'tokens read':<17}" + "".join(f"{part.shape[1]:12}" for part in parts.values()))
    return "\n".join(lines) + "\n"


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Greedy unless a flag asks for sampling; a temperature of 0 is greedy, too."""
    given = (args.temperature, args.top_p, args.top_k)
    if args.temperature == 0 or given == (None, None, None):
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": 1.0 if args.temperature is None else args.temperature,
        "top_p": 1.0 if args.top_p is None else args.top_p,
        "top_k": args.top_k or 0,  # 0 turns it off; transformers' own default is 50
    }


def _read_prompt(args: argparse.Namespace) -> str:
    """The prompt; from a file or a pipe, without the final line break."""
    if args.prompt is not None and args.prompt != "-":
        return args.prompt
    try:
        if args.prompt_file is not None:
            data = args.prompt_file.read_bytes()
        else:
            data = sys.stdin.buffer.read()
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        source = args.prompt_file or "standard input"
        raise ValueError(f"{source}: not valid UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise UsageError(f"--prompt-file is {args.prompt_file}: {error.strerror}") from error


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m megatron_dynmoe.generate",
        description="Continue a text, and show how many experts each token used.",
        example="dynmoe generate --model my-model --prompt 'It is a truth universally'",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="exported folder")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue; - reads stdin")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with the prompt")
    parser.add_argument(
        "--max-new-tokens", type=number(int, 1), default=128, metavar="N", help="default: 128"
    )
    parser.add_argument(
        "--experts",
        choices=MODES,
        help="how to show the experts of each token (default: color on a terminal, unless NO_COLOR "
        "is set, digits elsewhere)",
    )

    group = parser.add_argument_group("choice of tokens (greedy, unless one of the first three)")
    group.add_argument("--temperature", type=number(float, 0), metavar="T", help="0 is greedy")
    group.add_argument(
        "--top-p",
        type=number(float, 0, 1),
        metavar="P",
        help="sample from the most probable tokens up to this sum (not the experts' threshold)",
    )
    group.add_argument(
        "--top-k", type=number(int, 0), metavar="K", help="sample from the K most probable tokens"
    )
    group.add_argument("--seed", type=number(int, 0), default=0, help="for sampling (default: 0)")
    group.add_argument(
        "--num-beams",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="number of beams; with more than one, the text appears at the end",
    )

    group = parser.add_argument_group("routing, instead of the model's own")
    one = group.add_mutually_exclusive_group()
    add_budget_flag(one)
    one.add_argument(
        "--threshold",
        type=number(float, 0, 1),
        metavar="T",
        help="cumulative probability that a token's experts must exceed",
    )
    group.add_argument(
        "--max-experts-per-token", type=number(int, 1), metavar="K", help="no token uses more"
    )

    group = parser.add_argument_group("runtime")
    add_runtime_flags(group)
    return parser
