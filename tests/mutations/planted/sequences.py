"""Mistakes in the choice of the tokens of a sequence that share a number of experts."""

from tests.mutations.mutation import Mutation

CHOICE = "tests/routing/rules/test_seq_top_k.py"
ROUTER = "tests/moe/test_seq_top_k.py"

MISTAKES = [
    Mutation(
        "one_more_than_the_budget",
        "a sequence gets one expert more than its budget",
        "routing/rules/seq_top_k.py",
        "places_N < budget_B1",
        "places_N <= budget_B1",
        (f"{CHOICE}::test_the_total_is_rounded_down",),
    ),
    Mutation(
        "padding_spends_the_budget",
        "padding has a part of the budget, and takes experts with it",
        "routing/rules/seq_top_k.py",
        "PADDING = -1.0",
        "PADDING = 0.0",
        (f"{ROUTER}::test_a_sequence_spends_its_budget_on_its_best_scores",),
    ),
    Mutation(
        "evaluation_looks_ahead",
        "an evaluation chooses the best scores of the whole sequence, as training does",
        "moe/rules/seq_top_k.py",
        "best if training else above",
        "best",
        (f"{ROUTER}::test_evaluation_does_not_look_ahead_and_training_does",),
    ),
    Mutation(
        "positions_in_the_order_of_ranks",
        "with context parallelism, ties are decided in the order of ranks, not of positions",
        "moe/rules/seq_top_k.py",
        "chunks = torch.cat([halves[:, 0], halves[:, 1].flip(0)])",
        "chunks = halves.flatten(0, 1)",
        (
            "tests/distributed/test_sequences.py::"
            "test_a_split_sequence_spends_its_budget_as_a_whole_one[sequences_tp2_cp2]",
        ),
    ),
]
