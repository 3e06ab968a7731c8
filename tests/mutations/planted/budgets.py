"""Mistakes in budgets of exported models."""

from tests.mutations.mutation import Mutation

BUDGET = "tests/huggingface/test_budgets.py"
USED = "tests/use/test_budgets.py"

MISTAKES = [
    Mutation(
        "budget_of_another_sequence",
        "the budgets of a batch go round among its sequences",
        "huggingface/budgets_dynmoe.py",
        "return values_B.repeat_interleave(length)",
        "return values_B.repeat(length)",
        (f"{BUDGET}::test_each_sequence_of_a_batch_is_as_if_alone_with_its_threshold[list]",),
    ),
    Mutation(
        "budget_of_generation_unread",
        "what a generation's config asks for is left out",
        "huggingface/budgets_dynmoe.py",
        'inputs["experts_per_token"] = _in_generation_config(config)',
        'inputs["experts_per_token"] = None',
        (f"{BUDGET}::test_generation_with_a_budget_for_each_sequence",),
    ),
    Mutation(
        "budget_between_points",
        "a budget between two points has the lower one's threshold",
        "huggingface/budgets_dynmoe.py",
        "share = (budget - low) / (high - low)",
        "share = (budget - low) // (high - low)",
        (f"{BUDGET}::test_one_budget_for_all[2.5]",),
    ),
    Mutation(
        "budget_in_training",
        "a budget for inference steers the training, too",
        "huggingface/configuration_dynmoe.py",
        'None if training else given["inference_experts_per_token"]',
        'given["inference_experts_per_token"]',
        (f"{BUDGET}::test_a_threshold_by_layer_and_one_for_inference_give_way",),
    ),
    Mutation(
        "curve_of_another_cap",
        "a curve that was measured without the new cap is kept",
        "use/calibrate.py",
        "elif cap is not None:",
        "elif cap == 0:",
        (f"{USED}::test_another_cap_ends_a_curve_that_was_measured_without_it",),
    ),
    Mutation(
        "curve_not_refined",
        "whatever the middle of two points gives is close enough",
        "use/budgets.py",
        "<= CLOSE_ENOUGH * middle:",
        "<= middle:",
        (f"{USED}::test_between_the_points_the_count_is_what_was_asked_for",),
    ),
    Mutation(
        "rough_curve_unsaid",
        "nothing is said of parts that all passes together did not reach",
        "use/budgets.py",
        "rough += sorted(parts)",
        "rough += []",
        (f"{USED}::test_what_the_passes_did_not_reach_is_said",),
    ),
]
