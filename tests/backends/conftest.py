"""Megatron in one process, for every test here that is marked as one that imports it."""

from collections.abc import Iterator

import pytest

from tests.moe import one_rank


@pytest.fixture(autouse=True)
def megatron(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("megatron") is None:
        yield
        return
    one_rank.world_of_one()
    yield
    one_rank.forget_global_state()
