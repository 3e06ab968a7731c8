"""Mistakes in the thresholds of experts."""

from tests.mutations.mutation import Mutation

BINS = "tests/routing/rules/test_expert_threshold.py"
ROUTER = "tests/moe/test_expert_threshold.py"

MISTAKES = [
    Mutation(
        "on_the_threshold_taken",
        "an expert takes a token whose logit only reaches its threshold",
        "routing/rules/expert_threshold.py",
        "capped(logits_TE > thresholds_E,",
        "capped(logits_TE >= thresholds_E,",
        (f"{BINS}::test_a_logit_on_the_threshold_is_not_taken_and_ties_under_a_cap_go_by_index",),
    ),
    Mutation(
        "padding_in_the_bins",
        "the quantiles of an expert's logits are those of padding, too",
        "routing/rules/quantiles.py",
        "torch.ones_like(bins_TE) if valid_T is None else",
        "torch.ones_like(bins_TE) if True else",
        (f"{BINS}::test_counts_and_thresholds_are_those_of_plain_loops_in_any_layout",),
    ),
    Mutation(
        "average_of_another_share",
        "thresholds follow the controller's share only as slowly as their average moves",
        "routing/rules/quantiles.py",
        " + slope_E * (share - next_share)",
        "",
        (f"{BINS}::test_the_default_gains_hold_the_target_within_30_steps[a long average]",),
    ),
    Mutation(
        "bad_batch_moves_the_thresholds",
        "a batch with an infinite logit moves what the rule keeps",
        "control/update.py",
        "torch.where(is_invalid, before[name], new)",
        "new",
        (f"{ROUTER}::test_evaluation_recomputation_and_bad_batches_change_nothing",),
    ),
]
