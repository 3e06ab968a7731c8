"""The command ``dynmoe``, also ``python -m megatron_dynmoe``.

Nothing is imported before a command is known, so that ``dynmoe --help`` answers at once. Exit codes
are the same everywhere: 0, 1 for what failed, 2 for misuse, 128 + signal.
"""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_dynmoe import __version__

# Where the main() of each command is, and what it does.
COMMANDS = {
    "tokenizer": ("cli.tokenizer", "train a SentencePiece tokenizer on text"),
    "preprocess": ("cli.preprocess", "encode text to Megatron's token files"),
    "recipe": ("cli.recipe", "list recipes, or print or write one and the launch scripts"),
    "plan": ("cli.plan", "parameters, memory, steps and hours of a run, before it has a GPU"),
    "doctor": (
        "doctor.__main__",
        "look at machine, software and data, or into a checkpoint",
    ),
    "train": ("pretrain", "train; under torchrun: torchrun ... -m megatron_dynmoe train"),
    "report": ("cli.report", "write summary.json and curves.png of a run"),
    "plot": ("cli.plot", "draw several runs in one picture"),
    "convert": ("cli.convert", "bring checkpoints to Hugging Face and back"),
    "generate": ("cli.generate", "continue a text, and show the experts of each token"),
    "calibrate": ("cli.calibrate", "find the threshold for a mean number of experts"),
    "evaluate": ("cli.evaluate", "run lm-evaluation-harness, with the experts per token"),
    "analyze": ("cli.analyze", "see where a model's experts go, on one page"),
    "attempt": ("cli.attempt", "begin or end a job's attempt at a run (for launch scripts)"),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command; exits with its exit code."""
    name, *words = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        sys.exit(0)
    if name == "--version":
        print(f"megatron-dynmoe {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
        print(f"dynmoe: error: there is no command {name}: {hint}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"dynmoe {name}", *words]
    if name == "train":  # until its own handlers stand, Ctrl-C ends it without a stack
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        sys.exit(importlib.import_module(f"megatron_dynmoe.{COMMANDS[name][0]}").main())
    except KeyboardInterrupt:
        print(f"dynmoe {name}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dynmoe COMMAND [...]",
            "",
            "Mixture-of-experts models whose tokens choose how many experts they use.",
            "",
            *lines,
            "",
            "dynmoe COMMAND --help shows its flags and an example; docs/train.md leads through.",
        ]
    )


if __name__ == "__main__":
    main()
