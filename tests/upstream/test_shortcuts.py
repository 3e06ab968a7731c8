"""Rows in order, or of one rank, are left as they are.

Rotations are in tests/kernels/test_rope_cpu.py.
"""

import pytest
import torch

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_rows_are_sorted_only_if_they_are_not(order: list[int]) -> None:
    from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs

    from megatron_dynmoe.upstream.shortcuts import sort_of_ranks

    def sort(*given):
        assert order != [0, 1, 2]
        return sort_chunks_by_idxs(*given[:3], probs=given[3], fused=given[4])

    rows, probs = torch.arange(12.0).view(6, 2), torch.arange(6.0)
    sizes = torch.tensor([3, 0, 3])
    expected = sort_chunks_by_idxs(rows, sizes, torch.tensor(order), probs=probs)
    sort_rows = sort_of_ranks(
        lambda rows, sizes, order, probs, fused: sort(rows, sizes, order, probs, fused)
    )
    found = sort_rows(rows, sizes, torch.tensor(order), probs=probs)
    assert all(map(torch.equal, found, expected))
    assert sort_rows(rows, sizes, torch.tensor(order))[1] is None


@pytest.mark.parametrize("size", [1, 2])
def test_rows_are_sent_only_if_there_is_another_rank(size: int) -> None:
    from megatron_dynmoe.upstream.shortcuts import sending

    class Group:
        def size(self) -> int:
            return size

    rows, sent = torch.arange(6.0), torch.arange(3.0)
    given = []

    def exchange(*values, **options):
        given.append((*values, options))
        return sent

    found = sending(exchange)(group := Group(), rows, [3], [6], use_nccl_stream=True)
    assert found is (rows if size == 1 else sent)
    assert given == ([] if size == 1 else [(group, rows, [3], [6], {"use_nccl_stream": True})])
