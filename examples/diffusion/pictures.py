"""Samples by class, and where the model spends its experts, as pictures and as JSON."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.diffusion.flow import noised, sample
from examples.diffusion.images import Images, load, scaled, split
from examples.diffusion.model import CONDITIONS, DiT
from megatron_dynmoe.control.update import routers_of
from megatron_dynmoe.runs.drawing.curves import save_figure
from megatron_dynmoe.storage.atomic import replace_file

LEVELS = 10  # times in the middle of as many parts of [0, 1]
COUNTED = 128  # images, at most
BATCH = 100  # samples that are drawn at once


@torch.no_grad()
def draw(model: DiT, args: Namespace, folder: Path, iteration: int, *, quiet: bool = False) -> None:
    """Write ``step_N.png`` (a row for each class), ``experts_N.png`` and ``experts_N.json``.

    All ranks compute the same, for experts may be spread over them; the first one writes. The
    weights are the moving average.

    Args:
        model: the whole model; it must not be split over pipeline or tensor ranks.
        args: Megatron's arguments and ours.
        folder: where to; it is made.
        iteration: N.
        quiet: print nothing.
    """
    (average,) = model.average
    known = load(args.images)
    device = torch.cuda.current_device()
    generator = torch.Generator().manual_seed(args.seed)
    samples, _, of_steps = sample_classes(average, args, known, args.samples_per_class, generator)
    rows = split(known, args.held_out, args.seed)[1][:COUNTED]
    images = scaled(known.pixels[rows]).to(device)
    noise = torch.randn(images.shape, generator=generator).to(device)
    counted = count(average, images, noise, known.labels[rows].to(device))
    if torch.distributed.get_rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _save_grid(samples, args.samples_per_class, folder / f"step_{iteration}.png")
    report = {"iteration": iteration, "images": len(rows), **counted, "sampling": of_steps}
    replace_file(
        folder / f"experts_{iteration}.json",
        lambda path: path.write_text(json.dumps(report, indent=1) + "\n"),
    )
    if counted["experts"]:
        grid = model.model_config.grid
        _save_experts(counted, of_steps, grid, folder / f"experts_{iteration}.png")
    if quiet:
        return
    for line in describe(counted):
        print(line, flush=True)
    print(f"> samples and counts: {folder}/*_{iteration}.*", flush=True)


def sample_classes(
    average: DiT, args: Namespace, known: Images, per_class: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, list[Any]]:
    """Sample so many images of each class, class by class.

    Args:
        average: the model with the averaged weights.
        args: Megatron's arguments and ours.
        generator: of the noise, on the CPU.

    Returns:
        Images [N, C, H, W], on the CPU; their classes, [N] int64; and mean experts per token as
        lists [step][MoE layer][token], over the passes of guidance, too (empty for stock top-k).
    """
    device, num_classes = torch.cuda.current_device(), len(known.names)
    classes_N = torch.arange(num_classes).repeat_interleave(per_class)
    noise = torch.randn(len(classes_N), *known.pixels.shape[1:], generator=generator)
    of_passes: list[Tensor] = []  # sums over images, [L, S]

    def velocity(x: Tensor, time: Tensor, classes: Tensor) -> Tensor:
        result = average(x, time, classes)
        if seen:
            of_passes.append(len(x) * torch.stack(seen))
            seen.clear()
        return result

    with _counting(average) as seen:
        samples = [
            sample(
                velocity,
                part.to(device),
                classes.to(device),
                steps=args.sampling_steps,
                guidance=args.guidance,
                null_class=num_classes,
            ).cpu()
            for part, classes in zip(noise.split(BATCH), classes_N.split(BATCH), strict=True)
        ]
    if not of_passes:
        return torch.cat(samples), classes_N, []
    sums_VLS = torch.stack(of_passes).unflatten(0, (-1, args.sampling_steps)).sum(dim=0)
    num_images = len(noise) * (1 if args.guidance == 1 else 2)
    return torch.cat(samples), classes_N, (sums_VLS / num_images).tolist()


def count(model: DiT, images: Tensor, noise: Tensor, labels: Tensor) -> dict[str, Any]:
    """Loss and experts of noised images, by noise level.

    Args:
        model: in evaluation mode.
        images, noise: [B, C, H, W].
        labels: [B].

    Returns:
        ``times`` and ``loss``, one number for each level; ``experts``, mean counts as lists
        [level][MoE layer][token], the tokens being time, class and the patches row by row (empty
        for stock top-k, which counts nothing); ``layers``, the numbers of the layers.
    """
    times = [(level + 0.5) / LEVELS for level in range(LEVELS)]
    losses, experts = [], []
    with _counting(model) as seen:
        for level in times:
            time = torch.full((len(images),), level, device=images.device)
            x, velocity = noised(images, noise, time)
            losses.append(float((model(x, time, labels) - velocity).square().mean()))
            if seen:
                experts.append(torch.stack(seen).tolist())
            seen.clear()
    layers = [router.layer_number for router in routers_of([model])]
    return {"times": times, "loss": losses, "layers": layers, "experts": experts}


@contextmanager
def _counting(model: DiT) -> Iterator[list[Tensor]]:
    """A list, to which each pass adds mean experts of a layer's tokens, [S] float64; empty it."""
    rows, columns = model.model_config.grid
    seen: list[Tensor] = []

    def note(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        per_token = output[1].sum(dim=-1).view(CONDITIONS + rows * columns, -1)  # [S, B]
        seen.append(per_token.double().mean(dim=1))

    with ExitStack() as hooks:
        for router in routers_of([model]):
            hooks.callback(router.register_forward_hook(note).remove)
        yield seen


def describe(counted: dict[str, Any]) -> list[str]:
    """Lines of a table: for each noise level its loss, and experts per token by layer."""
    lines = [
        "> time (0: noise)   loss   experts: all" + "".join(f"{n:7}" for n in counted["layers"])
    ]
    if not counted["experts"]:
        lines = ["> time (0: noise)   loss"]
    for number, (time, loss) in enumerate(zip(counted["times"], counted["loss"], strict=True)):
        line = f"> {time:13.2f} {loss:9.4f}"
        if counted["experts"]:
            by_layer = np.mean(counted["experts"][number], axis=1)
            line += f"{by_layer.mean():15.2f}" + "".join(f"{value:7.2f}" for value in by_layer)
        lines.append(line)
    return lines


def _save_grid(samples: Tensor, columns: int, path: Path, scale: int = 3) -> None:
    from PIL import Image

    pixels = ((samples.clamp(-1, 1) + 1) * 127.5).round().byte()
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=64)
    rows = padded.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # rows, H, columns, W, C
    grid = rows.flatten(2, 3).flatten(0, 1).numpy()
    grid = grid.repeat(scale, axis=0).repeat(scale, axis=1)
    image = Image.fromarray(grid.squeeze(2) if grid.shape[2] == 1 else grid)
    replace_file(path, lambda partial: image.save(partial, format="PNG"))


def _save_experts(
    counted: dict[str, Any], of_steps: list[Any], grid: tuple[int, int], path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    experts_VLS = np.array(counted["experts"])
    figure, (by_layer, over_image, by_level) = plt.subplots(
        1, 3, figsize=(13, 3.6), layout="constrained"
    )
    figure.get_layout_engine().set(wspace=0.08)  # a bar's label is not the next axis's
    edges = np.linspace(0, 1, LEVELS + 1)
    layers = np.arange(len(counted["layers"]) + 1) + 0.5
    mesh = by_layer.pcolormesh(edges, layers, experts_VLS.mean(axis=2).T)
    figure.colorbar(mesh, ax=by_layer, label="experts per token")
    by_layer.set(title="by layer and noise level", xlabel="time (0: noise)", ylabel="MoE layer")
    by_layer.yaxis.get_major_locator().set_params(integer=True)
    mesh = over_image.imshow(experts_VLS[..., CONDITIONS:].mean(axis=(0, 1)).reshape(grid))
    figure.colorbar(mesh, ax=over_image, label="experts per token")
    over_image.set(title="over the image, by patch", xticks=[], yticks=[])
    experts_V = experts_VLS.mean(axis=(1, 2))
    by_level.plot(counted["times"], experts_V, marker="o")
    if of_steps:
        starts = np.arange(len(of_steps)) / len(of_steps)
        of_samples = np.array(of_steps).mean(axis=(1, 2))
        by_level.plot(starts, of_samples, color="C0", linestyle="--")
    title = "by noise level" + (" (dashed: while sampling)" if of_steps else "")
    by_level.set(title=title, xlabel="time (0: noise)")
    by_level.set_ylabel("experts per token", color="C0")
    by_level.set_ylim(0, 1.1 * by_level.dataLim.ymax)
    loss = by_level.twinx()
    loss.plot(counted["times"], counted["loss"], color="C1", marker="o")
    loss.set_ylabel("loss", color="C1")
    save_figure(figure, path, dpi=110)
