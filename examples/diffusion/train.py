"""Trains a Diffusion Transformer with dynamic routing on labeled images, and draws samples.

    python -m examples.diffusion.train --images digits --run-dir runs/digits MEGATRON_FLAGS \
        --moe-dynamic-routing dtop_p --moe-dynamic-target-experts-per-token 2

It takes the flags of ``megatron_dynmoe.pretrain`` but those of tokens, and a few of its own. Each
evaluation draws samples and counts experts, and so does ``--skip-train --load`` of a checkpoint.
"""

from __future__ import annotations

import dataclasses
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from megatron_dynmoe.run import prepare
from megatron_dynmoe.settings.messages.exits import exiting_on_misuse


def add_flags(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of images; those of tokens get values that mean nothing here."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "--images",
        required=True,
        help="digits (of scikit-learn), a folder of Fashion-MNIST's files, an .npz file with "
        "images and labels, or a folder with a folder of PNG or JPEG files for each class",
    )
    group.add_argument("--patch-size", type=int, default=2, help="pixels of a patch's side")
    group.add_argument("--held-out", type=float, default=0.05, help="share for validation")
    group.add_argument("--class-dropout", type=float, default=0.1, help="share without a class")
    group.add_argument("--average-decay", type=float, default=0.999, help="of the weights' average")
    group.add_argument("--guidance", type=float, default=2.0, help="of the samples; 1: none")
    group.add_argument("--sampling-steps", type=int, default=25, help="Euler steps of a sample")
    group.add_argument("--samples-per-class", type=int, default=8, help="0: draw none")
    parser.set_defaults(
        tokenizer_type="NullTokenizer", vocab_size=1, seq_length=1, max_position_embeddings=1
    )
    return parser


# Of Megatron's flags, what an image's tokens cannot have: values that they can, a reason, a remedy.
_ALLOWED = (
    ("hybrid_layer_pattern", (None,), "this model is made of whole layers", "use --num-layers"),
    (
        "position_embedding_type",
        ("learned_absolute", "none"),
        "patches have positions in 2-D",
        "leave it out",
    ),
    ("context_parallel_size", (1,), "an image is not split over ranks", "leave it out"),
    ("data_path", (None,), "this model learns images", "use --images"),
    *(
        (name, (False, None), "an image is one sequence", "leave it out")
        for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
    ),
)


def settle(args: Namespace) -> None:
    """Refuse what such a model does not have, and take the sequence's length from the images."""
    from examples.diffusion import images
    from examples.diffusion.model import CONDITIONS
    from megatron_dynmoe.settings.messages.refusals import FlagError

    for name, allowed, reason, remedy in _ALLOWED:
        if (value := getattr(args, name, allowed[0])) not in allowed:
            raise FlagError(name, value, f", and {reason}", remedy)
    for name, low, high in (
        ("held_out", 0, 0.9),
        ("class_dropout", 0, 1),
        ("average_decay", 0, 1),
        ("patch_size", 1, float("inf")),
        ("sampling_steps", 1, float("inf")),
        ("samples_per_class", 0, float("inf")),
    ):
        if not low <= (value := getattr(args, name)) <= high:
            raise FlagError(name, value, "", f"give a number from {low} to {high}")
    *_, height, width = images.load(args.images).pixels.shape
    if height % args.patch_size or width % args.patch_size:
        raise FlagError(
            "patch_size",
            args.patch_size,
            f", and the images are {height} x {width} pixels",
            "give a number that divides both",
        )
    if args.hidden_size is not None and args.hidden_size % 4:
        raise FlagError(
            "hidden_size", args.hidden_size, ", for positions in 2-D", "give a multiple of 4"
        )
    args.seq_length = CONDITIONS + (height // args.patch_size) * (width // args.patch_size)
    args.max_position_embeddings = args.seq_length


def model_config(args: Namespace) -> Any:
    """The model's config from validated arguments."""
    from megatron.training.argument_utils import gpt_config_from_args

    from examples.diffusion import images
    from examples.diffusion.model import DiTConfig

    known = images.load(args.images)
    config = gpt_config_from_args(args)
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return DiTConfig(
        **shared,
        image_shape=tuple(known.pixels.shape[1:]),
        patch_size=args.patch_size,
        num_classes=len(known.names),
        average_decay=args.average_decay,
    )


def datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, None]:
    """Megatron's dataset provider: training, validation, and no test."""
    from megatron.training import get_args

    from examples.diffusion.images import NoisedImages, load, split

    args = get_args()
    known = load(args.images)
    rows = split(known, args.held_out, args.seed)
    of_splits = []
    for number, (part, length) in enumerate(zip(rows, num_samples[:2], strict=True)):
        length = len(part) if length is None else length  # --full-validation asks for all
        seeds = args.seed + number, args.class_dropout
        of_splits.append(NoisedImages(known, part, length, *seeds) if length else None)
    train, validation = of_splits
    return train, validation, None


datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank reads the same files


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """Megatron's ``forward_step_func``; before the first micro-batch of a step, move the average.

    Every stage of the pipeline reads the batch, and uses what it needs.
    """
    from megatron.core.utils import unwrap_model
    from megatron.training import get_args

    from megatron_dynmoe.training.logits import check_logits

    args, dit = get_args(), unwrap_model(model)
    if model.training and dit.followed != args.curr_iteration:
        dit.follow(args.curr_iteration)
        dit.followed = args.curr_iteration
    batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
    output = model(batch["x"], batch["time"], batch["label"])
    check_logits(model)

    def loss_function(velocity: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The sum over images of the mean squared error of their pixels; the number of images."""
        from megatron_dynmoe.runs.metric_names import LOSS

        loss = (velocity - batch["velocity"]).square().mean(dim=(1, 2, 3)).sum()
        count = torch.tensor(len(velocity), dtype=torch.int, device=velocity.device)
        return loss, count, {LOSS: torch.stack([loss.detach(), count.to(loss.dtype)])}

    return output, loss_function


def evaluated(model: list[torch.nn.Module]) -> None:
    """Draw samples of each class and count experts, into the folder of the run."""
    from megatron.core.utils import unwrap_model
    from megatron.training import get_args, print_rank_0

    from examples.diffusion import pictures

    args = get_args()
    if args.run_dir is None or args.samples_per_class == 0:
        return
    if args.pipeline_model_parallel_size * args.tensor_model_parallel_size > 1:
        print_rank_0(
            "> no samples: they need a model on one pipeline stage and tensor rank. Later, "
            f"python -m examples.diffusion.measure {args.run_dir} loads the checkpoint into one "
            "process, and draws"
        )
        return
    iteration = args.curr_iteration + 1 if hasattr(args, "curr_iteration") else args.iteration
    dit = unwrap_model(model[0])
    if dit.drawn != iteration:  # Megatron evaluates once more at the end
        pictures.draw(dit, args, Path(args.run_dir) / "samples", iteration)
        dit.drawn = iteration


def script() -> Any:
    """What the loop trains; after :func:`~megatron_dynmoe.run.prepare`."""
    from megatron_dynmoe.training.script import Script

    return Script(
        module="examples.diffusion.train",
        is_exported=False,
        add_flags=add_flags,
        settle=settle,
        model_config=model_config,
        check_data=lambda args: None,  # settle has read them
        datasets=datasets,
        forward_step=forward_step,
        evaluated=evaluated,
    )


@record
def main() -> None:
    """Parse the command line and train."""
    program_start = time.time()
    prepare()
    from megatron_dynmoe.training import loop

    with exiting_on_misuse():
        loop.train(program_start, script())


if __name__ == "__main__":
    main()
