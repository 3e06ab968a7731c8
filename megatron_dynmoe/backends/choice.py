"""Which back end runs a model's layers, what it cannot do, and the messages about it.

Megatron's arguments or its TransformerConfig decide this before anything is built. If
``torch_native`` does not support a part, ``auto`` leaves this part to upstream's ``local``. An
explicit ``torch_native`` is refused instead. See :func:`choose_parts` and ``docs/backends.md``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.enums import AttnBackend

from megatron_dynmoe import kernels
from megatron_dynmoe.backends import transformer_engine
from megatron_dynmoe.backends.attention.context_parallel import check_context_parallel
from megatron_dynmoe.backends.attention.documents import check_masks
from megatron_dynmoe.backends.attention.latent_attention import check_latent_attention
from megatron_dynmoe.moe.fused import is_fused
from megatron_dynmoe.moe.grouped_linear import uses_grouped_mm
from megatron_dynmoe.moe.recompute import MODULE, recomputes_activations
from megatron_dynmoe.settings.messages.refusals import FlagError, SettingError
from megatron_dynmoe.settings.routings import AUTO

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

_ASKED_FOR = "asked for"


@dataclass(frozen=True)
class BackEnd:
    """The back end of a model's layers.

    Attributes:
        backend: ``torch_native``, ``local``, ``transformer_engine`` or ``inference_optimized``.
        why: the reason for it.
        kept: with ``torch_native``, the parts that ``local`` runs, each with the reason. It is
            empty until the model is known: see :func:`choose_parts`.
    """

    backend: str
    why: str
    kept: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def implementation(self) -> str:
        """The ``transformer_impl`` of upstream on which this back end builds."""
        return "local" if self.backend == "torch_native" else self.backend


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed and can run. The layer for the CPU hides it."""
    return importlib.util.find_spec("transformer_engine") is not None


def choose_backend(backend: str | None, transformer_impl: str | None) -> BackEnd:
    """Choose a back end that fits both ``--moe-dynamic-backend`` and ``--transformer-impl``.

    Args:
        backend: ``--moe-dynamic-backend``; None, if it was not given, means auto.
        transformer_impl: upstream's setting, None if it was not given. Upstream's ``local`` means
            layers without Transformer Engine, so it allows ``torch_native`` and ``local``.

    Raises:
        SettingError: the two contradict each other, or Transformer Engine is not installed or too
            old.
    """
    if backend is not None and backend != AUTO:
        chosen = BackEnd(backend, _ASKED_FOR)
        if transformer_impl not in (None, chosen.implementation):
            raise SettingError(
                "backend",
                backend,
                f", which needs {chosen.implementation}, and --transformer-impl is "
                f"{transformer_impl}",
                "leave --transformer-impl out",
            )
        if backend == "transformer_engine" and not has_transformer_engine():
            raise SettingError(
                "backend",
                backend,
                ", which is not installed or finds no GPU",
                "use auto or torch_native, or install the extra 'te' on a machine with one",
            )
        if backend == "transformer_engine":
            transformer_engine.check_version()
        return chosen
    if transformer_impl == "inference_optimized":
        return BackEnd(transformer_impl, "--transformer-impl")
    if not has_transformer_engine():
        return BackEnd("torch_native", "no Transformer Engine")
    if transformer_impl == "local":
        return BackEnd("torch_native", "--transformer-impl local")
    if old := transformer_engine.version_without_grouped_experts():
        return BackEnd("torch_native", f"Transformer Engine {old} cannot group experts")
    return BackEnd("transformer_engine", "it is installed")


def choose_parts(chosen: BackEnd, config: TransformerConfig, optimizer: str = "adam") -> BackEnd:
    """Decide for each part of a model whether the back end runs it or upstream's ``local``.

    Args:
        chosen: the result of :func:`choose_backend`.
        config: the model's config, or Megatron's arguments.
        optimizer: upstream's ``--optimizer``.

    Raises:
        SettingError: the settings contradict each other, or the back end that they ask for cannot
            do what the model needs.
    """
    check_norms(chosen.backend, config)
    check_recompute(config)
    if chosen.backend == "local":
        check_latent_attention(config, "--moe-dynamic-backend local")
        check_biases(config)
        check_recomputed_experts(config, "local")
        if config.context_parallel_size > 1:
            raise _only_one_part(config, "local")
    if chosen.backend == "transformer_engine":
        transformer_engine.check_context_parallel(config)
    if chosen.backend != "torch_native":
        return chosen
    reasons = {
        "attention": _unsupported(config, _ATTENTION),
        "norm": _unsupported(config, _NORM),
        "experts": _unsupported(config, _EXPERTS)
        or (f"--optimizer {optimizer}" if optimizer not in ("adam", "sgd") else None),
    }
    kept = {part: reason for part, reason in reasons.items() if reason is not None}
    if kept and chosen.why == _ASKED_FOR:
        part, reason = next(iter(kept.items()))
        raise SettingError(
            "backend",
            chosen.backend,
            f", whose {part} cannot do {reason}",
            f"leave that out, or use auto, which takes upstream's {part} then",
        )
    check_latent_attention(config, kept.get("attention"))
    if "experts" in kept:
        check_biases(config)
        check_recomputed_experts(config, f"local, which {kept['experts']} needs")
    if config.context_parallel_size > 1:
        if "attention" in kept:
            raise _only_one_part(config, f"local, which {kept['attention']} needs,")
        check_context_parallel(config)
    return dataclasses.replace(chosen, kept=kept)


def _only_one_part(config: TransformerConfig, attention: str) -> FlagError:
    return FlagError(
        "context_parallel_size",
        config.context_parallel_size,
        f", and the attention of {attention} cannot split a sequence",
        "use 1, or --moe-dynamic-backend torch_native",
    )


def check_biases(config: TransformerConfig) -> None:
    """Refuse biases if upstream's local experts would fail at them in the first step.

    The output of these experts is a view, and autograd forbids to add a bias to it in place. There
    is no such problem if a collective between ranks has made the output a tensor of its own.

    Raises:
        FlagError: the experts cannot be trained with biases.
    """
    tensor_parallel_size = getattr(config, "expert_tensor_parallel_size", None) or 1
    num_ranks = config.expert_model_parallel_size * tensor_parallel_size
    if _have_biases(config) and num_ranks == 1:
        raise FlagError(
            "disable_bias_linear",
            None,
            ", and upstream's local experts cannot be trained with biases without expert "
            "parallelism",
            "give --disable-bias-linear",
        )


def needs_parallel_experts(backend: BackEnd, settings: Any) -> bool:
    """Whether a model can be trained only with expert parallelism; see :func:`check_biases`.

    Args:
        backend: the model's back end.
        settings: Megatron's arguments or a TransformerConfig.
    """
    return (backend.backend == "local" or "experts" in backend.kept) and _have_biases(settings)


def _have_biases(settings: Any) -> bool:
    # Megatron's arguments and its config have different names for it.
    has_experts = any(getattr(settings, name, None) for name in ("num_experts", "num_moe_experts"))
    return bool(settings.add_bias_linear and has_experts)


def check_recompute(settings: Any) -> None:
    """Refuse to recompute norms without Transformer Engine, which upstream needs for it.

    Args:
        settings: Megatron's arguments or a TransformerConfig.

    Raises:
        FlagError: ``--recompute-modules`` names layernorm.
    """
    modules = getattr(settings, "recompute_modules", None) or ()
    is_selective = settings.recompute_granularity == "selective"
    if is_selective and "layernorm" in modules and not has_transformer_engine():
        raise FlagError(
            "recompute_modules",
            modules,
            ", and Megatron cannot recompute layernorm without Transformer Engine",
            "leave layernorm out",
        )


def check_recomputed_experts(settings: Any, experts: str) -> None:
    """Refuse to recompute activations of experts that keep them: upstream's, one after another.

    Args:
        settings: Megatron's arguments or a TransformerConfig.
        experts: whose they are.

    Raises:
        FlagError: ``--recompute-modules`` names moe_act.
    """
    if recomputes_activations(settings):
        raise FlagError(
            "recompute_modules",
            settings.recompute_modules,
            f", and the experts of {experts}, cannot recompute {MODULE}",
            "leave it out, or use --moe-dynamic-backend torch_native",
        )


def group_recomputed_experts(backend: str, args: Any) -> None:
    """Let upstream accept ``moe_act``, which it ties to its own flag for grouped experts.

    Args:
        backend: the chosen back end. Experts of ``torch_native`` are grouped without that flag.
        args: Megatron's arguments, which are changed.
    """
    if backend == "torch_native" and recomputes_activations(args):
        args.moe_grouped_gemm = True


def check_norms(backend: str, settings: Any) -> None:
    """Refuse sequence parallelism if upstream's local norms would fail at it.

    Args:
        backend: the chosen back end.
        settings: Megatron's arguments or a TransformerConfig.

    Raises:
        FlagError: the norms cannot run sequence-parallel.
    """
    unsupported = "local" if backend == "local" else None
    if backend == "torch_native" and (reason := _unsupported(settings, _NORM)):
        unsupported = f"torch_native with {reason}"
    has_apex = importlib.util.find_spec("apex") is not None
    if unsupported and settings.sequence_parallel and not has_apex:
        raise FlagError(
            "sequence_parallel",
            True,
            ", which an MoE layer needs under tensor parallelism, but the norms of "
            f"{unsupported} cannot run so without Apex or Transformer Engine",
            "use --moe-dynamic-backend torch_native, with RMSNorm or LayerNorm",
        )


def adapt_arguments(args: Any) -> None:
    """Turn off defaults of upstream that need Apex or Transformer Engine, if these are missing."""
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        args.gradient_accumulation_fusion = False
    if not has_transformer_engine():
        # Upstream takes these two ways to Transformer Engine only, our kernel or not.
        needs_it = args.rotary_interleaved or args.multi_latent_attention
        args.apply_rope_fusion &= kernels.available(torch.device("cuda")) and not needs_it


def adapt_masks(backend: str, args: Any) -> None:
    """Let the data loader make no attention mask if the attention of ``torch_native`` runs.

    That attention applies the causal mask by itself, and gets the lengths of documents that are
    kept apart; see :mod:`megatron_dynmoe.backends.attention.documents`.

    Args:
        backend: the chosen back end.
        args: Megatron's arguments, which are changed.

    Raises:
        FlagError: upstream's attention runs, and a mask would not reach all of its layers.
    """
    kept = _unsupported(args, _ATTENTION) if backend == "torch_native" else None
    if backend == "torch_native" and not (kept and args.reset_attention_mask):
        args.create_attention_mask_in_dataloader = False
    elif backend in ("torch_native", "local"):
        check_masks(args, f"local, which {kept} needs," if kept else "local")


# Settings that a part supports only with these values.
_ATTENTION: dict[str, tuple[Any, ...]] = {
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "attention_backend": tuple(kind for kind in AttnBackend if kind != AttnBackend.local),
}
_NORM: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm", "LayerNorm"),
    "layernorm_zero_centered_gamma": (False,),
    "apply_layernorm_1p": (False,),  # the same setting in Megatron's arguments
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


def describe(backend: BackEnd, config: TransformerConfig) -> str:
    """Describe in one line which code runs attention, norms and experts."""
    if backend.backend == "transformer_engine" and config.moe_grouped_gemm:
        return f"> back end: {backend.backend} ({backend.why}) | experts: its grouped GEMMs"
    if backend.backend != "torch_native":
        return f"> back end: {backend.backend} ({backend.why})"
    gemm = gemm_of(config)
    ours = {
        "attention": "scaled_dot_product_attention",
        "norm": f"torch {config.normalization}",
        "experts": f"stacked, by {gemm} in {str(config.params_dtype).removeprefix('torch.')}",
    }
    if not config.num_moe_experts:
        del ours["experts"]
    parts = [
        f"{part}: upstream's local ({backend.kept[part]})"
        if part in backend.kept
        else f"{part}: {code}"
        for part, code in ours.items()
    ]
    return f"> back end: torch_native ({backend.why}) | " + " | ".join(parts)


def gemm_of(config: TransformerConfig) -> str:
    """Name what runs the stacked experts' GEMMs on this device; a loop needs counts on the host."""
    device, ffn = torch.device(torch.cuda.current_device()), config.moe_ffn_hidden_size or 0
    gemms = device, config.params_dtype, config.hidden_size, ffn
    if is_fused(*gemms):
        return "fused Triton kernels"
    return "grouped_mm" if uses_grouped_mm(*gemms) else "a loop"
