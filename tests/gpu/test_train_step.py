"""Whole steps of Megatron's training, with kernels on against off."""

from contextlib import closing

import pytest

from benchmarks.places import Apart
from tests.gpu import steps
from tests.gpu.stand_in import ON_GPU

pytestmark = [pytest.mark.megatron, pytest.mark.triton]

SIZES = (
    "--num-layers 2 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 "
    "--seq-length 256 --max-position-embeddings 256 --micro-batch-size 4 --global-batch-size 8"
    if ON_GPU
    else "--num-layers 1 --hidden-size 16 --ffn-hidden-size 16 --num-attention-heads 2 "
    "--seq-length 12 --max-position-embeddings 12 --micro-batch-size 1 --global-batch-size 2 "
    "--num-experts 4"
)
STEPS = 3


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        pytest.param("", 1e-4, id="fp32"),
        # As in the recipes.
        pytest.param(
            "--bf16 --use-distributed-optimizer --cross-entropy-loss-fusion "
            "--overlap-grad-reduce --overlap-param-gather",
            1e-2,
            id="bf16",
            marks=[] if ON_GPU else [pytest.mark.long],
        ),
    ],
)
def test_kernels_change_no_step(flags, tolerance):
    pytest.importorskip("triton")
    with closing(Apart()) as place:
        plain, kernels = place.run(
            steps.with_and_without_kernels, [*SIZES.split(), *flags.split()], STEPS
        )
    assert len(plain) == len(kernels) == STEPS
    assert len({step.loss for step in plain}) == STEPS  # it trains
    for got, want in zip(kernels, plain, strict=True):
        assert got.loss == pytest.approx(want.loss, rel=tolerance)
        assert got.gradient_norm == pytest.approx(want.gradient_norm, rel=tolerance)
        # Rounding may move a token's probabilities over the threshold.
        assert got.experts == pytest.approx(want.experts, rel=1e-2)
        assert got.threshold == pytest.approx(want.threshold, rel=1e-2)
