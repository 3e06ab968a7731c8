"""benchmarks/row_buffer.py: the room that a step needs, from the rows of its sequences."""

import pytest
import torch

from benchmarks.row_buffer import room_needed


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_fullest_micro_batch_is_held_against_the_mean_of_the_step_before(size):
    steps, layers, sequences = 5, 3, 4
    rows = torch.randint(50, 150, (steps, layers, sequences))
    wants = []
    for step in range(1, steps):
        needs = []
        for layer in range(layers):
            mean = sum(rows[step - 1, layer].tolist()) / sequences
            for first in range(0, sequences, size):
                needs.append(sum(rows[step, layer, first : first + size].tolist()) / size / mean)
        wants.append(max(needs))
    assert room_needed(rows, size).tolist() == pytest.approx(wants)
