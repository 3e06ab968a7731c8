"""Tensors that a step makes on the host for a good reason, by file and function.

Everything else that is made there is a mistake: the device waits for it, or the host for it.
"""

from __future__ import annotations

_CONSTANT = "a number that an operation on the device takes"
_OTHER_RANKS = "a number for other ranks"
_NORM = "the gradient's norm"
_ROWS = "counts of rows"
_CORE, _OURS = "megatron/core", "megatron_dynmoe"
_DISPATCHER = f"{_CORE}/transformer/moe/token_dispatcher.py"
_GEMMS = f"{_OURS}/moe/grouped_linear.py"

# By file and function: the operations, with [] if they may make a single number only, and why.
ALLOWED: dict[tuple[str, str], tuple[tuple[str, ...], str]] = {
    (f"{_CORE}/pipeline_parallel/schedules.py", "forward_step_calc_loss"): (
        ("lift_fresh []",),
        _CONSTANT,
    ),
    (f"{_CORE}/rerun_state_machine.py", "RerunDataIterator.__next__"): (
        ("ones", "zeros"),
        "the batch",
    ),
    (f"{_CORE}/rerun_state_machine.py", "RerunStateMachine._reduce_any"): (
        ("lift_fresh",),
        _OTHER_RANKS,
    ),
    (
        f"{_CORE}/tensor_parallel/cross_entropy.py",
        "VocabParallelCrossEntropy.calculate_predicted_logits",
    ): (("lift_fresh []",), _CONSTANT),
    (f"{_CORE}/tensor_parallel/layers.py", "VocabParallelEmbedding.forward"): (
        ("lift_fresh []", "zeros []"),
        _CONSTANT,
    ),
    (f"{_CORE}/tensor_parallel/random.py", "CudaRNGStatesTracker.fork"): (
        ("eq", "all []"),
        "a generator's state, which CUDA keeps on the host",
    ),
    (_DISPATCHER, "MoEAlltoAllTokenDispatcher.combine_preprocess"): (
        ("clone", "permute", "view"),
        _ROWS,
    ),
    (_DISPATCHER, "MoEAlltoAllTokenDispatcher.dispatch_postprocess"): (("view",), _ROWS),
    (_DISPATCHER, "_DeepepManager._indices_to_multihot"): (("lift_fresh []",), _CONSTANT),
    (_DISPATCHER, "_DeepepManager.get_permuted_hidden_states_by_experts"): (("sum []",), _ROWS),
    (f"{_CORE}/transformer/moe/fused_a2a.py", "FusedDispatch.forward"): (
        ("lift_fresh", "zeros"),
        _ROWS,
    ),
    (f"{_CORE}/optimizer/clip_grads.py", "get_grad_norm_fp32"): (("lift_fresh",), _NORM),
    (f"{_CORE}/optimizer/optimizer.py", "ChainedOptimizer.get_loss_scale"): (
        ("lift_fresh",),
        "the loss's scale",
    ),
    (f"{_CORE}/utils.py", "local_multi_tensor_l2_norm"): (
        ("lift_fresh", "linalg_vector_norm []"),
        _NORM,
    ),
    ("megatron/training/utils/common_utils.py", "_compute_norm_2"): (
        ("lift_fresh",),
        "the parameters' norm",
    ),
    ("megatron/training/utils/common_utils.py", "logical_and_across_model_parallel_group"): (
        ("lift_fresh",),
        _OTHER_RANKS,
    ),
    ("megatron/training/utils/common_utils.py", "reduce_max_stat_across_model_parallel_group"): (
        ("lift_fresh",),
        _OTHER_RANKS,
    ),
    (_GEMMS, "_zero_unused"): (("any []",), "whether an expert has no rows"),
    (_GEMMS, "_GroupedLinear.backward"): (("eq",), "which experts have no rows"),
    (f"{_OURS}/routing/counters.py", "pack"): (("lift_fresh []",), _CONSTANT),
    (f"{_OURS}/routing/select.py", "used_in_order"): (("lift_fresh []",), _CONSTANT),
    (f"{_OURS}/training/signals.py", "StopSignals.signals_received"): (
        ("lift_fresh",),
        _OTHER_RANKS,
    ),
    (f"{_OURS}/upstream/shortcuts.py", "sort_of_ranks.<locals>.sorted_rows"): (
        ("sum []",),
        _ROWS,
    ),
}


def why_on_host(file: str, function: str, made: str) -> str:
    """The reason for tensors that are made on the host; empty if there is none.

    Args:
        made: the operation and the shape of its result.
    """
    operations, why = ALLOWED.get((file, function), ((), ""))
    name = made.partition(" ")[0]
    return why if name in operations or made in operations else ""
