"""Every recipe's model, built by Megatron and our specs on the meta device: its parameters counted.

Megatron validates the recipe's own layout first, for a world of 16.
"""

from __future__ import annotations

from functools import partial
from importlib import resources
from typing import Any, NamedTuple

import pytest
import torch

from megatron_dynmoe.jobs.recipes import recipe_flags, recipe_names
from tests.moe import one_rank

pytestmark = pytest.mark.megatron


class Sizes(NamedTuple):
    """Parameters, and those that a token uses at so many experts."""

    total: float
    experts: int = 0
    active: float = 0


MILLION, BILLION = 1e6, 1e9
# Totals and active parameters as the papers state them; at target 2, DTop-p's 16 experts are top-2.
PUBLISHED = {
    "dense_374m": Sizes(374 * MILLION),
    "dense_570m": Sizes(570 * MILLION),
    "moe_top1": Sizes(3.5 * BILLION, 1, 374 * MILLION),
    "moe_top2": Sizes(3.5 * BILLION, 2, 581 * MILLION),
    "moe_dynamic_p04": Sizes(3.5 * BILLION, 2, 581 * MILLION),
    "moe_dynamic_p05": Sizes(3.5 * BILLION, 2, 581 * MILLION),
    "moe_dynamic_without_dynamic_loss": Sizes(3.5 * BILLION, 2, 581 * MILLION),
    "dtop_p_16e": Sizes(3.5 * BILLION, 2, 581 * MILLION),
    "dtop_p_16e_layerwise": Sizes(3.5 * BILLION, 2, 581 * MILLION),
    "dtop_p_64e8a": Sizes(6.9 * BILLION, 8, 1.3 * BILLION),
    "topp_fixed_64e": Sizes(6.9 * BILLION, 8, 1.3 * BILLION),
    "topk_64e8a": Sizes(6.9 * BILLION, 8, 1.3 * BILLION),
    "dtop_p_128e16a": Sizes(6.9 * BILLION, 16, 1.3 * BILLION),
}


@pytest.fixture(autouse=True)
def megatron(monkeypatch):
    one_rank.world_of_one()
    import megatron.training.arguments as megatron_arguments

    monkeypatch.setattr(megatron_arguments, "set_global_variables", lambda args: None)
    monkeypatch.delenv("DYNMOE_CONFIG", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "16")
    yield
    one_rank.forget_global_state()


def test_the_papers_name_a_size_for_every_recipe():
    assert set(PUBLISHED) == set(recipe_names()) - {"smoke"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_size(name, monkeypatch):
    # Its size does not count, because Megatron builds the tokenizer after the arguments.
    tokenizer = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    flags = [*recipe_flags(name), "--mock-data", "--tokenizer-model", str(tokenizer)]
    check(build(flags, monkeypatch), PUBLISHED[name], tolerance=0.01)


def test_the_diffusion_transformer_has_the_published_size(monkeypatch):
    """With everything that is the example's own, and the planner counts all but that."""
    from examples.diffusion import images, train
    from examples.diffusion.model import DiTBuilder
    from megatron_dynmoe.jobs.plan import make_plan
    from megatron_dynmoe.planning.gpus import GPUS

    some = images.Images(
        torch.zeros(1, 3, 256, 256, dtype=torch.uint8),
        torch.zeros(1),
        [str(n) for n in range(1000)],
    )
    monkeypatch.setattr(images, "load", lambda source: some)
    recipe = "examples/diffusion/dtop_p_dit_64e8a.flags"
    flags = [*recipe_flags(recipe), "--images", "some", "--patch-size", "16"]
    model = build(flags, monkeypatch, train.script(), DiTBuilder)
    check(model, Sizes(3.4 * BILLION, 8, 0.9 * BILLION), tolerance=0.02)
    (average,) = model.average
    assert {parameter.dtype for parameter in average.parameters()} == {torch.float32}
    assert torch.bfloat16 in {parameter.dtype for parameter in model.parameters()}
    plan = make_plan(recipe, [], 8, GPUS["h200-141g"])
    own = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith("decoder.")
    )
    of_one_word = 2 * 2048
    total = sum(parameter.numel() for parameter in model.parameters())
    assert plan.parameters - of_one_word == total - own
    assert own < 0.005 * total


def check(model: torch.nn.Module, published: Sizes, tolerance: float) -> None:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    assert total == pytest.approx(published.total, rel=tolerance)
    if published.experts:
        of_experts = sum(size for name, size in sizes.items() if ".experts." in name)
        unused = 1 - published.experts / model.config.num_moe_experts
        assert total - unused * of_experts == pytest.approx(published.active, rel=tolerance)


def build(
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    script: Any = None,
    builder: Any = None,
) -> torch.nn.Module:
    """The whole model of a recipe, on one rank and without memory; by default a GPT."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_dynmoe.model.prepare import prepare_training
    from megatron_dynmoe.model.settled import settle_run
    from megatron_dynmoe.model.spec import layer_spec
    from megatron_dynmoe.training.loop import parse_command_line
    from megatron_dynmoe.training.script import GPT

    script = script or GPT
    monkeypatch.setattr("sys.argv", ["pretrain", *flags])
    args, resolved, chosen = parse_command_line(script)
    args.pipeline_model_parallel_size = args.expert_model_parallel_size = 1
    args.perform_initialization = False  # of nothing, which takes half of the time
    config = script.model_config(args)
    settled = settle_run(resolved, config.transformer, chosen, args)
    prepare_training(settled, config.transformer, args)
    config.transformer_layer_spec = partial(layer_spec, settled=settled)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device("meta"):
        return (builder or GPTModelBuilder)(config).build_model(groups)
