"""What upstream asserts without naming a flag, said of the flags that were typed."""

from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.megatron


def parser() -> ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    from megatron_dynmoe.training.flags import add_flags

    return add_flags(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))


def said_of(words: str, call: Callable[..., Any], **fields: Any) -> str | None:
    from megatron_dynmoe.training.checks.upstream_refusals import in_flags

    with pytest.raises((AssertionError, ValueError, TypeError)) as raised:
        call(**fields)
    return in_flags(raised.value, parser(), words.split())


def schedule(**fields: Any) -> Any:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    sound = {
        "init_lr": 0.0, "max_lr": 0.1, "min_lr": 0.0, "lr_warmup_steps": 1, "lr_decay_steps": 9,
        "lr_decay_style": "cosine", "start_wd": 0.0, "end_wd": 0.1, "wd_incr_steps": 9,
        "wd_incr_style": "constant",
    }  # fmt: skip
    return OptimizerParamScheduler(None, **sound | fields)


def model(**fields: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, **fields)


def test_a_bare_assertion_becomes_a_condition_of_flags_with_their_values() -> None:
    assert said_of("--lr-warmup-init 1 --lr 0.1", schedule, init_lr=1.0) == (
        "Megatron refuses these flags: it requires: --lr-warmup-init <= --lr. Here "
        "--lr-warmup-init is 1.0, and --lr is 0.1."
    )


def test_the_flags_of_the_condition_around_are_named_where_its_own_are_not_given() -> None:
    assert said_of("--lr-decay-style WSD", schedule, lr_decay_style="WSD") == (
        "Megatron refuses these flags: it requires: --lr-wsd-decay-iters is given. Here "
        "--lr-decay-style is WSD."
    )


def test_a_message_gets_flags_for_its_attributes_and_the_values_that_were_typed() -> None:
    said = said_of(
        "--num-experts 0 --expert-model-parallel-size 2",
        model, num_moe_experts=0, expert_model_parallel_size=2,
    )  # fmt: skip
    assert said == (
        "Megatron refuses these flags: --num-experts must be non-negative. Here --num-experts is 0."
    )


def test_what_a_tokenizer_cannot_read_is_said_of_its_flags() -> None:
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import reload_mergeable_ranks

    said = said_of(
        "--tokenizer-type TikTokenizer --tokenizer-model a.model",
        reload_mergeable_ranks, path="a.model",
    )  # fmt: skip
    assert said is not None and said.startswith("Megatron refuses these flags: it requires: ")
    assert said.endswith("--tokenizer-type is TikTokenizer, and --tokenizer-model is a.model.")


def test_nothing_typed_has_to_do_with_it() -> None:
    said = said_of("", schedule, min_lr=-1.0)
    assert said == (
        "Megatron refuses these flags: it requires: --min-lr >= 0.0. Here --min-lr is 0.0 by "
        "default."
    )


def test_a_fault_is_no_refusal() -> None:
    assert said_of("--lr 1", schedule, max_lr=None) is None  # float(None), in upstream's code


def test_a_training_that_has_begun_refuses_nothing() -> None:
    def train_step() -> None:
        schedule(init_lr=1.0)

    assert said_of("--lr-warmup-init 1 --lr 0.1", train_step) is None


def test_a_refusal_of_ours_stays_as_it_is() -> None:
    from megatron_dynmoe.settings.config import DynMoEConfig

    said = said_of("--lr 1", DynMoEConfig, routing="top_q")
    assert said is not None and said.startswith("routing is 'top_q'")
