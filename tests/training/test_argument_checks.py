"""Sizes and schedules that cannot be together: both values, the flag that was typed, the remedy."""

import importlib.util
import sys
from argparse import ArgumentParser, Namespace

import pytest

pytestmark = pytest.mark.megatron

SIZES = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 2 --num-experts 8 --train-iters 10 "
    "--lr 1e-3 --tokenizer-type NullTokenizer"
)


def check(flags: str, world_size: int = 1) -> None:
    from megatron.training.arguments import add_megatron_arguments

    from megatron_dynmoe.training.checks.argument_checks import check_arguments
    from megatron_dynmoe.training.flags import add_flags

    parser = add_flags(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    args = parser.parse_args(f"{SIZES} {flags}".split())
    args.world_size = world_size
    check_arguments(args)


@pytest.mark.parametrize(
    "flags",
    ["", "--global-batch-size 6", "--lr-warmup-iters 9", "--kv-channels 8 --hidden-size 30"],
)
def test_what_fits_passes(flags):
    check(flags)
    check("--expert-model-parallel-size 2 --pipeline-model-parallel-size 2", 4)


@pytest.mark.parametrize("flag", ["--train-iters", "--lr", "--tokenizer-type"])
def test_what_a_run_needs_is_named(flag, monkeypatch):
    words = SIZES.split()
    del words[words.index(flag) : words.index(flag) + 2]
    monkeypatch.setattr(sys.modules[__name__], "SIZES", " ".join(words))
    with pytest.raises(ValueError, match=f"{flag} is not given: give"):
        check("")
    if flag != "--tokenizer-type":
        check("--skip-train")


@pytest.mark.parametrize(
    ("flags", "world_size", "parts"),
    [
        ("--global-batch-size 3", 1, ("--global-batch-size is 3", "--micro-batch-size 2", "4")),
        ("--micro-batch-size 0", 1, ("--micro-batch-size is 0",)),
        ("--expert-model-parallel-size 3", 3, ("--num-experts is 8", "size 3", "1, 2")),
        ("--expert-model-parallel-size 0", 1, ("--expert-model-parallel-size is 0", "at least 1")),
        ("--tensor-model-parallel-size 8 --sequence-parallel", 8, ("heads is 4", "size 8")),
        ("--tensor-model-parallel-size 2", 2, ("with experts", "--sequence-parallel")),
        ("--pipeline-model-parallel-size 3", 3, ("--num-layers is 4", "size 3")),
        ("--pipeline-model-parallel-size 2", 3, ("number of processes is 3", "pipeline 2")),
        ("--max-position-embeddings 16", 1, ("embeddings is 16", "--seq-length is 32")),
        ("--hidden-size 30", 1, ("--hidden-size is 30", "--num-attention-heads 4")),
        ("--lr-warmup-iters 10", 1, ("--lr-warmup-iters is 10", "--train-iters (10)")),
        ("--lr-warmup-iters 5 --lr-decay-iters 5", 1, ("--lr-decay-iters (5)",)),
        ("--moe-layer-freq 0", 1, ("--moe-layer-freq is 0", "from 1")),
        ("--adam-beta2 1", 1, ("--adam-beta2 is 1.0", "below 1")),
        ("--bf16 --fp16", 1, ("--bf16 is given", "--fp16")),
        ("--rampup-batch-size 2 2 8", 1, ("is 2 2 8", "--step-batch-size-schedule")),
    ],
)
def test_what_does_not_fit_is_said_with_both_values(flags, world_size, parts):
    with pytest.raises(ValueError, match=r"^.+: .+") as refused:
        check(flags, world_size)
    assert "\n" not in str(refused.value)
    for part in parts:
        assert part in str(refused.value)


def test_a_tokenizer_that_sentencepiece_cannot_read_is_named(tmp_path):
    (tmp_path / "text.txt").write_text("no model")
    sentencepiece = "--tokenizer-type SentencePieceTokenizer"
    with pytest.raises(
        ValueError, match=r"--tokenizer-model is not given: .* needs a \.model file"
    ):
        check(sentencepiece)
    for name, says in (("text.txt", "which is no SentencePiece model"), ("nope", "no such file")):
        with pytest.raises(ValueError, match=f"--tokenizer-model is .*{name}.* {says}"):
            check(f"{sentencepiece} --tokenizer-model {tmp_path / name}")


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--lr", "nan", "at least 0"),
        ("--lr", "-1e-3", "at least 0"),
        ("--adam-beta2", "1.5", "0 to 1"),
        ("--hidden-dropout", "inf", "0 to 1"),
        ("--tensor-model-parallel-size", "0", "at least 1"),
        ("--make-vocab-size-divisible-by", "0", "at least 1"),
        ("--distributed-timeout-minutes", "0", "at least 1"),
        ("--moe-aux-loss-coeff", "-0.1", "at least 0"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_with_what_is_allowed(flag, value, allowed):
    with pytest.raises(ValueError, match=rf"^{flag} is {value}: use {allowed}\.$"):
        check(f"{flag}={value}")


def test_what_means_something_below_0_passes():
    check("--null-tokenizer-pad-id=-1 --glu-linear-offset=-1.5 --fp8-margin=-1")


def test_a_gated_layer_that_cannot_be_halved():
    with pytest.raises(ValueError, match=r"--ffn-hidden-size is 65, .* use a multiple of 2, or"):
        check("--swiglu --ffn-hidden-size 65")
    check("--swiglu --ffn-hidden-size 65 --no-bias-swiglu-fusion")
    check("--ffn-hidden-size 65")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--hidden-size 12", "--hidden-size is 12 of 4 heads"),
        ("--kv-channels 7", "--kv-channels is 7 with --rotary-percent 1"),
        ("--kv-channels 6 --rotary-percent 0.5", "--rotary-percent 0.5, which turns 3 numbers"),
    ],
)
def test_a_head_that_rotary_positions_cannot_turn(flags, part):
    with pytest.raises(ValueError, match=part):
        check(f"{flags} --position-embedding-type rope")
    check(f"{flags} --position-embedding-type none")


def test_more_experts_for_a_token_than_there_are():
    from megatron_dynmoe.training.checks.argument_checks import check_top_k

    with pytest.raises(ValueError, match=r"--moe-router-topk is 2 .*--num-experts is 1: .* 1 at"):
        check_top_k(Namespace(moe_router_topk=2, num_experts=1))
    check_top_k(Namespace(moe_router_topk=2, num_experts=2))
    check_top_k(Namespace(moe_router_topk=2, num_experts=None))


def test_wandb_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--wandb-project is demo.*pip install wandb"):
        check("--wandb-project demo")
