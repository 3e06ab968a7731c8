"""Layouts: what they amount to, and what cannot work."""

import pytest

from megatron_dynmoe.planning.layout import Layout, check_layout

MODEL = (
    "--num-layers 24 --num-attention-heads 16 --seq-length 2048 --micro-batch-size 4 "
    "--global-batch-size 2048"
)
MOE = f"{MODEL} --num-experts 16"
EP, TP, PP = (f"--{name}-model-parallel-size" for name in ("expert", "tensor", "pipeline"))


def layout(flags: str, world_size: int = 16) -> Layout:
    return Layout.from_flags(flags.split(), world_size)


def test_sizes_follow_from_the_flags():
    found = layout(f"{MOE} {PP} 2 {EP} 4", 128)
    check_layout(found)
    assert (found.data, found.expert_data, found.num_micro_batches) == (64, 16, 8)
    assert found.expert_tensor == 1


def test_expert_tensor_parallelism_follows_tensor_parallelism():
    assert layout(f"{MOE} {TP} 2").expert_tensor == 2
    assert layout(f"{MOE} {TP} 2 --expert-tensor-parallel-size 1").expert_tensor == 1


def test_the_default_batch_is_one_micro_batch_a_replica():
    flags = "--num-layers 2 --num-attention-heads 2 --seq-length 8 --micro-batch-size 3"
    found = layout(flags, 4)
    check_layout(found)
    assert (found.global_batch, found.num_micro_batches) == (12, 1)


@pytest.mark.parametrize(
    ("flags", "world_size", "message"),
    [
        (MOE, 0, "processes is 0"),
        (f"{MOE} {PP} 2", 3, r"processes is 3, which tensor 1 x pipeline 2 .*multiple of 2"),
        (f"{MOE} {EP} 3", 3, r"--num-experts is 16.*parallel-size 3.*use one of 1, 2\."),
        (f"{MOE} {EP} 16", 8, r"processes is 8, which expert parallel 16 .*multiple of 16"),
        (f"{MOE} {PP} 2 {EP} 8", 8, "processes is 8, which expert parallel 8 x pipeline 2"),
        (f"{MODEL} {EP} 2", 2, "--expert-model-parallel-size is 2, but the model has no experts"),
        (f"{MOE} {PP} 16", 16, r"--num-layers is 24.*use one of 1, 2, 3, 4, 6, 8, 12 stages"),
        (
            f"{MOE} {PP} 4 --num-virtual-stages-per-pipeline-rank 4",
            4,
            "--num-layers is 24.*4 x 4 virtual stages",
        ),
        (f"{MOE} --num-virtual-stages-per-pipeline-rank 2", 4, "without a pipeline"),
        (f"{MOE} --micro-batch-size 3", 4, r"--global-batch-size is 2048.*use 2040 or 2052"),
        (f"{MOE} --global-batch-size 4", 4, "4 data-parallel ranks does not divide: use 16"),
        (f"{MOE} {TP} 2", 4, "add --sequence-parallel"),
        (f"{MODEL} {TP} 3", 3, "--num-attention-heads is 16.*use one of 1, 2"),
        (f"{MODEL} {TP} 16 --sequence-parallel --seq-length 40", 16, "--seq-length is 40"),
        (
            f"{MODEL} --context-parallel-size 3",
            3,
            "--context-parallel-size 3 needs a multiple of 6",
        ),
        (
            f"{MOE} {PP} 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 12",
            2,
            "a step has 3 micro-batches",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_value_and_remedy(flags, world_size, message):
    with pytest.raises(ValueError, match=message):
        check_layout(layout(flags, world_size))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (f"{MODEL} {PP} two", "--pipeline-model-parallel-size is two: use a whole number"),
        (f"{MODEL} {PP} 0", "--pipeline-model-parallel-size is 0"),
        (f"{MODEL} {PP}", "--pipeline-model-parallel-size is without a value"),
        (f"{MODEL} --num-experts -1", "--num-experts is -1"),
        ("--num-layers 2", "--micro-batch-size is missing"),
    ],
)
def test_a_size_that_is_none_is_named(flags, message):
    with pytest.raises(ValueError, match=message):
        layout(flags)


@pytest.mark.parametrize(
    "flag", ["--pipeline-model-parallel-layout Et*10|t*14L", "--num-experts 0"]
)
def test_what_megatron_checks_itself_is_left_to_it(flag):
    check_layout(layout(f"{MODEL} --num-layers 25 {PP} 1 {flag}"))
    if "layout" in flag:
        check_layout(layout(f"{MODEL} --num-layers 25 {PP} 2 {flag}"))
