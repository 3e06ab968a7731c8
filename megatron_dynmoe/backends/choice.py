"""Which back end runs a model's layers, what it cannot do, and the words for it.

Decided before anything is built, from Megatron's arguments or its TransformerConfig. What
``torch_native`` does not support stays upstream's ``local`` under ``auto`` and is refused where it
is asked for: see :func:`plan` and ``docs/backends.md``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.enums import AttnBackend

from megatron_dynmoe.backends import cpu
from megatron_dynmoe.moe.experts import has_grouped_gemm, uses_grouped_mm

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Plan:
    """Which back end a model's layers get.

    Attributes:
        backend: ``torch_native``, ``local``, ``transformer_engine`` or ``inference_optimized``.
        why: the reason for it.
        kept: with ``torch_native``: the parts that stay ``local``'s, each with the reason.
    """

    backend: str
    why: str
    kept: dict[str, str] = dataclasses.field(default_factory=dict)


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed and may run: not on the CPU."""
    return not cpu.is_installed() and importlib.util.find_spec("transformer_engine") is not None


def choose_backend(backend: str, transformer_impl: str | None) -> tuple[str, str]:
    """Settle ``--moe-dynamic-backend`` and ``--transformer-impl`` with each other.

    Args:
        backend: the setting.
        transformer_impl: upstream's, None where it was not given. ``local`` is upstream's word for
            layers without Transformer Engine, so it leaves ``torch_native`` and ``local``.

    Returns:
        The back end, and why it is that.

    Raises:
        ValueError: the two contradict each other, or Transformer Engine is not installed.
    """
    if backend != "auto":
        implied = implementation(backend)
        if transformer_impl not in (None, implied):
            raise ValueError(
                f"--transformer-impl is {transformer_impl} and --moe-dynamic-backend is {backend}, "
                f"which needs {implied}: leave --transformer-impl out."
            )
        if backend == "transformer_engine" and not has_transformer_engine():
            raise ValueError(
                "--moe-dynamic-backend is transformer_engine, which is not installed or finds no "
                "GPU: use auto or torch_native, or install the extra 'te' on a machine with one."
            )
        return backend, "asked for"
    if transformer_impl == "inference_optimized":
        return transformer_impl, "--transformer-impl"
    if not has_transformer_engine():
        return "torch_native", "no Transformer Engine"
    if transformer_impl == "local":
        return "torch_native", "--transformer-impl local"
    return "transformer_engine", "it is installed"


def implementation(backend: str) -> str:
    """Upstream's ``transformer_impl`` on which a back end builds."""
    return "local" if backend == "torch_native" else backend


def plan(
    backend: str, transformer_impl: str | None, config: TransformerConfig, optimizer: str = "adam"
) -> Plan:
    """Choose the back end of a model, part by part.

    Args:
        backend: ``--moe-dynamic-backend``.
        transformer_impl: see :func:`choose_backend`.
        config: the model's, or Megatron's arguments.
        optimizer: upstream's ``--optimizer``.

    Raises:
        ValueError: what is asked for contradicts itself or cannot do what the model needs.
    """
    chosen, why = choose_backend(backend, transformer_impl)
    check_norms(chosen, config)
    check_recompute(config)
    if chosen == "local":
        check_biases(config)
    if chosen != "torch_native":
        return Plan(chosen, why)
    reasons = {
        "attention": _unsupported(config, _ATTENTION),
        "norm": _unsupported(config, _NORM),
        "experts": _unsupported(config, _EXPERTS)
        or (f"--optimizer {optimizer}" if optimizer not in ("adam", "sgd") else None),
    }
    kept = {part: reason for part, reason in reasons.items() if reason is not None}
    if kept and backend == "torch_native":
        part, reason = next(iter(kept.items()))
        raise ValueError(
            f"--moe-dynamic-backend is torch_native, whose {part} cannot do {reason}: leave that "
            f"out, or use --moe-dynamic-backend auto, which takes upstream's {part} then."
        )
    if "experts" in kept:
        check_biases(config)
    return Plan(chosen, why, kept)


def check_biases(config: TransformerConfig) -> None:
    """Refuse biases where upstream's local experts stop at them in the first step.

    Their output is a view that autograd forbids to add the bias to in place, unless a collective
    between ranks has made a tensor of its own of it.

    Raises:
        ValueError: the experts cannot be trained with biases.
    """
    tensor_parallel_size = getattr(config, "expert_tensor_parallel_size", None) or 1
    num_ranks = config.expert_model_parallel_size * tensor_parallel_size
    if _have_biases(config) and num_ranks == 1:
        raise ValueError(
            "--disable-bias-linear is not given, and upstream's local experts cannot be trained "
            "with biases without expert parallelism: give --disable-bias-linear."
        )


def needs_parallel_experts(plan: Plan, settings: Any) -> bool:
    """Whether a model can only be trained with expert parallelism; see :func:`check_biases`.

    Args:
        plan: of the model.
        settings: Megatron's arguments or a TransformerConfig.
    """
    return (plan.backend == "local" or "experts" in plan.kept) and _have_biases(settings)


def _have_biases(settings: Any) -> bool:
    # The namespace's name, and the config's.
    has_experts = any(getattr(settings, name, None) for name in ("num_experts", "num_moe_experts"))
    return bool(settings.add_bias_linear and has_experts)


def check_recompute(settings: Any) -> None:
    """Refuse to recompute norms where upstream's code for it wants Transformer Engine.

    Args:
        settings: Megatron's arguments or a TransformerConfig.

    Raises:
        ValueError: ``--recompute-modules`` names layernorm.
    """
    modules = getattr(settings, "recompute_modules", None) or ()
    is_selective = settings.recompute_granularity == "selective"
    if is_selective and "layernorm" in modules and not has_transformer_engine():
        raise ValueError(
            f"--recompute-modules is {' '.join(modules)}, and Megatron cannot recompute layernorm "
            "without Transformer Engine: leave layernorm out."
        )


def check_norms(backend: str, settings: Any) -> None:
    """Refuse sequence parallelism where upstream's local norms would stop at it.

    Args:
        backend: the one chosen.
        settings: Megatron's arguments or a TransformerConfig.

    Raises:
        ValueError: the norms cannot run sequence-parallel.
    """
    unsupported = "local" if backend == "local" else None
    if backend == "torch_native" and (reason := _unsupported(settings, _NORM)):
        unsupported = f"torch_native with {reason}"
    has_apex = importlib.util.find_spec("apex") is not None
    if unsupported and settings.sequence_parallel and not has_apex:
        raise ValueError(
            f"--sequence-parallel is given, which an MoE layer needs under tensor parallelism, but "
            f"the norms of {unsupported} cannot run so without Apex or Transformer Engine: use "
            "--moe-dynamic-backend torch_native, with RMSNorm or LayerNorm."
        )


def adapt_arguments(args: Any) -> None:
    """Turn off what upstream has on and what only Apex or Transformer Engine can do.

    And let the data loader make no attention mask where it would be the causal one, which the
    attention knows by itself.
    """
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        args.gradient_accumulation_fusion = False
    if not has_transformer_engine():
        args.apply_rope_fusion = False
    if not args.reset_attention_mask:
        args.create_attention_mask_in_dataloader = False


# Settings that a part supports only with these values.
_ATTENTION: dict[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False, None),
    "context_parallel_size": (1,),
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "attention_backend": tuple(kind for kind in AttnBackend if kind != AttnBackend.local),
}
_NORM: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm", "LayerNorm"),
    "layernorm_zero_centered_gamma": (False,),
    "apply_layernorm_1p": (False,),  # the name of the same on the command line
}
_EXPERTS: dict[str, tuple[Any, ...]] = {
    "add_bias_linear": (False,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "fp8": (None,),
    "fp4": (None,),
    "use_kitchen": (False,),
    "moe_mlp_glu_interleave_size": (None,),
    "expert_gtp_weight_remat_size": (1,),
    "use_torch_fsdp2": (False,),
}


def _unsupported(config: Any, supported: dict[str, tuple[Any, ...]]) -> str | None:
    for name, values in supported.items():
        value = getattr(config, name, values[0])
        if value not in values:
            return f"{name} {value}"
    if supported is _EXPERTS and getattr(config, "num_moe_experts", None):
        swiglu = config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
        return None if swiglu else "activations other than SwiGLU"
    return None


def describe(plan: Plan, config: TransformerConfig) -> str:
    """One line that says which code runs attention, norms and experts."""
    if plan.backend != "torch_native":
        return f"> back end: {plan.backend} ({plan.why})"
    gemm = gemm_of(config)
    ours = {
        "attention": "scaled_dot_product_attention",
        "norm": f"torch {config.normalization}",
        "experts": f"stacked, by {gemm} in {str(config.params_dtype).removeprefix('torch.')}",
    }
    if not config.num_moe_experts:
        del ours["experts"]
    parts = [
        f"{part}: upstream's local ({plan.kept[part]})" if part in plan.kept else f"{part}: {code}"
        for part, code in ours.items()
    ]
    return f"> back end: torch_native ({plan.why}) | " + " | ".join(parts)


def gemm_of(config: TransformerConfig) -> str:
    """What runs the stacked experts' GEMMs on this device; "a loop" needs counts on the host."""
    device, ffn = torch.device(torch.cuda.current_device()), config.moe_ffn_hidden_size or 0
    gemms = device, config.params_dtype, config.hidden_size, ffn
    if uses_grouped_mm(*gemms):
        return "grouped_mm"
    return "a Triton kernel" if has_grouped_gemm(*gemms) else "a loop"
