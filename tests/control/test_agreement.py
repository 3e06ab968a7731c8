"""The comparison of ranks, on states made by hand."""

import pytest
import torch

from megatron_dynmoe.control.agreement import ABSENT, QUANTITIES, first_disagreement

NUM_RANKS, NUM_LAYERS = 4, 3


def bits(value: float) -> int:
    return torch.tensor(value).view(torch.int32).item()


def agreeing() -> torch.Tensor:
    """Every rank holds layers 1 and 3; layer 2 is dense."""
    row = torch.tensor(
        [bits(value) for value in (0.4, -0.01, 0.41, 0.02, 1.25)] + [987654321, 12, 13]
    )
    states = row.expand(NUM_RANKS, NUM_LAYERS, -1).clone()
    states[:, 1] = ABSENT
    return states


@pytest.mark.parametrize("has_one_threshold", [False, True])
def test_equal_states_agree(has_one_threshold):
    states = agreeing()
    assert first_disagreement(states, has_one_threshold) is None
    states[:2, 2], states[2:, 0] = ABSENT, ABSENT  # two stages of a pipeline
    assert first_disagreement(states, has_one_threshold) is None
    states[..., 2:4] = ABSENT  # without a controller
    assert first_disagreement(states, has_one_threshold) is None
    assert first_disagreement(torch.full_like(states, ABSENT), has_one_threshold) is None


@pytest.mark.parametrize("has_one_threshold", [False, True])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("rank", range(NUM_RANKS))
@pytest.mark.parametrize("quantity", range(len(QUANTITIES)))
def test_one_bit_on_one_rank_is_found(quantity, rank, layer, has_one_threshold):
    states = agreeing()
    states[rank, layer, quantity] ^= 1
    found = first_disagreement(states, has_one_threshold)
    assert found.startswith(f"{QUANTITIES[quantity]} of layer {layer + 1} is ")
    assert f" on rank {rank}, and " in found


def test_values_are_told_with_all_their_digits():
    states = agreeing()
    states[2, 0, 0] = bits(0.40000004)
    assert first_disagreement(states, False) == (
        "threshold of layer 1 is 0.400000036 on rank 2, and 0.400000006 on other ranks"
    )


def test_layers_of_several_stages_are_compared_only_where_they_share_a_threshold():
    states = agreeing()
    states[:2, 2], states[2:, 0] = ABSENT, ABSENT
    states[2:, 2, 0] = bits(0.5)
    assert first_disagreement(states, has_one_threshold=False) is None
    found = first_disagreement(states, has_one_threshold=True)
    assert found == "threshold of layer 3 is 0.5 on rank 2, and 0.400000006 elsewhere"
    states = agreeing()
    states[:2, 2], states[2:, 0] = ABSENT, ABSENT
    states[2:, 2, 4] = bits(0.5)  # theta is each layer's own
    assert first_disagreement(states, has_one_threshold=True) is None


def test_nan_agrees_with_itself_and_with_nothing_else():
    states = agreeing()
    states[:, :, 4] = bits(float("nan"))
    states[:, 1] = ABSENT
    assert first_disagreement(states, True) is None
    states[3, 2, 4] = bits(1.25)
    assert first_disagreement(states, True).startswith(
        "theta of layer 3 is 1.25 on rank 3, and nan"
    )


def test_the_first_layer_comes_first():
    states = agreeing()
    states[1, 2, 0] += 1
    states[3, 0, 5] += 1
    assert " on rank 3, " in first_disagreement(states, False)
