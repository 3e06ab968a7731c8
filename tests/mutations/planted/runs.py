"""Mistakes in checks, checkpoints, reports and dry runs."""

from tests.mutations.mutation import Mutation

EVALUATION = "tests/use/test_evaluate_checkpoint.py"

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
        ("one_per_token", "per_token_to_tp2"),
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
        ("fresh_pp2ep2",),
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
        "a_plan_without_flags_in_files",
        "a plan does not read @FILE, which a training takes",
        "jobs/recipes.py",
        'words += recipe_flags(flag) if flag.startswith("@") else [flag]',
        "words.append(flag)",
        ("tests/cli/test_training_flags.py::test_a_command_takes_every_flag",),
    ),
    Mutation(
        "a_dry_run_reads_without_waiting",
        "a dry run counts no wait if the host reads a number from the device",
        "dry_run/recorder.py",
        'self.wait("item")',
        "pass",
        ("tests/dry_run/test_rehearsal.py::test_a_planted_item_is_found_and_named",),
    ),
    Mutation(
        "a_dry_run_overlooks_tensors_on_the_cpu",
        "a dry run finds no tensor of a step that was made on the CPU",
        "dry_run/recorder.py",
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
        "two_copies_of_an_expert_are_none",
        "the doctor calls experts copies only if there are three of one kind",
        "doctor/checkpoint/copies.py",
        "if len(group) > 1)",
        "if len(group) > 2)",
        ("tests/doctor/test_checkpoint.py::test_a_planted_fault_is_named",),
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
