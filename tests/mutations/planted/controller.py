"""Mistakes in the controller, what it measures and what it saves."""

from tests.mutations.mutation import Mutation

PI_MAP = "tests/control/test_pi_map.py"
DRAWN = "tests/distributed/test_drawn_target.py"
PI = "tests/control/test_pi.py"
ROUTER = "tests/moe/test_router.py"
CONTROL = "tests/distributed/test_control.py"
BUSIEST = "tests/distributed/test_busiest_rank.py"

MISTAKES = [
    Mutation(
        "error_sign",
        "the error of the controller has the wrong sign",
        "control/pi.py",
        "missing = target - measured",
        "missing = measured - target",
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
        "gains_of_the_first_step",
        "the default gains do not heed that a router becomes sharper",
        "control/calibrate.py",
        "SHARP = 3.0",
        "SHARP = 1.0",
        ("tests/control/test_transfer.py::test_the_count_settles_in_the_stated_time",),
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
        "routing/keep_dtype.py",
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
