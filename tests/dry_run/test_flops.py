"""FLOPs of operations against sums by hand."""

import pytest
import torch

from megatron_dynmoe.dry_run.recording import flops

BATCH, HEADS, GROUPS, TOKENS, SIZE = 2, 8, 2, 64, 16
SQUARE = 2 * BATCH * HEADS * TOKENS * TOKENS * SIZE  # one product of queries and keys


def flops_of(operation, *args, **kwargs):
    out = kwargs.pop("out_val", torch.empty(BATCH, HEADS, TOKENS, SIZE, device="meta"))
    return flops.formula_of(operation.default)(*args, **kwargs, out_val=out)


def heads(number):
    return torch.empty(BATCH, number, TOKENS, SIZE, device="meta")


@pytest.mark.parametrize(("is_causal", "share"), [(True, 0.5), (False, 1)])
@pytest.mark.parametrize("groups", [GROUPS, HEADS])
def test_causal_attention_is_half_of_the_square_whatever_the_groups(is_causal, share, groups):
    query, key = heads(HEADS), heads(groups)
    forward = torch.ops.aten._scaled_dot_product_flash_attention
    assert flops_of(forward, query, key, key, 0.0, is_causal) == 2 * SQUARE * share
    assert flops_of(forward, query, key, key, 0.0, is_causal=is_causal) == 2 * SQUARE * share
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    rest = (query, None, None, None, TOKENS, TOKENS, 0.0, is_causal, None, None)
    # Two products of the forward pass again, of which it kept one, and two for each of them.
    gradients = (query, key, key)
    found = flops_of(backward, query, query, key, key, *rest, out_val=gradients)
    assert found == 5 * SQUARE * share


def test_attention_that_says_no_mask_is_not_causal():
    query = heads(HEADS)
    forward = torch.ops.aten._scaled_dot_product_flash_attention
    assert flops_of(forward, query, query, query) == 2 * SQUARE


def test_grouped_experts_are_their_rows_times_one_weight():
    rows, weights = torch.empty(10, 4, device="meta"), torch.empty(3, 4, 6, device="meta")
    assert flops_of(torch.ops.aten._grouped_mm, rows, weights) == 2 * 10 * 4 * 6
    left, right = torch.empty(6, 10, device="meta"), torch.empty(10, 4, device="meta")
    assert flops_of(torch.ops.aten._grouped_mm, left, right) == 2 * 6 * 10 * 4
