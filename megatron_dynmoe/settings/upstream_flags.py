"""Every MoE setting of upstream, and whether dynamic routing works with it.

This one table serves the checks at start-up, ``docs/upstream_flags.md``, and a test that fails when
upstream adds a setting that is not here. A setting is refused only if it is used, that is, if its
value differs from ``unused``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_dynmoe.settings.messages.refusals import FlagError
from megatron_dynmoe.settings.routings import ROUTINGS


@dataclass(frozen=True)
class Works:
    """The setting has its usual effect; ``note`` tells what is special about it here."""

    note: str = ""


@dataclass(frozen=True)
class Refused:
    """The setting stops the run at start-up if its value is not one of ``unused``.

    ``flag`` is the name of the flag, if it differs from the setting's name.
    """

    unused: tuple[Any, ...]
    reason: str
    remedy: str
    flag: str | None = None


@dataclass(frozen=True)
class Ignored:
    """Dynamic routing uses no code that reads the setting."""

    note: str


_FIXED_K = "it takes a fixed number of experts per token for granted"
_CAP = "use --moe-dynamic-max-experts-per-token to bound the worst case"
_ROOM = "use --moe-dynamic-row-buffer target, which needs one expert-parallel rank"
_TOP_K_ONLY = "it belongs to upstream's top-k selection"
_GROUPS = (
    "the rules of routing choose among all experts, and some may lie outside the groups or devices "
    "that a token is limited to"
)
_FLEX = "only used by the flex dispatcher"
_NCCLEP = "only used by ncclep, which is refused"
_LEAVE_OUT = "leave it out"

UPSTREAM_FLAGS: dict[str, Works | Refused | Ignored] = {
    # experts and layers
    "num_moe_experts": Works("--num-experts"),
    "num_experts": Works("from 1; tested up to 512"),
    "moe_layer_freq": Works("layers without experts have no threshold and no counts"),
    "moe_use_upcycling": Refused(
        (False,),
        "it first builds a dense model, which has nothing to route",
        "use dynmoe convert from-hf --upcycle-experts",
    ),
    "moe_upcycling_granularity": Ignored("only used by upcycling, which is refused"),
    "moe_ffn_hidden_size": Works(),
    "moe_grouped_gemm": Works(
        "always on with Transformer Engine; torch_native groups experts by itself; off on the CPU"
    ),
    "moe_single_grouped_weight": Works("needs Transformer Engine in upstream, too"),
    "moe_single_grouped_bias": Works("needs Transformer Engine in upstream, too"),
    "moe_mlp_glu_interleave_size": Works("needs Transformer Engine in upstream, too"),
    "moe_layer_recompute": Works("counts are taken once"),
    "moe_per_layer_logging": Works("per-layer metrics are always logged"),
    "moe_grad_scale_func": Works("set by the training loop"),
    "save_tokens_per_expert_interval": Works(),
    "expert_model_parallel_size": Works(),
    "expert_tensor_parallel_size": Works("follows tensor parallelism unless it is given"),
    "expert_tensor_parallel_num_weight_shards": Works(
        "not beyond the tensor-parallel size: expert_gtp_weight_remat_size"
    ),
    "expert_gtp_weight_remat_size": Refused(
        (1,), "sharded expert weights are untested with it", _LEAVE_OUT
    ),
    # shared experts
    "moe_shared_expert_intermediate_size": Works("shared experts are not counted"),
    "moe_shared_expert_gate": Works(),
    "moe_shared_expert_overlap": Works("with the alltoall dispatcher only, as in upstream"),
    "moe_shared_expert_glu_interleave_size": Works("needs Transformer Engine in upstream, too"),
    "use_grouped_gemm_for_shared_expert": Works("needs Transformer Engine in upstream, too"),
    # routing
    "moe_router_topk": Ignored("has no meaning, because tokens choose how many experts they use"),
    "moe_router_load_balancing_type": Works(
        "seq_aux_loss (the default here), aux_loss, global_aux_loss, none; sinkhorn and "
        "quantile_balancing are refused, they are top-k methods"
    ),
    "moe_aux_loss_coeff": Works("not divided by the number of experts a token uses"),
    "moe_z_loss_coeff": Works("on the logits before normalization"),
    "moe_input_jitter_eps": Works(),
    "moe_router_dtype": Works("always fp32, whatever the model's dtype; fp64 is refused"),
    "moe_router_force_load_balancing": Works("random logits, for benchmarks"),
    "moe_router_force_biased": Works("biased random logits, for benchmarks"),
    "moe_router_score_function": Refused(
        ("softmax",),
        "a rule of routing has scores of its own: a softmax, so that they sum to 1 (top-p and "
        "most others), sigmoids (expert_threshold) or gates (relu)",
        "use softmax, which changes no rule's scores",
    ),
    "moe_router_num_groups": Refused((None,), _GROUPS, _LEAVE_OUT),
    "moe_router_group_topk": Refused((None,), _GROUPS, _LEAVE_OUT),
    "moe_router_topk_limited_devices": Refused((None,), _GROUPS, _LEAVE_OUT),
    "moe_router_topk_scaling_factor": Refused((None,), _TOP_K_ONLY, _LEAVE_OUT),
    "moe_router_pre_softmax": Ignored("dynamic routing always selects after the softmax"),
    "moe_router_enable_expert_bias": Refused(
        (False,),
        "with a bias for selection alone the probabilities that are taken need not exceed the "
        "threshold, which is top-p's rule",
        "balance with --moe-aux-loss-coeff",
    ),
    "moe_router_bias_update_rate": Ignored("only used with expert bias, which is refused"),
    "moe_router_quantile_balancing_ema": Ignored("only used by quantile_balancing"),
    "moe_router_fusion": Refused((False,), "upstream's fused router is top-k only", _LEAVE_OUT),
    "moe_enable_routing_replay": Refused((False,), _FIXED_K, _LEAVE_OUT),
    "moe_routing_trace_path": Refused(
        (None,), "it records the top-k experts, whatever was selected", _LEAVE_OUT
    ),
    "moe_routing_trace_max_training_iters": Ignored("only used by the trace, which is refused"),
    "moe_routing_trace_capture_logits": Ignored("as above"),
    "moe_routing_trace_capture_hidden_states": Ignored("as above"),
    "moe_routing_trace_dump_weights": Ignored("as above"),
    "moe_apply_probs_on_input": Refused((False,), "it requires exactly one expert", _LEAVE_OUT),
    "moe_router_padding_for_quantization": Refused(
        (False, None), "low-precision experts are untested with it", _LEAVE_OUT
    ),
    "moe_router_padding_for_fp8": Refused(
        (False, None), "low-precision experts are untested with it", _LEAVE_OUT
    ),
    "moe_latent_size": Works("needs Transformer Engine in upstream, too"),
    # dropping
    "moe_expert_capacity_factor": Refused((None,), _FIXED_K, _CAP),
    "moe_expert_rank_capacity_factor": Refused((None,), _FIXED_K, _ROOM),
    "moe_pad_expert_input_to_capacity": Refused((False,), _FIXED_K, _CAP),
    "moe_pad_experts_for_cuda_graph_inference": Refused((False,), _FIXED_K, _CAP),
    "moe_token_dropping": Refused((False,), _FIXED_K, _CAP),
    "moe_token_drop_policy": Ignored("only used with a capacity factor, which is refused"),
    "moe_paged_stash": Refused((False,), _FIXED_K, _ROOM),
    "moe_paged_stash_page_size": Ignored("only used by the paged stash, which is refused"),
    "moe_paged_stash_buffer_size_factor_cuda": Ignored("as above"),
    "moe_paged_stash_buffer_size_factor_cpu": Ignored("as above"),
    # dispatch
    "moe_token_dispatcher_type": Works(
        "alltoall (recommended), allgather, and flex with DeepEP or HybridEP, not run on a GPU"
    ),
    "moe_permute_fusion": Works(
        "needs Transformer Engine 2.1, with any back end; refused with allgather over several "
        "expert-parallel ranks, where it stops at a rank without rows; off on the CPU"
    ),
    "moe_enable_deepep": Works("upstream's old name for --moe-flex-dispatcher-backend deepep"),
    "moe_flex_dispatcher_backend": Works(
        "deepep needs a cap of at most 32 (times tensor parallelism) if there are more experts; "
        "hybridep needs none; ncclep is sized by a fixed k and refused"
    ),
    "moe_flex_dispatcher_num_sms": Works(_FLEX),
    "moe_deepep_num_sms": Works(_FLEX),
    "moe_hybridep_num_sms": Works(_FLEX),
    "moe_hybridep_num_blocks_permute": Works(_FLEX),
    "moe_hybridep_num_blocks_unpermute": Works(_FLEX),
    "moe_hybridep_num_sms_preprocessing": Works(_FLEX),
    "moe_hybridep_pad_uneven_dispatch_inputs": Works(_FLEX),
    "moe_permute_fusion_into_hybridep": Works(_FLEX),
    "moe_ncclep_static_shape": Ignored(_NCCLEP),
    "moe_ncclep_zero_copy": Ignored(_NCCLEP),
    "overlap_moe_expert_parallel_comm": Refused(
        (False,), "its schedule is untested with a varying number of rows", _LEAVE_OUT
    ),
    "overlap_dispatch_backward_with_experts_wgrad": Refused(
        (False,), "its schedule is untested with a varying number of rows", _LEAVE_OUT
    ),
    # multi-token prediction: upstream's own spec builds its layers, so they would stay top-k
    "mtp_num_layers": Refused(
        (None, 0), "upstream builds these layers with its own top-k router", _LEAVE_OUT
    ),
    "mtp_standalone": Ignored("only used with multi-token prediction, which is refused"),
    "mtp_grad_scale_func": Ignored("as above"),
    "mtp_loss_scaling_factor": Ignored("as above"),
    "mtp_use_repeated_layer": Ignored("as above"),
    "mtp_detach_heads": Ignored("as above"),
    "mtp_hybrid_override_pattern": Ignored("as above"),
    # CUDA graphs
    "cuda_graph_impl": Refused(
        ("none",), "a graph has fixed shapes, and the rows of a layer vary", "use none"
    ),
    "enable_cuda_graph": Refused((False,), "a graph has fixed shapes", _LEAVE_OUT),
    "external_cuda_graph": Refused((False,), "a graph has fixed shapes", _LEAVE_OUT),
    "optimizer_cuda_graph": Refused(
        (False,), "a replayed step runs no hook, so the threshold would stand still", _LEAVE_OUT
    ),
    "cuda_graph_modules": Ignored("only used with CUDA graphs, which are refused"),
    "cuda_graph_scope": Ignored("as above"),
    "cuda_graph_scope_deprecated": Ignored("as above"),
    "cuda_graph_use_single_mempool": Ignored("as above"),
    "cuda_graph_retain_backward_graph": Ignored("as above"),
    "cuda_graph_warmup_steps": Ignored("as above"),
    "delay_offload_until_cuda_graph": Ignored("as above"),
    "inference_cuda_graph_scope": Ignored("as above"),
    # inference and precision
    "transformer_impl": Works(
        "local and transformer_engine; inference_optimized is refused. --moe-dynamic-backend says "
        "more, so leave it out"
    ),
    "inference_moe_disable_fused_quant_kernels": Ignored("only used by inference_optimized"),
    "inference_moe_token_dispatcher_type": Ignored("only used by inference_optimized"),
    "fp8": Refused(
        (None,), "low-precision experts are untested with it", "train in bf16", "fp8_format"
    ),
    "fp4": Refused(
        (None,), "low-precision experts are untested with it", "train in bf16", "fp4_format"
    ),
}

# Settings of Megatron's main branch that no release has yet. With the release they move up.
UNRELEASED: dict[str, Works | Refused | Ignored] = {
    "gtp_expert_remat_nccl_ub": Ignored("only used by sharded expert weights, which are refused"),
    "moe_use_grouped_tensor": Works("needs Transformer Engine in upstream, too"),
    "moe_dispatch_fwd_dtype": Ignored(_NCCLEP),
    "moe_combine_bwd_dtype": Ignored(_NCCLEP),
    "mtp_hsm": Ignored("only used with multi-token prediction, which is refused"),
}
UPSTREAM_FLAGS |= UNRELEASED

# Refused values of settings that otherwise work.
_REFUSED_VALUES = {
    ("moe_router_load_balancing_type", "sinkhorn"): (
        "it is a top-k method",
        "use seq_aux_loss",
    ),
    ("moe_router_load_balancing_type", "quantile_balancing"): (
        "it is a top-k method",
        "use seq_aux_loss",
    ),
    ("moe_router_dtype", "fp64"): ("thresholds are kept in fp32", "use fp32 or leave it out"),
    ("transformer_impl", "inference_optimized"): (
        "its router and dispatcher take a fixed number of experts per token for granted",
        "use local or transformer_engine",
    ),
}


def check_upstream_settings(settings: Any, routing: str | None = None) -> None:
    """Refuse upstream settings that dynamic routing cannot honor.

    Args:
        settings: upstream's argument namespace or TransformerConfig.
        routing: the dynamic routing, which may refuse more; None: only what each of them refuses.

    Raises:
        FlagError: names the flag, its value, the reason and the remedy.
    """
    for name, entry in UPSTREAM_FLAGS.items():
        value = getattr(settings, name, None)
        if hasattr(settings, name) and isinstance(entry, Refused) and value not in entry.unused:
            _refuse(entry.flag or name, value, entry.reason, entry.remedy)
        for single in value if isinstance(value, list) else [value]:
            if isinstance(single, str) and (name, single) in _REFUSED_VALUES:
                _refuse(name, single, *_REFUSED_VALUES[name, single])
    for name, reason in ROUTINGS[routing].refuses.items() if routing is not None else ():
        if value := getattr(settings, name, None):
            _refuse(name, value, f"with --moe-dynamic-routing {routing} {reason}", _LEAVE_OUT)
    check_sequence_parallel(settings)
    frequency = getattr(settings, "moe_layer_freq", None)
    if isinstance(frequency, list) and not any(frequency):
        _refuse("moe_layer_freq", frequency, "no layer has experts", "put a 1 into it")


def check_sequence_parallel(settings: Any) -> None:
    """Refuse experts with tensor parallelism only; without sequence parallelism upstream stops.

    Args:
        settings: upstream's argument namespace or TransformerConfig.

    Raises:
        FlagError: ``--sequence-parallel`` is missing.
    """
    size = getattr(settings, "tensor_model_parallel_size", 1)
    # Megatron's arguments and its config have different names for it.
    has_experts = any(getattr(settings, name, None) for name in ("num_experts", "num_moe_experts"))
    if has_experts and size > 1 and not settings.sequence_parallel:
        raise FlagError(
            "tensor_model_parallel_size",
            size,
            " without --sequence-parallel, which Megatron wants if there are experts",
            "give --sequence-parallel",
        )


def check_query_groups(args: Any) -> None:
    """Refuse query groups that do not divide the heads; Megatron would fail in the first step.

    Raises:
        FlagError: the groups do not divide the heads.
    """
    groups, heads = args.num_query_groups, args.num_attention_heads
    if args.group_query_attention and heads and (groups < 1 or heads % groups):
        raise FlagError(
            "num_query_groups",
            groups,
            f", which does not divide --num-attention-heads ({heads})",
            "every group has as many heads",
        )


def layers_with_experts(
    frequency: Any, num_layers: int, name: str = "--moe-layer-freq"
) -> tuple[bool, ...]:
    """Whether each layer has experts, from Megatron's ``moe_layer_freq``.

    Args:
        frequency: N for every N-th layer from the first on, or a list of 0 and 1.
        name: what the frequency is called where it stands.

    Raises:
        ValueError: it is neither, or the list is of another length.
    """
    if isinstance(frequency, int) and frequency >= 1:
        return tuple(layer % frequency == 0 for layer in range(num_layers))
    if not isinstance(frequency, list) or len(frequency) != num_layers:
        raise ValueError(
            f"{name} is {frequency!r}: use N for experts in every N-th layer, or a list of 0 and 1 "
            f"with an entry for each of the {num_layers} layers."
        )
    return tuple(map(bool, frequency))


def _refuse(name: str, value: Any, reason: str, remedy: str) -> None:
    raise FlagError(name, value, f", which dynamic routing refuses: {reason}. Remedy", remedy)
