"""``--moe-dynamic-row-buffer target``: with any margin, the bits of a run that counts its rows."""

from __future__ import annotations

import re

import pytest

from tests.distributed.harness import DTOP_P, TINY, Case, CaseResult, Results, add

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

# Dropout draws random numbers, and upstream's tracker adds up the z-loss of all micro-batches.
TRAIN = (
    f"{TINY} {DTOP_P} --moe-token-dispatcher-type alltoall --train-iters 4 --hidden-dropout 0.1 "
    "--moe-z-loss-coeff 1e-3"
)
TIGHT = "--moe-dynamic-row-buffer target --moe-dynamic-row-buffer-margin 0"
ROOMY = "--moe-dynamic-row-buffer target --moe-dynamic-row-buffer-margin 3"
VIRTUAL = (
    "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
    "--moe-dynamic-scope layer --rerun-mode disabled"
)
COUNTED = add(Case("rows_counted", flags=f"{TRAIN} --eval-interval 2 --eval-iters 1"))
FITS = add(Case("rows_fit", flags=f"{COUNTED.flags} {ROOMY}"))
OVERFLOWS = add(
    Case("rows_overflow", flags=f"{COUNTED.flags} {TIGHT} --save {{dir}}/rows --save-interval 2")
)
RESUMED = add(
    Case(
        "rows_resumed",
        flags=f"{COUNTED.flags} {TIGHT} --load {{dir}}/rows --ckpt-step 2",
        after=(OVERFLOWS,),
    )
)
COUNTED_PP2 = add(Case("rows_counted_pp2", 4, f"{TRAIN} {VIRTUAL}"))
OVERFLOWS_PP2 = add(Case("rows_overflow_pp2", 4, f"{TRAIN} {VIRTUAL} {TIGHT}"))


def overflowed(result: CaseResult) -> int:
    """How many steps say that they were run again."""
    said = re.findall(
        r"more rows than room in layers? [\d, ]+: .* (\d+) of \d+ steps", result.log(0)
    )
    assert said == [str(number) for number in range(1, len(said) + 1)]
    return len(said)


def reported(result: CaseResult) -> list[str]:
    """What the log says of losses, counts and the validation, without times."""
    lines = [
        line for line in result.log().splitlines() if re.search(r"lm loss|validation experts", line)
    ]
    return [re.sub(r"elapsed time.*?\||(tokens|TFLOP)/s.*|\[.*?\]", "", line) for line in lines]


@pytest.mark.parametrize(
    ("case", "wants", "since"),
    [
        pytest.param(FITS, COUNTED, 0, id="fits"),
        pytest.param(OVERFLOWS, COUNTED, 0, id="overflows"),
        pytest.param(RESUMED, COUNTED, 2, id="resumed"),
        pytest.param(OVERFLOWS_PP2, COUNTED_PP2, 0, id="pp2_dp2"),
    ],
)
def test_not_a_bit_depends_on_the_room(
    results: Results, case: Case, wants: Case, since: int
) -> None:
    result, want = results[case], results[wants]
    if case is FITS:
        assert overflowed(result) == 0
    else:
        assert 0 < overflowed(result) < 4 - since, "the first step of a process counts its rows"
    for rank, rank_wants in zip(result.ranks, want.ranks, strict=True):
        assert rank["steps"] == rank_wants["steps"][since:]
    if not since:
        assert reported(result) == reported(want) != []


def test_what_an_overflowed_pass_counted_is_replaced(results: Results) -> None:
    """Also that of other ranks, whose buffers did not overflow: all of them run again."""
    want = results[COUNTED_PP2].finalized
    batches = results[OVERFLOWS_PP2].finalized
    kept = [batch for batch in batches if not any(batch["overflows"])]
    assert kept == want
    assert len(batches) - len(kept) == overflowed(results[OVERFLOWS_PP2])
