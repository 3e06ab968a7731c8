"""Mistakes in the controller."""

from tests.mutations.mutation import Mutation

PI = "tests/control/test_pi.py"
ROUTER = "tests/moe/test_router.py"
CONTROL = "tests/distributed/test_control.py"

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
        "finite = error.isfinite()",
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
        ("skipped",),
    ),
    Mutation(
        "counts_reduced_over_the_wrong_group",
        "counts are added up over the pipeline, not over all ranks",
        "control/update.py",
        "torch.distributed.all_reduce(packed)",
        "from megatron.core import mpu\n\n    torch.distributed.all_reduce(\n"
        "        packed, group=mpu.get_pipeline_model_parallel_group()\n    )",
        ("tests/distributed/test_layouts.py::test_data_parallel_equals_one_rank",),
        ("one_rank", "dp2"),
    ),
    Mutation(
        "counters_not_cleared",
        "a batch's counts stay in the next one's",
        "control/update.py",
        "clear(counters)",
        "pass",
        (f"{CONTROL}::test_the_target_follows_its_schedule",),
        ("schedule",),
    ),
    Mutation(
        "schedule_one_step_late",
        "the target is that of the step before",
        "control/update.py",
        ".at(finished_iterations())",
        ".at(max(finished_iterations() - 1, 0))",
        (f"{CONTROL}::test_the_target_follows_its_schedule",),
        ("schedule",),
    ),
]
