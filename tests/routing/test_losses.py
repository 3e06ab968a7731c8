"""The two losses, against equations 5 to 8 of Dynamic MoE as loops."""

import math

import pytest
import torch

from megatron_dynmoe.routing.losses import (
    count_tokens,
    dynamic_loss,
    fractions,
    load_balance_loss,
    sum_by_sequence,
    sum_entropy,
)
from megatron_dynmoe.routing.select import select
from tests.oracles import routing as oracle

S, B, E = 12, 3, 5  # positions, sequences, experts


def random_routing(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [S * B, E] float64 and a map with a varying number of experts."""
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(S * B, E, generator=generator, dtype=torch.float64)).softmax(-1)
    return probs, select(probs, 0.7)


def random_valid(seed: int = 1) -> torch.Tensor:
    """[S * B], about two thirds True; the last sequence ends early, as with real padding."""
    valid_SB = torch.rand(S, B, generator=torch.Generator().manual_seed(seed)) < 0.66
    valid_SB[5:, -1] = False
    return valid_SB.reshape(-1)


def balance(probs, routing_map, num_sequences=B, valid=None):
    tokens, _ = count_tokens(routing_map, num_sequences, valid)
    f = fractions(sum_by_sequence(routing_map, num_sequences, valid), tokens, probs.dtype)
    return load_balance_loss(sum_by_sequence(probs, num_sequences, valid), f, tokens)


def dynamic(probs, valid=None, tokens=None):
    tokens = count_tokens(probs, 1, valid)[1] if tokens is None else tokens
    return dynamic_loss(sum_entropy(probs, valid), tokens)


def sequences(tensor: torch.Tensor, num_sequences: int = B) -> list[torch.Tensor]:
    """Tokens of each sequence; token t is position t // B of sequence t % B."""
    return [tensor[b::num_sequences] for b in range(num_sequences)]


def looped_balance(probs, routing_map, valid=None) -> float:
    valid = torch.ones(len(probs), dtype=torch.bool) if valid is None else valid
    losses = []
    for row, chosen, keep in zip(*map(sequences, (probs, routing_map, valid)), strict=True):
        if keep.any():
            choices = oracle.choices_of(chosen[keep])
            losses.append(oracle.load_balance_loss(row[keep].tolist(), choices))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_balance_loss_follows_the_loops(seed, padded):
    probs, routing_map = random_routing(seed)
    valid = random_valid(seed) if padded else None
    want = looped_balance(probs, routing_map, valid)
    assert balance(probs, routing_map, valid=valid).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_dynamic_loss_follows_the_loops(seed, padded):
    probs, _ = random_routing(seed)
    valid = random_valid(seed) if padded else None
    rows = probs[valid] if padded else probs
    want = oracle.dynamic_loss(rows.tolist())
    assert dynamic(probs, valid).item() == pytest.approx(want, rel=1e-12)


def test_balance_loss_by_hand():
    """Two tokens, two experts: f = (1, 1/2), Q = (0.7, 0.3), 2 * (0.7 + 0.15) = 1.7."""
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    routing_map = torch.tensor([[True, False], [True, True]])
    assert balance(probs, routing_map, num_sequences=1).item() == pytest.approx(1.7)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_balanced_router_of_k_experts_has_a_balance_loss_of_k(k):
    experts = 8
    first = torch.arange(16).unsqueeze(-1) // 2  # two sequences, 8 tokens each
    routing_map = torch.zeros(16, experts, dtype=torch.bool)
    routing_map.scatter_(-1, (first + torch.arange(k)) % experts, True)
    probs = routing_map.double() / k
    assert balance(probs, routing_map, num_sequences=2).item() == pytest.approx(k)


def test_micro_batches_average_to_the_whole_batch():
    """Equations 7 and 8 are per sequence, so that the micro-batch's size is without effect."""
    probs, routing_map = random_routing()
    micro = [
        balance(p, m, num_sequences=1)
        for p, m in zip(sequences(probs), sequences(routing_map), strict=True)
    ]
    torch.testing.assert_close(torch.stack(micro).mean(), balance(probs, routing_map))
    entropies = [dynamic(p) for p in sequences(probs)]
    torch.testing.assert_close(torch.stack(entropies).mean(), dynamic(probs))


def test_padding_is_as_if_the_tokens_were_not_there():
    probs, routing_map = random_routing()
    valid_SB = torch.ones(S, B, dtype=torch.bool)
    valid_SB[8:] = False
    valid = valid_SB.view(-1)
    kept = 8 * B
    got = balance(probs, routing_map, valid=valid)
    torch.testing.assert_close(got, balance(probs[:kept], routing_map[:kept]))
    torch.testing.assert_close(dynamic(probs, valid), dynamic(probs[:kept]))


def test_padding_gets_no_gradient():
    probs, routing_map = random_routing()
    probs.requires_grad_()
    valid = random_valid()
    loss = balance(probs, routing_map, valid=valid) + dynamic(probs, valid)
    loss.backward()
    assert (probs.grad[~valid] == 0).all()
    assert (probs.grad[valid] != 0).any(dim=-1).all()


def test_a_sequence_of_padding_does_not_count():
    probs, routing_map = random_routing()
    valid_SB = torch.ones(S, B, dtype=torch.bool)
    valid_SB[:, 1] = False
    others = torch.stack([*sequences(probs)[::2]], dim=1).view(-1, E)
    chosen = torch.stack([*sequences(routing_map)[::2]], dim=1).view(-1, E)
    torch.testing.assert_close(
        balance(probs, routing_map, valid=valid_SB.view(-1)),
        balance(others, chosen, num_sequences=2),
    )


def test_nothing_but_padding_gives_zero():
    probs, routing_map = random_routing()
    none = torch.zeros(S * B, dtype=torch.bool)
    assert balance(probs, routing_map, valid=none) == 0
    assert dynamic(probs, none) == 0


@pytest.mark.parametrize("padded", [False, True])
def test_the_parts_of_a_split_sequence_add_up(padded):
    """As under tensor and context parallelism: positions on two ranks, counts of the whole."""
    probs, routing_map = random_routing()
    valid = random_valid() if padded else torch.ones(S * B, dtype=torch.bool)
    tokens, total = count_tokens(routing_map, B, valid)
    f = fractions(sum_by_sequence(routing_map, B, valid), tokens, probs.dtype)
    cut = 5 * B
    parts = [(probs[:cut], valid[:cut]), (probs[cut:], valid[cut:])]
    shares = [load_balance_loss(sum_by_sequence(p, B, v), f, tokens) for p, v in parts]
    torch.testing.assert_close(sum(shares), balance(probs, routing_map, valid=valid))
    shares = [dynamic(p, v, total) for p, v in parts]
    torch.testing.assert_close(sum(shares), dynamic(probs, valid))


def test_counts_are_per_sequence_and_without_padding():
    _, routing_map = random_routing()
    valid = random_valid()
    tokens, total = count_tokens(routing_map, B, valid)
    assert total == valid.sum()
    assignments = sum_by_sequence(routing_map, B, valid)
    assert assignments.dtype == tokens.dtype == torch.int64
    for b, (chosen, keep) in enumerate(zip(*map(sequences, (routing_map, valid)), strict=True)):
        assert tokens[b] == keep.sum()
        assert assignments[b].tolist() == [
            sum(e in choice for choice in oracle.choices_of(chosen[keep])) for e in range(E)
        ]


@pytest.mark.parametrize("num_experts", [1, 2, 16, 512])
def test_entropy_of_uniform_rows_is_the_logarithm_of_the_number_of_experts(num_experts):
    probs = torch.full((3, num_experts), 1 / num_experts)
    assert dynamic(probs).item() == pytest.approx(math.log(num_experts), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_hot_rows_have_no_entropy_and_a_finite_gradient(dtype):
    """Also if the softmax has underflowed to zero."""
    logits = torch.tensor([[0.0, 2000.0, -2000.0], [2000.0, 0.0, 0.0]], dtype=dtype)
    logits.requires_grad_()
    probs = logits.softmax(-1)
    assert (probs == 0).any()
    loss = dynamic(probs)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.isfinite().all()


def test_padding_that_is_none_and_no_padding_are_the_same():
    probs, routing_map = random_routing()
    nothing_padded = torch.ones(S * B, dtype=torch.bool)
    assert balance(probs, routing_map) == balance(probs, routing_map, valid=nothing_padded)
    assert dynamic(probs) == dynamic(probs, nothing_padded)
    assert count_tokens(probs, B, None) == (S, S * B)
