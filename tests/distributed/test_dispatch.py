"""Every row that is routed is sent, computed and returned, whatever the routing map: exactly."""

import itertools
import json

import pytest

from tests.distributed.harness import Case, CaseResult, Results, add
from tests.distributed.imbalance import workloads

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
        assert len(found) == 23
        wrong = {
            routing_map: by_kind for routing_map, by_kind in found.items() if any(by_kind.values())
        }
        assert not wrong, f"rank {rank}"


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("alltoall")])
def test_a_dispatch_waits_once_for_all_counts_together(results: Results, name: str) -> None:
    result = results[CASES[name]]
    for rank in range(result.case.num_ranks):
        assert printed(result, rank, "WAITS") == str(len(differences(result, rank)))


def test_the_workloads_are_what_they_are_called() -> None:
    """Tokens per expert of all ranks together: [4 ranks, 2 experts of each]."""
    maps = [workloads(rank, 4, 8) for rank in range(4)]
    loads = {name: sum(of_rank[name].sum(dim=0) for of_rank in maps) for name in maps[0]}
    by_rank = {name: load.view(4, 2).sum(dim=1) for name, load in loads.items()}
    assert len(loads["W0 balanced"].unique()) == 1
    for name, hot in (("W1 hot experts", [1, 4, 7]), ("W3 spread heat", [0, 2, 4, 6])):
        cold = [expert for expert in range(8) if expert not in hot]
        assert loads[name][hot].min() > 2 * loads[name][cold].max()
    assert by_rank["W2 hot rank"].argmax() == 0
    assert by_rank["W2 hot rank"][0] > 1.5 * by_rank["W2 hot rank"][1:].max()
    assert by_rank["W3 spread heat"].max() < 1.2 * by_rank["W3 spread heat"].min()
    sent = [int(of_rank["W4 ragged sources"].sum()) for of_rank in maps]
    assert sent[0] > 3 * max(sent[1:]) and len(set(sent[1:])) == 1
    assert by_rank["W5 ranks without tokens"][3] == 0 == loads["W5 ranks without tokens"][0]
    hottest = [int(loads[f"W6 rotating hot spot, step {step}"].argmax()) for step in range(3)]
    assert hottest == [0, 3, 6]
    assert [int(by_rank[f"W7 burst, step {step}"][0]) == 0 for step in range(3)] == [0, 1, 0]


def test_stock_megatron_cannot_do_it(results: Results) -> None:
    """When this fails, upstream has learned it: VariableKAlltoAllTokenDispatcher can go."""
    found = differences(results[STOCK], 0)
    for routing_map in ("random", "every token to every expert", "all to one expert"):
        assert any(found[routing_map].values()), routing_map
