"""Every row that is routed is sent, computed and returned, whatever the routing map: exactly."""

import itertools
import json

import pytest

from tests.distributed.harness import Case, CaseResult, Results, add

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

ENTRY = "tests.distributed.dispatch_cases:main"
CASES = {
    f"{dispatcher}_{shared}_ep{num_ranks}": add(
        Case(
            f"dispatch_{dispatcher}_{shared}_ep{num_ranks}",
            num_ranks,
            f"{dispatcher} {shared} ours",
            entry=ENTRY,
        )
    )
    for dispatcher, shared, num_ranks in itertools.product(
        ("alltoall", "allgather"), ("routed", "shared"), (1, 2, 4)
    )
}
STOCK = add(Case("dispatch_stock", 1, "alltoall routed stock", entry=ENTRY))


def printed(result: CaseResult, rank: int, word: str) -> str:
    lines = result.log(rank).splitlines()
    (line,) = (line for line in lines if line.startswith(f"{word} "))
    return line.removeprefix(f"{word} ")


def differences(result: CaseResult, rank: int) -> dict[str, dict[str, float]]:
    return json.loads(printed(result, rank, "DIFFERENCES"))


@pytest.mark.parametrize("name", CASES)
def test_dispatch_and_combine_are_exact_for_every_map(results: Results, name: str) -> None:
    result = results[CASES[name]]
    for rank in range(result.case.num_ranks):
        found = differences(result, rank)
        assert len(found) == 11
        wrong = {
            routing_map: by_kind for routing_map, by_kind in found.items() if any(by_kind.values())
        }
        assert not wrong, f"rank {rank}"


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("alltoall")])
def test_a_dispatch_waits_once_for_all_counts_together(results: Results, name: str) -> None:
    result = results[CASES[name]]
    for rank in range(result.case.num_ranks):
        assert printed(result, rank, "WAITS") == str(len(differences(result, rank)))


def test_stock_megatron_cannot_do_it(results: Results) -> None:
    """When this fails, upstream has learned it: VariableKAlltoAllTokenDispatcher can go."""
    found = differences(results[STOCK], 0)
    for routing_map in ("random", "every token to every expert", "all to one expert"):
        assert any(found[routing_map].values()), routing_map
