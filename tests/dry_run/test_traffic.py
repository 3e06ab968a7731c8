"""Bytes that operations move, against sums by hand."""

import pytest
import torch

from megatron_dynmoe.dry_run.recording import traffic

aten = torch.ops.aten
ROWS, WIDTH = 6, 8
ALL = ROWS * WIDTH * 4


@pytest.fixture(autouse=True)
def meta_is_the_device(monkeypatch):
    """Another test of this process may have let the CPU stand in for CUDA."""
    monkeypatch.setattr(traffic.known, "is_on_device", lambda tensor: tensor.device.type == "meta")


def values(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def moved(operation, *args, **kwargs):
    return traffic.bytes_of(operation, args, kwargs, operation(*args, **kwargs))


def test_each_operand_and_the_result_count_once():
    left, right = values(ROWS, WIDTH), values(ROWS, WIDTH)
    assert moved(aten.mul.Tensor, left, right) == 3 * ALL
    assert moved(aten.add_.Tensor, left, right) == 3 * ALL
    assert moved(aten.sum.dim_IntList, left, [0]) == ALL + 4 * WIDTH
    assert moved(aten.mul.Tensor, left, torch.empty(())) == 2 * ALL  # a number of the host's


def test_what_is_only_written_is_not_read():
    target, source = values(ROWS, WIDTH), values(ROWS, WIDTH, dtype=torch.bfloat16)
    assert moved(aten.copy_.default, target, source) == ALL + ALL // 2
    assert moved(aten.zero_.default, target) == ALL
    assert moved(aten.fill_.Scalar, target, 1.0) == ALL


def test_values_that_expand_repeats_are_read_once():
    assert traffic.size_of(values(1, WIDTH).expand(ROWS, WIDTH)) == 4 * WIDTH
    assert traffic.size_of(values(()).expand(ROWS, WIDTH)) == 4
    assert traffic.size_of(values(0, WIDTH)) == 0


def test_a_gather_reads_what_it_takes():
    table, places = values(1000, WIDTH), values(ROWS, dtype=torch.int64)
    of_places = ROWS * 8
    assert moved(aten.index_select.default, table, 0, places) == 2 * ALL + of_places
    assert moved(aten.embedding.default, table, places) == 2 * ALL + of_places
    assert moved(aten.index.Tensor, table, [places]) == 2 * ALL + of_places
    few = values(2, WIDTH)
    assert moved(aten.index_select.default, few, 0, places) == 2 * WIDTH * 4 + of_places + ALL


def test_lists_that_are_changed_in_place_are_read_and_written():
    first, second = [values(ROWS, WIDTH) for _ in range(3)], [values(ROWS, WIDTH) for _ in range(3)]
    assert moved(aten._foreach_add_.List, first, second) == 3 * 3 * ALL
    assert moved(aten._foreach_mul_.Scalar, first, 2.0) == 3 * 2 * ALL


@pytest.mark.triton
@pytest.mark.parametrize("adds", [False, True])
def test_our_kernels_read_a_sum_only_if_they_add_to_it(adds):
    pytest.importorskip("triton")
    from megatron_dynmoe.kernels.grouped_gemm import multiply_all_rows

    left, right, total = values(ROWS, 2), values(ROWS, WIDTH), values(3, 2, WIDTH)
    ends = values(3, dtype=torch.int32)
    found = moved(multiply_all_rows.default, left, right, total, ends, None, None, adds)
    assert found == ROWS * 2 * 4 + ALL + 3 * 4 + (1 + adds) * 3 * 2 * WIDTH * 4


def test_a_kernel_of_several_operations_reads_only_what_is_not_its_own():
    within, outside = traffic.WithinKernel(), values(ROWS, WIDTH)
    made = outside * 2
    within.add([outside], [made])
    within.add([made, outside], [made + outside])
    view = outside.view(-1)
    within.add([outside], [view])
    within.add([view], [view * 2])
    assert within.num_bytes == ALL
