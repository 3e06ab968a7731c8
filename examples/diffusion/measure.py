"""How good a run's samples are, measured on its last checkpoint in one process.

    python -m examples.diffusion.measure RUN [--samples N] [FLAGS OF THE TRAINING ...]

A small classifier learns the real images of the training. It then says how many samples it
recognizes as their class, and the Fréchet distance between samples and real images in its features.
With both comes the loss on held-out images by noise level. RUN is the folder of a run, on whatever
layout it was trained: Megatron loads its checkpoint into this one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.diffusion import train
from megatron_dynmoe.jobs.recipes import recipe_flags
from megatron_dynmoe.run import prepare
from megatron_dynmoe.settings.messages.command_line import (
    CommandParser,
    UsageError,
    ending_plainly,
    number,
)
from megatron_dynmoe.settings.messages.words import values_of
from megatron_dynmoe.storage.atomic import replace_file
from megatron_dynmoe.storage.megatron_names import CHECKPOINTS, TRACKER

CLASSIFIER_STEPS, BATCH = 1000, 128
COMPARED = 5000  # real images of the training whose features samples are compared with, at most
HELD_OUT = 512  # images of which the loss is computed, at most
SAMPLES = "samples"
# Of the training's command, by how their names begin: its layout, and what it writes and reads.
_LEFT_OUT = (
    "run-dir", "save", "load", "no-load-", "finetune", "ckpt-", "pretrained-checkpoint", "exit-",
    "tensorboard-", "wandb-", "live-plot", "sequence-parallel", "context-parallel-",
    "expert-model-parallel-", "expert-tensor-parallel-",
    "pipeline-model-parallel-", "tensor-model-parallel-", "num-layers-per-virtual-",
    "num-virtual-stages-", "decoder-first-pipeline-", "decoder-last-pipeline-", "account-for-",
    "microbatch-group-size-", "tp-comm-overlap", "use-distributed-optimizer", "overlap-",
    "eval-", "full-validation",
)  # fmt: skip


class Classifier(nn.Module):
    """Two convolutions and two linear layers, for images of any size."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(4)),
            *(nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] from -1 to 1 to logits [B, classes]."""
        return self.head(self.features(images))


def classifier_of(pixels: Tensor, labels: Tensor, num_classes: int, device: Any) -> Classifier:
    """Train a classifier; the same images give the same one.

    Args:
        pixels: [N, C, H, W] uint8.
        labels: [N] int64.
    """
    from examples.diffusion.images import scaled

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(pixels.shape[1], num_classes).to(device)
        optimizer = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, CLASSIFIER_STEPS)
        for _ in range(CLASSIFIER_STEPS):
            rows = torch.randint(len(pixels), (BATCH,))
            logits = model(scaled(pixels[rows]).to(device))
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels[rows].to(device)).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """The squared Fréchet distance of the normal distributions that two sets of features suggest.

    |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) for means m, n and covariances A, B, in float64. The
    eigenvalues of A B, a product of two positive matrices, are real and not negative.

    Args:
        one, other: [N, F] and [M, F].
    """
    one, other = one.double(), other.double()
    covariances = torch.cov(one.T), torch.cov(other.T)
    a, b = (covariance.reshape(one.shape[1], -1) for covariance in covariances)
    root_trace = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    means = (one.mean(dim=0) - other.mean(dim=0)).square().sum()
    return float(means + a.trace() + b.trace() - 2 * root_trace)


@torch.no_grad()
def measure(dit: Any, args: Namespace, per_class: int) -> dict[str, Any]:
    """Sample the averaged weights and judge.

    Args:
        dit: the whole model.
        args: Megatron's arguments and ours.
        per_class: samples of each class.

    Returns:
        ``classifier_accuracy`` and ``frechet_of_held_out``, what real held-out images get;
        ``accuracy``, ``accuracy_by_class`` and ``frechet`` of the samples; ``times``, ``loss``,
        ``layers`` and ``experts`` by noise level, of held-out images; the numbers of images.
    """
    from examples.diffusion.images import load, scaled, split
    from examples.diffusion.pictures import count, sample_classes

    (average,) = dit.average
    known, device = load(args.images), torch.cuda.current_device()
    train_rows, held_out = split(known, args.held_out, args.seed)
    with torch.enable_grad():
        classifier = classifier_of(
            known.pixels[train_rows], known.labels[train_rows], len(known.names), device
        )

    def judged(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and which images are recognized."""
        features = torch.cat([classifier.features(part.to(device)) for part in images.split(500)])
        return features.cpu(), classifier.head(features).argmax(dim=1).cpu() == labels

    def real(rows: Tensor) -> tuple[Tensor, Tensor]:
        return judged(scaled(known.pixels[rows]), known.labels[rows])

    generator = torch.Generator().manual_seed(args.seed + 1)
    samples, labels, _ = sample_classes(average, args, known, per_class, generator)
    features, recognized = judged(samples.clamp(-1, 1), labels)
    by_class = recognized.view(-1, per_class).double().mean(dim=1)
    held_out_features, held_out_recognized = real(held_out)
    compared, _ = real(train_rows[:COMPARED])
    rows = held_out[:HELD_OUT]
    noise = torch.randn(len(rows), *known.pixels.shape[1:], generator=generator)
    images = scaled(known.pixels[rows]).to(device)
    counted = count(average, images, noise.to(device), known.labels[rows].to(device))
    return {
        "iteration": args.iteration,
        "guidance": args.guidance,
        "sampling_steps": args.sampling_steps,
        "classifier_accuracy": held_out_recognized.double().mean().item(),
        "samples": len(labels),
        "accuracy": recognized.double().mean().item(),
        "accuracy_by_class": dict(zip(known.names, by_class.tolist(), strict=True)),
        "frechet": frechet_distance(features, compared),
        "frechet_of_held_out": frechet_distance(held_out_features[: len(labels)], compared),
        "held_out": len(held_out),
        **counted,
    }


def describe(measured: dict[str, Any]) -> list[str]:
    """What was measured, in lines."""
    from examples.diffusion.pictures import describe as by_level

    by_class = ", ".join(f"{n} {share:.0%}" for n, share in measured["accuracy_by_class"].items())
    return [
        f"> the classifier recognizes {measured['classifier_accuracy']:.1%} of "
        f"{measured['held_out']:,} held-out real images",
        f"> and {measured['accuracy']:.1%} of {measured['samples']:,} samples (guidance "
        f"{measured['guidance']:g}, {measured['sampling_steps']} steps): {by_class}",
        f"> Fréchet distance to real images: {measured['frechet']:.2f} (held-out real images: "
        f"{measured['frechet_of_held_out']:.2f})",
        *by_level(measured),
    ]


def flags_of(run: Path, more: Sequence[str]) -> list[str]:
    """The flags that load a run's last checkpoint into one process, without training.

    Raises:
        UsageError: the folder has no command or no checkpoint.
    """
    for name in ("command.txt", f"{CHECKPOINTS}/{TRACKER}"):
        if not (run / name).is_file():
            raise UsageError(f"RUN is {run}, which holds no {name}: give the --run-dir of a run")
    words = shlex.split((run / "command.txt").read_text().splitlines()[0])
    flags: list[str] = []
    for word in words[words.index("-m") + 2 :]:
        flags += recipe_flags(word) if word.startswith("@") else [word]
    kept = {
        name: values for name, values in values_of(flags).items() if not name.startswith(_LEFT_OUT)
    }
    kept |= {"load": [str(run / CHECKPOINTS)], "eval-iters": ["1"], "num-workers": ["0"]}
    loading = ["--skip-train", "--no-load-optim", "--no-load-rng", "--exit-on-missing-checkpoint"]
    words = [word for name, values in kept.items() for word in (f"--{name}", *values)]
    return [*words, *loading, *more]


def main() -> None:
    """Measure, print, and write ``samples/measured_N.json`` and ``report.html`` into the run."""
    program_start = time.time()
    parser = CommandParser(prog="python -m examples.diffusion.measure", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the --run-dir of a training")
    parser.add_argument(
        "--samples", type=number(int, 2), default=100, metavar="N", help="of each class (100)"
    )
    asked, more = parser.parse_known_args()
    with ending_plainly(parser.prog, "nothing was measured"):
        sys.argv[1:] = flags_of(asked.run, more)
        shown = sys.stdout

        def evaluated(model: list[nn.Module]) -> None:
            with contextlib.redirect_stdout(shown):
                write(model[0], asked.run, asked.samples)

        # It stays open: what ends with the process still writes there.
        log = open(asked.run / "measure_log.txt", "w")  # noqa: SIM115
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            prepare()
            from megatron_dynmoe.training import loop

            loop.train(program_start, dataclasses.replace(train.script(), evaluated=evaluated))


def write(model: nn.Module, run: Path, per_class: int) -> None:
    """Draw and measure; print what came out."""
    from megatron.core.utils import unwrap_model
    from megatron.training import get_args

    from examples.diffusion import images, page, pictures

    args, dit = get_args(), unwrap_model(model)
    if args.samples_per_class:
        pictures.draw(dit, args, run / SAMPLES, args.iteration, quiet=True)
    measured = measure(dit, args, per_class)
    text = json.dumps(measured, indent=1) + "\n"
    target = run / SAMPLES / f"measured_{args.iteration}.json"
    target.parent.mkdir(exist_ok=True)
    replace_file(target, lambda path: path.write_text(text))
    lines = describe(measured)
    page.write(run, args.iteration, lines, images.load(args.images).names)
    print(*lines, f"> {target}\n> {run / page.NAME}", sep="\n", flush=True)


if __name__ == "__main__":
    main()
