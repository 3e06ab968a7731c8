"""Mistakes in routing and its losses."""

from tests.mutations.mutation import Mutation

ROUTER = "tests/moe/test_router.py"
SELECT = "tests/routing/test_select.py"
LOSSES = "tests/routing/test_losses.py"
GRADIENTS = "tests/routing/test_gradients.py"
METRICS = "tests/runs/test_metrics.py"
INVARIANCE = "tests/distributed/test_invariance.py"

ROUTING = [
    Mutation(
        "at_the_threshold_enough",
        "a sum that only reaches the threshold stops the selection (< for <=)",
        "routing/select.py",
        "before_TE[:, :most] <= threshold_in_units",
        "before_TE[:, :most] < threshold_in_units",
        (f"{SELECT}::test_a_sum_that_only_reaches_the_threshold_does_not_stop",),
    ),
    Mutation(
        "one_token_threshold_only_reached",
        "for one token alone a sum that only reaches the threshold stops the selection",
        "routing/select.py",
        "total <= limit",
        "total < limit",
        (f"{SELECT}::test_one_token_is_chosen_as_among_many",),
    ),
    Mutation(
        "right_padding_at_zero",
        "the exported model puts text after padding on the right at position 1",
        "huggingface/modeling_dynmoe.py",
        "return positions.cummax(dim=-1).values if positions.dim() == 2 else positions",
        "return positions",
        (
            "tests/huggingface/test_interfaces.py::"
            "test_text_after_padding_on_the_right_goes_on_where_the_row_ended",
        ),
    ),
    Mutation(
        "fast_selection_differs",
        "the CPU's fast selection stops at a sum that only reaches the threshold",
        "kernels/routing_cpu.py",
        "wants_more_T = sums_T <= limit",
        "wants_more_T = sums_T < limit",
        ("tests/kernels/test_routing_cpu.py::test_the_selection_is_exact_with_ties_and_boundaries",),
    ),
    Mutation(
        "kernels_not_switched_off",
        "DYNMOE_KERNELS=0 does not train through the readable lines",
        "kernels/__init__.py",
        'if _is_plain_cpu(logits_TE) and asked_for() != "0":',
        "if _is_plain_cpu(logits_TE):",
        ("tests/kernels/test_routing_cpu.py::test_the_environment_chooses",),
    ),
    Mutation(
        "ties_by_the_highest_index",
        "of equal probabilities the last expert is chosen, not the first",
        "routing/select.py",
        "order_TE, before_TE = rank(probs_TE)",
        "order_TE, before_TE = rank(probs_TE.flip(-1)); order_TE = len(probs_TE[0]) - 1 - order_TE",
        (f"{SELECT}::test_whole_tensors_equal_a_stable_sort_with_ties_and_boundaries",),
    ),
    Mutation(
        "cap_off_by_one",
        "a token may use one expert more than the cap",
        "routing/select.py",
        "most = most_experts(probs_TE.shape[-1], max_experts)",
        "most = most_experts(probs_TE.shape[-1], max_experts) + 1",
        (f"{SELECT}::test_the_cap_cuts_and_changes_nothing_else",),
    ),
    Mutation(
        "no_renormalization",
        "the weights of DTop-p do not sum to 1",
        "kernels/routing_cpu.py",
        "weights /= weights.sum(dim=-1, keepdim=True)",
        "pass",
        (f"{GRADIENTS}::test_one_step_equals_its_parts_and_passes_gradcheck",),
    ),
    Mutation(
        "sample_variance",
        "normalized logits have a standard deviation of 1 by N - 1, not by N",
        "routing/normalize.py",
        "/ logits_TE.shape[-1]",
        "/ max(logits_TE.shape[-1] - 1, 1)",
        ("tests/routing/test_normalize.py::test_follows_the_loops",),
    ),
    Mutation(
        "normalization_not_differentiated",
        "gradients pass the normalization without its projection",
        "kernels/routing_cpu.py",
        "d_scaled.addcmul_(standard, projection_T1, value=-1 / num_experts)",
        "pass",
        (f"{GRADIENTS}::test_one_step_equals_its_parts_and_passes_gradcheck",),
    ),
    Mutation(
        "counted_twice_under_recompute",
        "both forward passes of recomputation count",
        "moe/router.py",
        "if self.training and torch.is_grad_enabled():",
        "if self.training:",
        (f"{ROUTER}::test_recomputation_counts_once_and_gives_the_same_gradients",),
    ),
    Mutation(
        "evaluation_counts_as_training",
        "evaluation moves the threshold",
        "moe/router.py",
        "self.evaluation_counters.add_counts(*counted)",
        "self.counters.add_counts(*counted)",
        (f"{ROUTER}::test_evaluation_is_counted_apart",),
    ),
    Mutation(
        "padding_counted",
        "padding counts as tokens",
        "routing/counters.py",
        "sums.tokens.add_(experts_T.numel() if valid_T is None else valid_T.sum())",
        "sums.tokens.add_(experts_T.numel())",
        (f"{ROUTER}::test_counts",),
    ),
    Mutation(
        "theta_not_marked_for_sequence_parallelism",
        "theta's gradient is not added up over tensor-parallel ranks",
        "moe/router.py",
        "self.theta_offset.sequence_parallel = config.sequence_parallel",
        "self.theta_offset.sequence_parallel = False",
        ("tests/distributed/test_torch_native.py::test_tensor_parallel_equals_one_rank"
         "[native_loaded_dtop_p_tp2]",),
        ("native_saved_dtop_p", "native_loaded_dtop_p_one_rank", "native_loaded_dtop_p_tp2"),
    ),
]  # fmt: skip

LOSS = [
    Mutation(
        "entropy_sign",
        "the dynamic loss rewards indecision",
        "kernels/routing_cpu.py",
        "entropy -= torch.dot(",
        "entropy += torch.dot(",
        (f"{GRADIENTS}::test_one_step_equals_its_parts_and_passes_gradcheck",),
    ),
    Mutation(
        "balance_loss_divided_by_k",
        "the balance loss is divided by the mean number of experts, as upstream's is",
        "routing/losses.py",
        "loss_B = fractions_BE.shape[-1] *",
        "loss_B = fractions_BE.shape[-1] / fractions_BE.sum(dim=-1).clamp(min=1e-9) *",
        (f"{LOSSES}::test_a_balanced_router_of_k_experts_has_a_balance_loss_of_k",),
    ),
    Mutation(
        "sequences_summed",
        "the balance losses of a micro-batch's sequences are summed, not averaged",
        "routing/losses.py",
        "return loss_B.sum() / (tokens_B > 0).sum().clamp(min=1)",
        "return loss_B.sum()",
        (f"{ROUTER}::test_the_sequence_loss_does_not_depend_on_the_micro_batch",),
    ),
    Mutation(
        "micro_batches_summed",
        "the reported balance loss grows with the number of micro-batches",
        "runs/metrics.py",
        "(pooled.balance_loss / pooled.micro_batches)",
        "pooled.balance_loss",
        (f"{METRICS}::test_summary_equals_numpy",),
    ),
    Mutation(
        "global_fractions_over_the_wrong_group",
        "the balance loss of the global batch sees this rank's tokens only",
        "moe/router.py",
        "torch.distributed.all_reduce(counted, group=self.tp_dp_cp_group)",
        "torch.distributed.all_reduce(counted, group=self.tp_cp_group)",
        (f"{INVARIANCE}::test_the_balance_loss_of_the_global_batch_spans_the_ranks",),
        ("invariance_saved", "invariance_global_one", "invariance_global_dp2"),
    ),
]
