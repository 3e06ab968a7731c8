"""A run that goes on with other data than its checkpoint says so, whatever the layout."""

import pytest

from tests.distributed.harness import DTOP_P, Case, Results, add
from tests.distributed.test_conversion import MODEL, REAL_TEXT, TEXT

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

RUN = f"{MODEL} {REAL_TEXT} {DTOP_P} --train-iters 4 --save-interval 2"
SAVED = add(Case("data_saved", 2, f"{RUN} --save {{dir}}/data_saved", after=(TEXT,)))


def resumed(name: str, flags: str) -> Case:
    load = "--load {dir}/data_saved --ckpt-step 2"
    return add(Case(f"data_{name}", 1, f"{RUN} {load} {flags}", after=(SAVED,)))


SAME = resumed("same", "")
OTHER = resumed("other", "--split 80,10,10 --seed 2")


def test_the_same_data_are_not_mentioned(results: Results) -> None:
    assert "> warning: " not in results[SAVED].log(0) + results[SAME].log(0)
    assert results[SAME].losses == pytest.approx(results[SAVED].losses[2:], rel=1e-5)


def test_other_data_are(results: Results) -> None:
    said = "this run has got other training documents and --seed 2 (it was 1234): it goes on from"
    assert said in results[OTHER].log(0)
    assert len(results[OTHER].losses) == 2
