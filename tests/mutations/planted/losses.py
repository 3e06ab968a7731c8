"""Mistakes in the losses of the routing."""

from tests.mutations.mutation import Mutation

ROUTER = "tests/moe/test_router.py"
LOSSES = "tests/routing/test_losses.py"
GRADIENTS = "tests/routing/test_gradients.py"
METRICS = "tests/runs/test_metrics.py"
INVARIANCE = "tests/distributed/test_invariance.py"
DOCUMENTS = "tests/distributed/test_documents.py"
SEQUENCES = "tests/distributed/test_sequences.py"

MISTAKES = [
    Mutation(
        "loss_of_the_impossible_is_infinite",
        "on a CPU the loss of a target whose probability underflows is infinite",
        "kernels/cross_entropy_cpu.py",
        "by_parts_T1 = is_outside_T1 | ~(chosen_T1 > LEAST_PROBABILITY)",
        "by_parts_T1 = is_outside_T1",
        ("tests/kernels/test_cross_entropy_cpu.py::test_losses_and_gradients_against_float64",),
    ),
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
        "by_token_BE = fractions_BE * num_experts",
        "by_token_BE = fractions_BE * num_experts / fractions_BE.sum(-1, True).clamp(min=1e-9)",
        (f"{LOSSES}::test_a_balanced_router_of_k_experts_has_a_balance_loss_of_k",),
    ),
    Mutation(
        "sequences_summed",
        "the balance losses of a micro-batch's sequences are summed, not averaged",
        "routing/losses.py",
        "(num_sequences * _per_sequence(tokens_B))",
        "_per_sequence(tokens_B)",
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
    Mutation(
        "parts_of_a_row_weighed_alike",
        "both halves of a split row count alike, however many of their tokens do",
        "training/forward.py",
        "loss = _weighed_in_sequence(loss, num_tokens)",
        "pass",
        (f"{DOCUMENTS}::test_tokens_of_a_split_row_count_alike",),
    ),
    Mutation(
        "padding_of_one_rank",
        "the routers' losses per token take other ranks to have as much padding",
        "moe/router.py",
        "loss = loss * tokens",
        "loss = loss * valid_T.sum() * group.size()",
        (
            f"{SEQUENCES}::test_losses_of_a_split_sequence_leave_padding_out_as_those_of_a_whole_one",
        ),
    ),
    Mutation(
        "evaluation_with_routing_losses",
        "the exported model's loss in evaluation has the losses of the routing in it",
        "huggingface/modeling_dynmoe.py",
        "outputs.aux_loss if self.training else None",
        "outputs.aux_loss",
        ("tests/huggingface/test_training.py::test_an_evaluation_has_the_cross_entropy_alone",),
    ),
    Mutation(
        "trainer_does_not_know_the_model",
        "Trainer does not know the exported model as one that predicts the next token",
        "huggingface/modeling_dynmoe.py",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[DynMoEModelConfig.model_type] =",
        "_ =",
        (
            "tests/huggingface/test_training.py"
            "::test_label_smoothing_in_trainer_predicts_the_next_token",
        ),
    ),
]
