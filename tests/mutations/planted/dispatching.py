"""Mistakes in dispatch, experts and their rows."""

from tests.mutations.mutation import Mutation

DISPATCH = "tests/distributed/test_dispatch.py"
ROWS = "tests/moe/test_row_buffer.py"
ROOM = "tests/distributed/test_row_buffer.py::test_not_a_bit_depends_on_the_room"
CONTEXT = "tests/distributed/test_context_parallel.py"
TE = "tests/backends/test_transformer_engine.py"
FUSED = "tests/moe/test_fused.py"
FUSED_KERNEL = "tests/kernels/test_fused_experts.py"

MISTAKES = [
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
        "routing/counters.py",
        "_FIRST_OF_FAULTS : _FIRST_OF_FAULTS + 2].any(dim=-1)",
        "_FIRST_OF_FAULTS : _FIRST_OF_FAULTS + 1].any(dim=-1)",
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
        "moe/grouped_linear.py",
        "return grad_rows, _zero_unused(grad_weight, counts_E == 0), None, None",
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
        ("tests/gpu/test_experts.py::test_fused_experts_without_rows_have_zero_gradients",),
    ),
    Mutation(
        "gradients_added_and_left_to_the_hook",
        "a weight's gradient that is in Megatron's buffer already is added to it by the hook, too",
        "moe/grouped_linear.py",
        "parameter.grad_added_to_main_grad = True",
        "parameter.main_grad.mul_(2)",
        (
            f"{FUSED}::test_megatrons_own_buffer_gets_every_gradient_once",
            "tests/moe/test_experts.py::test_every_gradient_is_in_megatrons_own_buffer_once",
        ),
    ),
    Mutation(
        "tokens_taken_for_rows",
        "the gradient of the experts' second weight takes tokens' gradients as if they were rows",
        "moe/fused.py",
        "return multiply_by_rows(*operands)",
        "return multiply_by_rows(left, right, ends_E, None, right_row_R)",
        (f"{FUSED}::test_output_and_gradients_are_those_of_a_loop_over_tokens",),
    ),
    Mutation(
        "unweighted_gradients_of_fused_experts",
        "the gradients of gate and up leave out the rows' weights",
        "kernels/fused_experts.py",
        "d_weighted *= prob",
        "d_weighted *= 1.0",
        (f"{FUSED_KERNEL}::test_gradients_of_the_activation_are_those_of_float64",),
    ),
    Mutation(
        "every_tile_at_its_experts_first_row",
        "each tile of an expert begins at the expert's first row",
        "kernels/grouped_gemm.py",
        "first_row = (start + (tile - tiles_before) * TILE_ROWS).to(tl.int64)",
        "first_row = start.to(tl.int64)",
        ("tests/kernels/test_grouped_gemm.py::test_every_experts_rows_meet_its_weight",),
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
