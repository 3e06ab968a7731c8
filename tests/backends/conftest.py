"""Megatron in one process, for every test here."""

import pytest

from tests.moe import one_rank


@pytest.fixture(autouse=True)
def megatron():
    one_rank.world_of_one()
    yield
    one_rank.forget_global_state()
