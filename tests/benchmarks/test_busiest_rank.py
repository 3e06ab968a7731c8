"""What `benchmarks/busiest_rank.py draw` computes from counts of tokens."""

import pytest
import torch

from benchmarks.busiest_rank import DRAWS, drawn


def test_equal_experts_make_equal_ranks():
    assert (drawn(torch.ones(2, 5, 64, dtype=torch.double), ranks=8, sequences=3) == 1).all()


def test_the_busiest_rank_is_that_of_its_experts_together():
    counts_LQE = torch.ones(2, 4, 64, dtype=torch.double)
    counts_LQE[1, :, 9] = 5  # on the second rank of 8, in the second layer
    found_DL = drawn(counts_LQE, ranks=8, sequences=2)
    assert found_DL.shape == (DRAWS, 2)
    assert found_DL[:, 0].tolist() == [1] * DRAWS
    assert found_DL[:, 1].tolist() == pytest.approx([(7 + 5) / ((64 + 4) / 8)] * DRAWS)


def test_sequences_that_differ_even_out_in_larger_batches():
    counts_LQE = torch.zeros(1, 64, 64, dtype=torch.double)
    counts_LQE[0].fill_diagonal_(1)  # each sequence has an expert of its own
    few, many = (drawn(counts_LQE, ranks=8, sequences=n).mean() for n in (1, 64))
    assert few > 1.5 > 1.3 > many > 1
