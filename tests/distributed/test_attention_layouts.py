"""More layouts of documents kept apart, and of latent attention, through Megatron's loop."""

import pytest

from tests.distributed import test_documents as documents
from tests.distributed import test_latent_attention as latent
from tests.distributed.agreement import assert_same_gradients, assert_same_training
from tests.distributed.harness import Case, Results, add

pytestmark = [pytest.mark.distributed, pytest.mark.megatron, pytest.mark.long]

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
LOCAL = "--moe-dynamic-backend local"
LEARNED = "--position-embedding-type learned_absolute"

# The same seed gives the same weights.
MASKED = add(documents.case("learned_local", 1, f"{LEARNED} {LOCAL}"))
ALIKE = [
    (documents.NATIVE, add(documents.loaded("tp2", 2, TP2))),
    # Two of four stages lie between the first and the last.
    (documents.NATIVE, add(documents.loaded("pp4", 4, "--pipeline-model-parallel-size 4"))),
    (MASKED, add(documents.case("learned_native", 1, LEARNED))),
    (latent.ONE, add(latent.loaded("cp2_ep2", 2, documents.CP2))),
]


@pytest.mark.parametrize(("one", "other"), ALIKE, ids=lambda case: case.name)
def test_they_train_alike(results: Results, one: Case, other: Case) -> None:
    assert_same_training(results[one], results[other])
    assert_same_gradients(results[one], results[other], tolerance=2e-5)
