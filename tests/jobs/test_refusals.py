"""A plan refuses what the training refuses at its start, in the same words."""

import inspect
import shlex
import sys

import pytest
from megatron.training import arguments

from megatron_dynmoe.cli.plan import main
from megatron_dynmoe.jobs.recipes import command_words, recipe_names
from megatron_dynmoe.jobs.refusals import check_start
from megatron_dynmoe.planning.gpus import GPUS
from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.settings.upstream_flags import _REFUSED_VALUES, UPSTREAM_FLAGS, Refused
from tests.helpers.commands import exit_code_of
from tests.moe import one_rank

pytestmark = pytest.mark.megatron

# Words for the settings that take neither 2 nor "local" nor stand alone.
VALUES = {
    "fp8": "--fp8-format hybrid",
    "fp4": "--fp4-format e2m1",
    "moe_router_score_function": "sigmoid",
    "cuda_graph_impl": "local",
    "moe_pad_expert_input_to_capacity": "",
}
# What upstream, our other checks and the model's own settings refuse, and by which words.
OTHERS = {
    "--lr-warmup-iters 300 --train-iters 200": "which is not below --train-iters (200)",
    "--log-interval 0": "--log-interval is 0: use 1 or more steps",
    "--rotary-percent 0.1 --kv-channels 30": "rotary positions turn pairs",
    "--sft": "is not part of this entry point",
    "--num-query-groups 3 --group-query-attention": "does not divide --num-attention-heads",
    "--moe-dynamic-threshold 0.4": "--moe-dynamic-threshold is 0.4",
    "--recompute-granularity full": "Megatron refuses these flags: ",
    "--expert-model-parallel-size 3": "--expert-model-parallel-size 3 does not divide",
}


def table() -> dict[str, str]:
    """The words of each flag that dynamic routing refuses, by name."""
    actions = {action.dest: action for action in _actions()}
    words = {}
    for name, entry in UPSTREAM_FLAGS.items():
        if not isinstance(entry, Refused) or name not in {*actions, *VALUES}:
            continue
        flag = max(actions[name].option_strings, key=len) if name in actions else ""
        value = "" if actions.get(name) and actions[name].nargs == 0 else VALUES.get(name, "2")
        words[name] = value if value.startswith("--") else f"{flag} {value}"
    for name, value in _REFUSED_VALUES:
        words[f"{name} {value}"] = f"--{name.replace('_', '-')} {value}"
    return words


def _actions():
    from megatron_dynmoe.training.flags import training_parser

    return training_parser()._actions


def of_training(words: list[str], monkeypatch) -> str:
    """What the training says of a command line, up to where it builds a model."""
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_dynmoe.model.settled import settle_run
    from megatron_dynmoe.training import loop

    one_rank.megatron_on_cpu()
    monkeypatch.setattr(sys, "argv", ["pretrain", *words])
    with pytest.raises(UsageError) as refused, loop.refusing_in_flags():
        args, resolved, chosen = loop.parse_command_line()
        settle_run(resolved, gpt_config_from_args(args).transformer, chosen, args)
    return str(refused.value)


def of_plan(words: list[str], gpus: int = 1, gpu: str = "h200-141g") -> str:
    with pytest.raises(ValueError) as refused:
        check_start(words, gpus, GPUS[gpu])
    return str(refused.value)


def test_both_refuse_the_whole_table_in_the_same_words(monkeypatch):
    flags = table()
    assert len(flags) > 15
    for name, given in flags.items():
        words = command_words("smoke", [*shlex.split(given), "--mock-data"])
        said = of_plan(words)
        assert said == of_training(words, monkeypatch), name
        assert said.startswith("--"), name


@pytest.mark.parametrize(("flags", "says"), OTHERS.items())
def test_both_refuse_all_else_in_the_same_words(monkeypatch, flags, says):
    words = command_words("smoke", [*flags.split(), "--mock-data"])
    said = of_plan(words)
    assert says in said and said == of_training(words, monkeypatch)


def test_a_refused_plan_is_misuse_in_one_line(capsys):
    command = "dtop_p_16e --gpus 8 --gpu a800-80g --mtp-num-layers 1"
    assert exit_code_of(main, command.split()) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("dynmoe plan: error: --mtp-num-layers is 1, which") and error[-1] == "\n"
    )
    assert error.count("\n") == 1


@pytest.mark.parametrize("recipe", recipe_names())
def test_no_recipe_is_refused(recipe):
    for gpu in ("a100-80g", "h200-141g", "b200-180g"):
        check_start(command_words(recipe, []), 1 if recipe == "smoke" else 128, GPUS[gpu])


WORST_CASE = "--moe-dynamic-row-buffer worst_case --moe-dynamic-max-experts-per-token 4"
FLEX = "--moe-token-dispatcher-type flex"


@pytest.mark.parametrize(
    ("flags", "gpu", "says"),
    [
        (f"{FLEX} --expert-model-parallel-size 8", "h200-141g", None),
        (f"{FLEX} --expert-model-parallel-size 8 --num-experts 64", "h200-141g",
         "DeepEP takes at most 32 ids per token"),
        (f"{FLEX} --expert-model-parallel-size 8 --num-experts 64 "
         "--moe-dynamic-max-experts-per-token 33", "h200-141g", "DeepEP takes at most 32 ids"),
        (FLEX, "h200-141g", "needs more than one expert-parallel rank"),
        (WORST_CASE, "h200-141g", None),
        (WORST_CASE, "a100-80g", "run in a loop on this device"),
        (f"{WORST_CASE} --expert-model-parallel-size 2", "h200-141g", "rows travel between ranks"),
        # Packages that the other machine may have.
        ("--moe-dynamic-backend transformer_engine", "h200-141g", None),
        ("--moe-dynamic-backend transformer_engine --context-parallel-size 2", "h200-141g", None),
        ("--moe-dynamic-backend transformer_engine --moe-permute-fusion", "h200-141g", None),
        ("--moe-dynamic-backend transformer_engine --moe-permute-fusion "
         "--moe-token-dispatcher-type allgather --expert-model-parallel-size 2", "h200-141g",
         "Transformer Engine's permutation stops at a rank whose experts no token chose"),
        ("--moe-permute-fusion", "h200-141g", "Please install TE"),
        ("--tokenizer-model /elsewhere/tokenizer.model", "h200-141g", None),
    ],
)  # fmt: skip
def test_the_gpu_is_the_planned_one_and_the_packages_are_its_own(flags, gpu, says, monkeypatch):
    monkeypatch.delenv("DYNMOE_KERNELS", raising=False)
    # A test before may have installed the CPU layer, which replaces settings of GPUs.
    monkeypatch.setattr(arguments, "validate_args", inspect.unwrap(arguments.validate_args))
    words = command_words("dtop_p_16e", flags.split())
    if says is None:
        check_start(words, 128, GPUS[gpu])
    else:
        assert says in of_plan(words, 128, gpu)
