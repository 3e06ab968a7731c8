"""The mistakes that are planted, each with the tests that have to catch it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        name: its name on the command line.
        mistake: what is wrong, for people.
        file: the file under megatron_dynmoe/ that gets the mistake.
        right: text that is in the file exactly once.
        wrong: the text that replaces it.
        tests: arguments of pytest.
    """

    name: str
    mistake: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]

    def fits(self, source: str) -> bool:
        return source.count(self.right) == 1

    def plant(self, source: str) -> str:
        return source.replace(self.right, self.wrong)


PI_MAP, DRAWN = "tests/control/test_pi_map.py", "tests/distributed/test_drawn_target.py"
PI, ROUTER = "tests/control/test_pi.py", "tests/moe/test_router.py"
SELECT, LOSSES = "tests/routing/test_select.py", "tests/routing/test_losses.py"
GRADIENTS, METRICS = "tests/routing/test_gradients.py", "tests/runs/test_metrics.py"
CONTROL, DISPATCH = "tests/distributed/test_control.py", "tests/distributed/test_dispatch.py"
INVARIANCE = "tests/distributed/test_invariance.py"
ROWS = "tests/moe/test_row_buffer.py"
ROOM = "tests/distributed/test_row_buffer.py::test_not_a_bit_depends_on_the_room"
APART = "tests/distributed/test_documents.py"
LATENT = "tests/distributed/test_latent_attention.py"
BUSIEST = "tests/distributed/test_busiest_rank.py"
CONTEXT = "tests/distributed/test_context_parallel.py"
TE = "tests/backends/test_transformer_engine.py"
EVALUATION = "tests/use/test_evaluate_checkpoint.py"
BUDGET, USED = "tests/huggingface/test_budgets.py", "tests/use/test_budgets.py"

CONTROLLER = [
    Mutation(
        "error_sign",
        "the error of the controller has the wrong sign",
        "control/pi.py",
        "(target - measured) / self.num_experts",
        "(measured - target) / self.num_experts",
        (f"{PI}::test_steps_by_hand",),
    ),
    Mutation(
        "mean_of_the_busiest_rank",
        "the mean is held where the busiest rank was asked for",
        "control/update.py",
        "measured = measured * statistics.rank_imbalance",
        "pass",
        (f"{BUSIEST}::test_the_target_is_that_of_the_busiest_rank[ep4]",),
    ),
    Mutation(
        "busiest_rank_over_all_dispatches",
        "the busiest rank is that of all dispatches together, though each of them waits",
        "routing/counters.py",
        "view(len(counters), -1)",
        "view(len(counters), -1).sum(1, keepdim=True)",
        (f"{BUSIEST}::test_the_busiest_rank_of_each_dispatch_is_counted[ep2_pp2]",),
    ),
    Mutation(
        "no_anti_windup",
        "the sum of the errors grows without bounds",
        "control/pi.py",
        "(integral + error).clamp(*self.integral_bounds)",
        "integral + error",
        (f"{PI}::test_saturated_threshold_leaves_its_bound_at_the_first_opposite_error",),
    ),
    Mutation(
        "not_finite_is_summed",
        "a measurement that is not finite enters the sum",
        "control/pi.py",
        "finite = error - error == 0",
        "finite = torch.ones_like(error, dtype=torch.bool)",
        (f"{PI}::test_no_token_counted_leaves_the_state",),
    ),
    Mutation(
        "integral_not_saved",
        "the controller's sum is not in the checkpoint",
        "moe/router.py",
        "self.register_buffer(name, first)",
        'self.register_buffer(name, first, persistent=name != "integral")',
        (f"{ROUTER}::test_the_state_dict_holds_what_training_needs_and_loads_without_rounding",),
    ),
    Mutation(
        "state_cast_to_bf16",
        "threshold and sum are cast to the model's dtype",
        "routing/counters.py",
        "new.dtype != old.dtype:",
        "False:",
        (f"{ROUTER}::test_state_keeps_dtype_and_value_when_the_model_is_cast",),
    ),
    Mutation(
        "commit_on_skipped_steps",
        "a step that the optimizer skips moves the threshold",
        "control/update.py",
        "if not self._commit_after(config.grad_scale_func):",
        "if True:",
        (f"{CONTROL}::test_a_skipped_step_counts_for_nothing[skipped]",),
    ),
    Mutation(
        "counts_reduced_over_the_wrong_group",
        "counts are added up over the pipeline, not over all ranks",
        "control/update.py",
        "torch.distributed.all_reduce(packed)",
        "from megatron.core import mpu\n\n    torch.distributed.all_reduce(\n"
        "        packed, group=mpu.get_pipeline_model_parallel_group()\n    )",
        ("tests/distributed/test_layouts.py::test_data_parallel_equals_one_rank",),
    ),
    Mutation(
        "counters_not_cleared",
        "a batch's counts stay in the next one's",
        "control/update.py",
        "clear(counters)",
        "pass",
        (f"{CONTROL}::test_the_target_follows_its_schedule",),
    ),
    Mutation(
        "schedule_one_step_late",
        "the target is that of the step before",
        "control/update.py",
        ".at(finished_iterations())",
        ".at(max(finished_iterations() - 1, 0))",
        (f"{CONTROL}::test_the_target_follows_its_schedule",),
    ),
    Mutation(
        "errors_shared_by_weights_alone",
        "halfway between two knots only half of an error is taken away",
        "control/pi_map.py",
        "size = (1 - way) ** 2 + way**2",
        "size = 1.0",
        (f"{PI_MAP}::test_the_shares_take_away_a_whole_error_at_the_target_itself",),
    ),
    Mutation(
        "map_may_fall",
        "a map is written as it is, in order or not",
        "control/pi_map.py",
        "self.direction * ordered(self.direction * map_SK, 1 / law.integral_gain)",
        "map_SK",
        (f"{PI_MAP}::test_the_map_never_falls_and_stays_in_its_bounds",),
    ),
    Mutation(
        "draws_of_a_generator",
        "targets depend on how many were drawn before",
        "settings/distribution.py",
        'random.Random(f"target experts per token, seed {seed}, block {block}")',
        "random.SystemRandom()",
        ("tests/settings/test_distribution.py::test_draws_depend_on_seed_and_step_alone",),
    ),
    Mutation(
        "map_read_for_the_last_target",
        "a batch is routed with the threshold of the target before",
        "moe/router.py",
        "self.drawn.place(self.drawn.at(iteration))",
        "self.drawn.place(self.drawn.at(max(iteration - 1, 0)))",
        (f"{DRAWN}::test_after_a_skipped_step_the_next_target_is_read_from_the_same_map",),
    ),
    Mutation(
        "map_read_once",
        "after the first batch the threshold stays, whatever the target",
        "moe/router.py",
        "if iteration != self._drawn_for or self.in_force is None:",
        "if self.in_force is None:",
        (f"{DRAWN}::test_after_a_skipped_step_the_next_target_is_read_from_the_same_map",),
    ),
    Mutation(
        "map_of_another_range",
        "a map is taken for one of the new range as it is",
        "moe/router.py",
        "if torch.equal(loaded, self.knot_targets):",
        "if True:",
        ("tests/distributed/test_resume.py::test_a_map_goes_on_with_another_range",),
    ),
    Mutation(
        "plan_for_the_mean_target",
        "memory is planned for the mean of drawn targets",
        "planning/experts_per_token.py",
        'mean, source = target.targets[-1], "the target"',
        'mean, source = sum(target.targets) / len(target.targets), "the target"',
        ("tests/planning/test_counts.py::test_a_drawn_target_needs_room_for_the_largest",),
    ),
]

ROUTING = [
    Mutation(
        "at_the_threshold_enough",
        "a sum that only reaches the threshold stops the selection (< for <=)",
        "routing/select.py",
        "_sum_before(sorted_TE)[:, :most] <= limit",
        "_sum_before(sorted_TE)[:, :most] < limit",
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
        ("tests/distributed/test_torch_native.py::test_tensor_parallel_equals_one_rank"
         "[native_loaded_dtop_p_tp2]",),
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
    ),
]

DISPATCHING = [
    Mutation(
        "nominal_number_of_rows",
        "the all-to-all makes room for k rows a token, as upstream's does",
        "moe/dispatch.py",
        "self.num_out_tokens = routing_map.sum()",
        "self.num_out_tokens = len(routing_map) * self.config.moe_router_topk",
        ("tests/moe/test_row_buffer.py::test_as_many_rows_are_asked_for_as_are_routed",),
    ),
    Mutation(
        "rows_beyond_the_room",
        "rows that do not fit a buffer are listed beyond its end",
        "moe/dispatch.py",
        "routing_map, overflows = fit_rows(routing_map, room)",
        "overflows = fit_rows(routing_map, room)[1]",
        (f"{ROWS}::test_a_layer_that_needs_more_rows_than_there_is_room_for_says_so",),
    ),
    Mutation(
        "overflow_moves_the_controller",
        "counts of a step in which rows were left out move the controller",
        "control/update.py",
        "(statistics.not_finite + statistics.overflows).sum() != 0",
        "statistics.not_finite.sum() != 0",
        (f"{ROWS}::test_counts_of_an_overflowed_pass_move_nothing",),
    ),
    Mutation(
        "overflow_ignored",
        "a step in which rows were left out is not run again",
        "control/row_buffer.py",
        "        if full:\n",
        "        if not full:\n",
        (f"{ROOM}[overflows]",),
    ),
    Mutation(
        "random_state_not_taken_back",
        "a step that is run again goes on with the random numbers of its first run",
        "control/row_buffer.py",
        "            restore()\n",
        "",
        (f"{ROOM}[overflows]",),
    ),
    Mutation(
        "gradients_of_an_overflow_kept",
        "a step that is run again adds to the gradients of its first run",
        "control/row_buffer.py",
        "                chunk.zero_grad_buffer()\n",
        "                pass\n",
        (f"{ROOM}[overflows]",),
    ),
    Mutation(
        "split_sizes_swapped",
        "what an expert-parallel rank sends and what it receives are confused",
        "moe/dispatch.py",
        "tokens_per_local_expert = super().preprocess(routing_map)",
        "tokens_per_local_expert = super().preprocess(routing_map)\n"
        "        self.input_splits, self.output_splits = self.output_splits, self.input_splits",
        (f"{DISPATCH}::test_dispatch_and_combine_are_exact_for_every_map[alltoall_routed_ep2]",),
    ),
    Mutation(
        "rows_in_the_order_of_tokens",
        "rows are sent in the order of tokens, not of experts",
        "moe/permute.py",
        "by_expert = map_TE.t().reshape(-1)",
        "by_expert = map_TE.reshape(-1)",
        (f"{DISPATCH}::test_dispatch_and_combine_are_exact_for_every_map[alltoall_routed_ep1]",),
    ),
    Mutation(
        "gradient_of_no_rows_left_to_grouped_mm",
        "experts without rows keep the weight gradient that grouped_mm returns",
        "moe/experts.py",
        "return grad_rows, _zero_unused(grad_weight, unused_E), None, None",
        "return grad_rows, grad_weight, None, None",
        (
            "tests/moe/test_experts.py::"
            "test_an_expert_without_rows_gets_a_zero_gradient_whatever_grouped_mm_returns",
        ),
    ),
    Mutation(
        "late_chunks_not_put_in_order",
        "attention over a split sequence takes the late chunks in the order of the ranks",
        "backends/attention/context_parallel.py",
        "torch.cat([early, late.flip(0)]).flatten(0, 1)",
        "torch.cat([early, late]).flatten(0, 1)",
        (f"{CONTEXT}::test_a_split_sequence_trains_as_a_whole_one[cp2]",),
    ),
    Mutation(
        "experts_one_after_another",
        "without --moe-grouped-gemm Transformer Engine runs one expert after another",
        "backends/transformer_engine.py",
        "transformer.moe_grouped_gemm = bool(transformer.num_moe_experts)",
        "pass",
        (f"{TE}::test_experts_are_grouped_for_a_dynamic_routing[top_p]",),
    ),
    Mutation(
        "float32_split_by_transformer_engine",
        "a model in float32 whose sequences Transformer Engine cannot split is not refused",
        "backends/transformer_engine.py",
        "if transformer.params_dtype == torch.float32:",
        "if False:",
        (f"{TE}::test_a_sequence_that_it_cannot_split_is_refused[float32]",),
    ),
    Mutation(
        "activations_kept",
        "activations that are to be computed again are kept",
        "moe/recompute.py",
        "return _Again(compute) if id(saved) == left_out else saved",
        "return saved",
        ("tests/moe/test_recompute.py::test_less_is_kept_and_every_bit_is_the_same",),
    ),
    Mutation(
        "rows_of_other_tokens",
        "rows that are gathered again are those of shifted tokens",
        "moe/dispatch.py",
        "partial(rows_of, tokens_TD, self.row_order)",
        "partial(rows_of, tokens_TD.roll(1, 0), self.row_order)",
        ("tests/moe/test_recompute.py::test_less_is_kept_and_every_bit_is_the_same",),
    ),
    Mutation(
        "permutation_without_rows_not_refused",
        "a fused permutation that stops at a rank without rows is not refused",
        "backends/transformer_engine.py",
        "gathers and ranks > 1:",
        "gathers and ranks > 2:",
        (f"{TE}::test_what_its_experts_cannot_do_is_refused[permutation]",),
    ),
    Mutation(
        "norms_not_found_under_other_names",
        "the norm before experts is asked for by the running back end's name only",
        "checkpoints/other_backends.py",
        "value.key = next((name for name in _other_names(key) if name in stored), key)",
        "pass",
        (
            "tests/checkpoints/test_other_backends.py::test_a_norm_is_asked_for_as_the_checkpoint_names_it",
        ),
    ),
    Mutation(
        "adam_of_another_back_end_starts_at_step_0",
        "a run that goes on with another back end's Adam begins to count its steps again",
        "upstream/optimizer_state.py",
        "step = int(max(steps))",
        "step = 0",
        (
            "tests/upstream/test_optimizer_state.py::test_the_fourth_step_follows_from_three_of_any_adam",
        ),
    ),
    Mutation(
        "kernel_writes_no_sum_of_no_rows",
        "the combine's kernel leaves the result of a token without experts as it found it",
        "kernels/permute.py",
        "tl.store(sums_ptr + token * width + columns, total, mask=inside)",
        "tl.store(sums_ptr + token * width + columns, total, mask=inside & (end > start))",
        ("tests/gpu/test_experts.py::test_the_combine_adds_up_every_tokens_rows",),
    ),
    Mutation(
        "kernel_writes_no_gradient_of_no_rows",
        "the GEMM kernel leaves the weight gradient of an expert without rows as it found it",
        "kernels/grouped_gemm.py",
        "inside = (line < height) & (column < width)",
        "inside = (line < height) & (column < width) & (end > start)",
        (
            "tests/gpu/test_experts.py::"
            "test_experts_equal_products_one_by_one_and_without_rows_have_zero_gradients",
        ),
    ),
    Mutation(
        "flex_sends_the_largest_weights",
        "DeepEP gets the largest weights as stock Megatron takes them, not the experts of the map",
        "moe/flex.py",
        "ids_TE.topk(self.router_topk, largest=False).values",
        "probs_TE.topk(self.router_topk).indices",
        ("tests/moe/test_flex.py::test_ids_and_weights_are_those_of_the_map",),
    ),
]

WATCHING = [
    Mutation(
        "infinite_logits_unnoticed",
        "only NaN logits are noticed, infinite ones are routed",
        "kernels/routing_cpu.py",
        "(~logits_TE.isfinite().all(dim=-1)).sum()",
        "logits_TE.isnan().any(dim=-1).sum()",
        ("tests/routing/test_not_finite.py::test_each_such_token_counts_once",),
    ),
    Mutation(
        "only_the_first_rank_compared",
        "a rank whose state is larger than the first one's is not noticed",
        "control/agreement.py",
        "most_LQ = states_WLQ.amax(dim=0)",
        "most_LQ = states_WLQ[0].clone()",
        ("tests/control/test_agreement.py::test_one_bit_on_one_rank_is_found",),
    ),
    Mutation(
        "summary_of_the_last_tenth",
        "the summary's mean of the last 20 % of a run is that of the last 10 %",
        "runs/summary.py",
        "TAIL = 0.2",
        "TAIL = 0.1",
        ("tests/runs/test_summary.py::test_summary_and_curves_of_a_dtop_p_run",),
    ),
    Mutation(
        "group_size_left_out_of_losses",
        "with --calculate-per-token-loss the routing losses ignore the size of the group",
        "moe/router.py",
        "loss = loss * num_local_tokens * group.size()",
        "loss = loss * num_local_tokens",
        (
            "tests/distributed/test_resume.py::"
            "test_a_vocabulary_that_would_be_padded_otherwise_keeps_its_size",
        ),
    ),
    Mutation(
        "checksums_not_compared",
        "a checkpoint's file with a flipped bit is loaded",
        "storage/manifest.py",
        "if fingerprint(file, progress) != expected:",
        "if False:",
        ("tests/faults/test_checkpoint_files.py::test_every_flipped_bit_is_found",),
    ),
    Mutation(
        "ranks_begin_with_the_same_experts",
        "the experts of all expert-parallel ranks begin with the same weights",
        "upstream/wrappers.py",
        "seed + parallel_state.get_expert_model_parallel_rank()",
        "seed",
        ("tests/distributed/test_doctor.py::test_models_that_were_just_made_are_clean[0-pp2ep2]",),
    ),
    Mutation(
        "patches_of_a_cpu_everywhere",
        "a patch is applied to a process that does not need it",
        "upstream/patch.py",
        "if self.name in _applied or not self.applies():",
        "if self.name in _applied:",
        ("tests/upstream/test_patches.py::test_every_patch_that_applies_takes_effect",),
    ),
    Mutation(
        "a_dry_run_reads_without_waiting",
        "a dry run counts no wait if the host reads a number from the device",
        "dry_run/recording/recorder.py",
        'self.wait("item")',
        "pass",
        ("tests/dry_run/test_rehearsal.py::test_a_planted_item_is_found_and_named",),
    ),
    Mutation(
        "a_dry_run_overlooks_tensors_on_the_cpu",
        "a dry run finds no tensor of a step that was made on the CPU",
        "dry_run/recording/recorder.py",
        "self.off_device[self.moment, place, made] += 1",
        "pass",
        ("tests/dry_run/test_rehearsal.py::test_a_planted_tensor_on_the_cpu_is_found_and_named",),
    ),
    Mutation(
        "a_dry_run_forgets_the_optimizers_state",
        "the planner forgets the optimizer's state",
        "planning/memory.py",
        "return self.weights + self.gradients + self.optimizer",
        "return self.weights + self.gradients",
        ("tests/dry_run/test_rehearsal.py::test_the_planner_is_near",),
    ),
    Mutation(
        "a_dry_run_excuses_whole_functions",
        "a dry run excuses whatever a function makes on the CPU that may make something there",
        "dry_run/reporting/on_host.py",
        'return why if name in operations or made in operations else ""',
        "return why",
        ("tests/dry_run/test_rehearsal.py::test_a_planted_tensor_on_the_cpu_is_found_and_named",),
    ),
    Mutation(
        "a_plan_passes_what_no_training_takes",
        "the planner does not run the training's checks",
        "jobs/plan.py",
        "check_start(words, num_gpus, gpu)",
        "pass",
        ("tests/jobs/test_refusals.py::test_a_refused_plan_is_misuse_in_one_line",),
    ),
    Mutation(
        "copied_moments_are_overlooked",
        "the doctor does not compare the optimizer's moments of two experts",
        "doctor/checkpoint/checks/values.py",
        "part.kind == MOMENT and part.layer is not None",
        "False",
        ("tests/doctor/test_checkpoint.py::test_a_planted_fault_is_named",),
    ),
    Mutation(
        "two_copies_of_an_expert_are_none",
        "the doctor calls experts copies only if there are three of one kind",
        "doctor/checkpoint/checks/copies.py",
        "if len(group) > 1)",
        "if len(group) > 2)",
        ("tests/doctor/test_checkpoint.py::test_a_planted_fault_is_named",),
    ),
    Mutation(
        "rotation_not_turned_back",
        "the gradient of rotary positions on a CPU is rotated forward",
        "kernels/rope_cpu.py",
        "return (d_rotated * sin).roll(half, -1)",
        "return (d_rotated.roll(half, -1) * sin)",
        ("tests/kernels/test_rope_cpu.py::test_values_and_gradients_have_megatrons_bits",),
    ),
    Mutation(
        "rows_of_two_ranks_left_unsorted",
        "rows from several ranks go to the experts in the order of the ranks",
        "upstream/fewer_kernels.py",
        "order.tolist() == [*range(len(order))]",
        "len(order) > 0",
        ("tests/upstream/test_fewer_kernels.py::test_rows_are_sorted_only_if_they_are_not",),
    ),
    Mutation(
        "top_k_of_a_dynamic_checkpoint_unsaid",
        "a dynamic checkpoint is loaded into a top-k model without a word",
        "checkpoints/router_entries.py",
        "_MEASURED in there - wanted",
        "_MEASURED in wanted - there",
        (
            "tests/checkpoints/test_router_entries.py::"
            "test_a_dynamic_checkpoint_in_a_top_k_model_is_warned_of",
        ),
    ),
    Mutation(
        "latest_checkpoint_evaluated",
        "dynmoe evaluate --iteration reads the latest checkpoint",
        "cli/evaluate.py",
        "return checkpoint_folder(args.load, args.iteration)",
        "return checkpoint_folder(args.load, None)",
        (f"{EVALUATION}::test_another_iteration",),
    ),
    Mutation(
        "evaluated_without_begin_token",
        "an evaluation leaves the begin token out that the training had",
        "use/counting_lm.py",
        "encode = encode_prompt if add_special_tokens else encode_text",
        "encode = encode_text",
        (f"{EVALUATION}::test_the_model_reads_one_begin_token_and_no_end_token",),
    ),
    Mutation(
        "tokenizer_not_missed",
        "a checkpoint without a tokenizer is converted before that is said",
        "conversion/convert.py",
        "if tokenizer is None and target.needs_tokenizer:",
        "if tokenizer is None and not load.exists():",
        (f"{EVALUATION}::test_misuse_is_named_with_its_remedy",),
    ),
    Mutation(
        "padding_unsaid",
        "an engine that pads every token to all experts is not told so",
        "huggingface/modeling_dynmoe.py",
        "if serves_itself(config) and not str",
        "if not serves_itself(config) and not str",
        (
            "tests/huggingface/test_interfaces.py::"
            "test_an_engine_that_pads_without_a_cap_is_told_the_remedy",
        ),
    ),
]

ATTENTION = [
    Mutation(
        "documents_see_each_other",
        "documents that are to be kept apart are one",
        "backends/attention/documents.py",
        ".split(lengths.tolist())",
        ".split([int(lengths.sum())])",
        ("tests/backends/test_documents.py::test_attention_is_that_of_each_document",),
    ),
    Mutation(
        "stages_without_lengths",
        "stages between the first and the last do not know where documents begin",
        "training/forward.py",
        "if not (has_lengths or is_first_or_last_pipeline_stage(vp_stage)):",
        "if not is_first_or_last_pipeline_stage(vp_stage):",
        (f"{APART}::test_documents_stay_apart_under_every_layout[pp2]",),
    ),
    Mutation(
        "data_without_ends_taken",
        "documents are to be told apart in data that do not mark their ends",
        "training/datasets/token_files.py",
        "if check.state == WARNING:",
        "if check.state == WARNING and not by_eod:",
        ("tests/training/test_token_files.py::test_documents_without_an_end_cannot_be_told_apart",),
    ),
    Mutation(
        "latent_positions_not_summed",
        "the gradient of the keys' positions is not summed over tensor-parallel ranks",
        "backends/torch_native.py",
        "attention.module = LatentAttention",
        "attention.module = MLASelfAttention",
        (f"{LATENT}::test_tensor_parallel_ranks_train_it_as_one",),
    ),
    Mutation(
        "latent_values_cut",
        "padded values of latent attention keep the size of the keys",
        "backends/torch_native.py",
        "return context[..., :value_size].flatten(2)",
        "return context.flatten(2)",
        ("tests/backends/test_torch_native.py::test_heads_of_two_sizes_attend_as_in_local",),
    ),
]

UPCYCLE = "tests/conversion/test_upcycle.py::test_the_function_is_unchanged"
FOREIGN = "tests/conversion/test_foreign.py::test_ours_has_the_same_logits"

CONVERSION = [
    Mutation(
        "parts_not_scaled",
        "the parts of an upcycled copy have the weights of a whole one",
        "conversion/upcycle.py",
        'return made * parts if part == "expert_down" else made',
        "return made",
        (UPCYCLE,),
    ),
    Mutation(
        "parts_routed_apart",
        "the parts of an upcycled copy have rows of different copies in the router",
        "conversion/upcycle.py",
        ".repeat_interleave(parts, dim=0)",
        ".repeat(parts, 1)",
        (UPCYCLE,),
    ),
    Mutation(
        "parts_by_threshold",
        "copies that are cut into parts may be routed by a threshold",
        "conversion/upcycle.py",
        "if self.granularity > 1:",
        "if self.granularity > self.experts:",
        ("tests/conversion/test_upcycle.py::test_what_cannot_be_upcycled",),
    ),
    Mutation(
        "top_k_probabilities_always_normalized",
        "norm_topk_prob of a Qwen3-MoE is taken for true",
        "conversion/formats/qwen3_moe.py",
        'if theirs.get("norm_topk_prob", False) else "raw"',
        'if theirs.get("norm_topk_prob", True) else "raw"',
        ("tests/conversion/test_foreign.py::test_what_a_file_leaves_out",),
    ),
    Mutation(
        "sparse_step_from_the_first_layer",
        "every n-th layer of a Qwen3-MoE is counted from the first one on",
        "conversion/formats/qwen3_moe.py",
        "(layer + 1) % step == 0",
        "layer % step == 0",
        (FOREIGN,),
    ),
]

BUDGETS = [
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
]

MUTATIONS = [
    *CONTROLLER,
    *ROUTING,
    *LOSS,
    *DISPATCHING,
    *ATTENTION,
    *CONVERSION,
    *BUDGETS,
    *WATCHING,
]
