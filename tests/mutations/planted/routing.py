"""Mistakes in normalization, selection and weights."""

from tests.mutations.mutation import Mutation

ROUTER = "tests/moe/test_router.py"
SELECT = "tests/routing/test_select.py"
GRADIENTS = "tests/routing/test_gradients.py"
NULLS = "tests/routing/rules/test_null_experts.py"

MISTAKES = [
    Mutation(
        "at_the_threshold_enough",
        "a sum that only reaches the threshold stops the selection (< for <=)",
        "routing/select.py",
        "sums_TE[:, : most - 1] <= limit",
        "sums_TE[:, : most - 1] < limit",
        (f"{SELECT}::test_a_sum_that_only_reaches_the_threshold_does_not_stop",),
    ),
    Mutation(
        "one_token_threshold_only_reached",
        "for one token alone a sum that only reaches the threshold stops the selection",
        "kernels/choose_cpu.py",
        "total <= limit",
        "total < limit",
        ("tests/kernels/test_choose_cpu.py::test_of_one_token_alone_in_plain_numbers",),
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
        (
            "tests/kernels/test_routing_cpu.py::test_the_selection_is_exact_with_ties_and_boundaries",
        ),
    ),
    Mutation(
        "kernels_not_switched_off",
        "DYNMOE_KERNELS=0 does not train through the readable lines",
        "kernels/__init__.py",
        'if is_plain_cpu(logits_TE) and asked_for() != "0":',
        "if is_plain_cpu(logits_TE):",
        ("tests/kernels/test_routing_cpu.py::test_the_environment_chooses",),
    ),
    Mutation(
        "quick_choice_not_switched_off",
        "with DYNMOE_KERNELS=0 a CPU still chooses in its own way in inference",
        "kernels/choose_cpu.py",
        'if torch.compiler.is_compiling() or os.environ.get("DYNMOE_KERNELS") == "0":',
        "if torch.compiler.is_compiling():",
        ("tests/kernels/test_choose_cpu.py::test_where_values_may_not_decide_the_rule_does",),
    ),
    Mutation(
        "ties_by_the_highest_index",
        "of equal probabilities the last expert is chosen, not the first",
        "routing/select.py",
        "return probs_TE.sort(dim=-1, descending=True, stable=True)",
        "values, order = probs_TE.flip(-1).sort(dim=-1, descending=True, stable=True); "
        "return values, probs_TE.shape[-1] - 1 - order",
        (f"{SELECT}::test_whole_tensors_equal_a_stable_sort_with_ties_and_boundaries",),
    ),
    Mutation(
        "quick_sort_of_anything",
        "the quick sort of a CPU is taken although a token has NaN or a tie",
        "kernels/choose_cpu.py",
        "falls = (sorted_TE[:, 1:] < sorted_TE[:, :-1]).all()",
        "falls = True",
        ("tests/kernels/test_choose_cpu.py::test_of_many_tokens",),
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
        (
            "tests/distributed/test_torch_native.py::test_tensor_parallel_equals_one_rank"
            "[native_loaded_dtop_p_tp2]",
        ),
    ),
    Mutation(
        "bias_of_null_slots_in_the_weights",
        "the bias of the null slots changes weights, not the choice alone",
        "routing/rules/null_experts.py",
        "shift_L[-1] = math.log(null_slots)",
        "shift_L[-1] = math.log(null_slots) + float(bias)",
        (f"{NULLS}::test_weights_counts_sums_and_gradients_are_those_of_every_slot_in_a_loop",),
    ),
    Mutation(
        "null_slot_before_an_expert",
        "at equal logits a null slot goes before an expert",
        "routing/rules/null_experts.py",
        "(logits_TE >= null_T1) & ~is_nan_T1",
        "(logits_TE > null_T1) & ~is_nan_T1",
        (
            f"{NULLS}::test_tokens_without_experts_with_ties_and_with_nan_have_defined_weights_"
            "and_gradients",
        ),
    ),
    Mutation(
        "null_bias_by_layer_under_one_share",
        "layers with one share of null experts have a bias each",
        "control/update.py",
        'self.rule.pools and self.dynmoe.scope == "global"',
        'self.rule.pools and self.dynmoe.scope == "layer"',
        (
            "tests/moe/test_null_experts.py::test_the_bias_is_the_quantile_of_the_tokens_that_share_it",
        ),
    ),
    Mutation(
        "null_share_of_slots_for_that_of_experts",
        "the bias of the null slots leaves the share of the slots that is meant for experts",
        "moe/rules/null_experts.py",
        "self.num_experts / self.slots)",
        "1.0)",
        (
            "tests/moe/test_null_experts.py::test_the_bias_is_the_quantile_of_the_tokens_that_share_it",
        ),
    ),
    Mutation(
        "null_logit_lowers_the_balance_loss",
        "the balance loss sees probabilities that the null slots take a part of",
        "routing/rules/null_experts.py",
        "among_experts_TE = logits_TL[:, :-1].softmax(dim=-1)",
        "among_experts_TE = probs_TE + null_T1 / num_experts",
        (f"{NULLS}::test_the_balance_loss_cannot_be_lowered_by_the_null_logit",),
    ),
    Mutation(
        "copies_dropped",
        "the weight of a copied token is not in the layer's output",
        "moe/layer.py",
        "output = output + (self._tokens * weights_SB1).to(output.dtype)",
        "output = output + 0 * (self._tokens * weights_SB1).to(output.dtype)",
        (
            "tests/moe/test_null_experts.py::"
            "test_outputs_and_gradients_are_those_of_a_loop_over_tokens_and_slots",
        ),
    ),
]
