"""Transformer Engine's permutation of tokens, on maps with a varying number of experts."""

import pytest
import torch

MAP = torch.tensor(
    [[1, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool
)
EXPERT, TOKEN = MAP.t().nonzero(as_tuple=True)  # of each row
ROWS = len(TOKEN)
HIDDEN = 64


@pytest.fixture
def tokens(device):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(MAP), HIDDEN, generator=generator).to(device).requires_grad_()


@pytest.fixture
def weights(device):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(MAP.shape, generator=generator) + 0.1).to(device).requires_grad_()


@pytest.mark.parametrize("count", [ROWS, torch.tensor(ROWS)], ids=["number", "tensor"])
def test_rows_are_ordered_by_expert_then_token(te, device, tokens, weights, count):
    rows, permuted, _ = te.moe_permute_with_probs(tokens, weights, MAP.to(device), count)
    assert torch.equal(rows, tokens[TOKEN])
    assert torch.equal(permuted, weights[TOKEN, EXPERT])
    (rows.sum() + (permuted * torch.arange(ROWS, device=device)).sum()).backward()
    assert torch.equal(tokens.grad[:, 0].cpu(), MAP.sum(1).float())  # none for a token without
    expected = torch.zeros(MAP.shape)
    expected[TOKEN, EXPERT] = torch.arange(ROWS).float()
    assert torch.equal(weights.grad.cpu(), expected)


def test_what_was_permuted_is_summed(te, device, tokens):
    rows, row_map = te.moe_permute(tokens, MAP.to(device), ROWS)
    output = te.moe_unpermute(rows, row_map, restore_shape=tokens.shape)
    torch.testing.assert_close(output, tokens * MAP.sum(1, keepdim=True).to(device))
    output.sum().backward()
    torch.testing.assert_close(tokens.grad[:, 0].cpu(), MAP.sum(1).float())


def test_rows_are_summed_in_float32_from_the_last(te, device):
    """Of 1, 2^25 and -2^25 only some orders give 1."""
    one_token = torch.ones(1, 3, dtype=torch.bool, device=device)
    _, row_map = te.moe_permute(torch.ones(1, HIDDEN, device=device), one_token, 3)
    for order, expected in (((1.0, 2**25, -(2**25)), 1.0), ((2**25, -(2**25), 1.0), 0.0)):
        rows = torch.tensor(order, device=device).unsqueeze(1).expand(3, HIDDEN).contiguous()
        output = te.moe_unpermute(rows, row_map, restore_shape=torch.Size((1, HIDDEN)))
        assert output.eq(expected).all()


def test_a_row_of_weight_zero_is_taken_for_padding(te, device, tokens, weights):
    with torch.no_grad():
        weights[0, 1] = 0
    rows, _, _ = te.moe_permute_with_probs(tokens, weights, MAP.to(device), ROWS)
    padded = (TOKEN == 0) & (EXPERT == 1)
    assert rows[padded.to(device)].eq(0).all()
    assert rows[~padded.to(device)].ne(0).any(dim=1).all()


def test_there_has_to_be_a_row(te, device, tokens, weights):
    nothing = torch.zeros_like(MAP).to(device)
    with pytest.raises(AssertionError, match="requires num_out_tokens > 0"):
        te.moe_permute(tokens, nothing, 0)
    with pytest.raises(AssertionError, match="requires num_out_tokens > 0"):
        te.moe_permute_with_probs(tokens, weights, nothing, 0)


def test_a_rank_without_tokens_permutes_nothing(te, device):
    nothing = torch.zeros(0, HIDDEN, device=device)
    rows, row_map = te.moe_permute(nothing, torch.zeros(0, 4, dtype=torch.bool, device=device), 0)
    assert rows.shape == (0, HIDDEN)
    assert te.moe_unpermute(rows, row_map, restore_shape=nothing.shape).shape == (0, HIDDEN)


@pytest.mark.parametrize("sizes", [[2, 0, 3, 1], [0, 0, 6, 0], [0, 0, 0, 0]], ids=str)
def test_chunks_are_sorted(te, device, sizes):
    order = [2, 0, 3, 1]
    rows = torch.arange(float(sum(sizes))).unsqueeze(1).repeat(1, HIDDEN).to(device)
    probs = rows[:, 0] + 100
    rows.requires_grad_()
    sort = te.moe_sort_chunks_by_index_with_probs
    out, out_probs = sort(
        rows, probs, torch.tensor(sizes, device=device), torch.tensor(order, device=device)
    )
    expected = torch.cat([rows.split(sizes)[i] for i in order])
    assert torch.equal(out, expected) and torch.equal(out_probs, expected[:, 0] + 100)
    out.sum().backward()
    assert rows.grad.eq(1).all()


def test_top_k_routing(te, device):
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(device)
    probs, chosen = te.router.fused_topk_with_score_function(
        logits, 2, False, None, None, None, "softmax", None
    )
    top, index = logits.topk(2)
    assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, index, True))
    torch.testing.assert_close(probs.gather(1, index), top.softmax(-1))
    scores = logits.softmax(-1)
    _, all_scores = te.router.fused_compute_score_for_moe_aux_loss(logits, 2, "softmax")
    torch.testing.assert_close(all_scores, scores)
    counts = chosen.sum(0)
    loss = te.router.fused_moe_aux_loss(scores, counts, 7, 5, 2, 0.5)
    torch.testing.assert_close(loss, (scores.sum(0) * counts).sum() * 5 * 0.5 / (2 * 7 * 7))
