"""The back end that needs nothing but PyTorch: attention, norms and experts in its fused calls.

Upstream's ``local`` back end, which runs without Transformer Engine too, writes the attention
matrix out, runs one expert after another, and its norms refuse sequence parallelism and so tensor
parallelism. Here

- attention is ``scaled_dot_product_attention``,
- norms are PyTorch's, with the mark that sequence parallelism needs,
- experts are grouped GEMMs (:mod:`megatron_dynmoe.moe.experts`);

linear layers, embeddings and everything else stay those of ``local``. Parameters of checkpoints
have the same names. What a part does not support stays ``local``'s under ``auto`` and is refused
where ``torch_native`` is asked for: see :func:`plan` and ``docs/backends.md``.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.torch_norm import L2Norm
from torch import Tensor

from megatron_dynmoe.backends import cpu
from megatron_dynmoe.moe.experts import GroupedExperts, has_grouped_gemm, uses_grouped_mm

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

# Added to a score that is masked; upstream writes the same in its place.
MASKED_SCORE = -10000.0


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
    if backend != "auto":
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
    if config.add_bias_linear and getattr(config, "num_moe_experts", None) and num_ranks == 1:
        raise ValueError(
            "--disable-bias-linear is not given, and upstream's local experts cannot be trained "
            "with biases without expert parallelism: give --disable-bias-linear."
        )


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


class ScaledDotProductAttention(DotProductAttention):
    """Upstream's local core attention through PyTorch's fused one.

    Same arguments, masks and dropout (the probabilities of a head, in the generator of upstream's
    tracker). Grouped queries are not expanded.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, B, N, H].
            key: [Sk, B, G, H], G the number of query groups.
            value: as the key.
            attention_mask: True where a score is masked, broadcast to [B, N, S, Sk]. None: causal,
                or none at all where the layer is not causal or S is 1.

        Returns:
            [S, B, N * H].

        Raises:
            ValueError: packed sequences or a bias, which need Transformer Engine, as upstream.
        """
        if packed_seq_params is not None or attention_bias is not None:
            what = "a bias" if packed_seq_params is None else "packed sequences"
            raise ValueError(f"The attention of torch_native does not take {what}.")
        is_causal = self.attn_mask_type == AttnMaskType.causal and query.shape[0] > 1
        mask = None
        if attention_mask is not None:
            # Not minus infinity: a row that is masked whole, of padding, stays finite. It attends
            # to all by its scores; upstream's does so evenly.
            mask = torch.zeros_like(attention_mask, dtype=query.dtype)
            mask.masked_fill_(attention_mask, MASKED_SCORE)
        dropout = self.attention_dropout.p if self.training else 0.0
        attend = partial(
            torch.nn.functional.scaled_dot_product_attention,
            *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=is_causal and mask is None,
            scale=self._scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        if dropout and not self.config.sequence_parallel:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context_BNSH = attend()
        else:
            context_BNSH = attend()
        return context_BNSH.permute(2, 0, 1, 3).flatten(2)

    @property
    def _scale(self) -> float:
        """Upstream divides by the layer's number before the softmax and multiplies within it."""
        divided = self.config.apply_query_key_layer_scaling
        return self.softmax_scale * (self.layer_number if divided else 1)


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm; on the CPU, where PyTorch strings ten calls together, in fewer."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize the last dimension, in float32, and scale it."""
        if hidden.device.type == "cuda":
            return super().forward(hidden)
        return _RMSNormOnCPU.apply(hidden, self.weight, self.eps)


class _RMSNormOnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (wide * scale).mul_(weight).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        wide_weight = weight.float()
        normed = hidden * scale  # float32, as scale is
        by_normed = grad * normed
        mean = (by_normed @ wide_weight).div_(hidden.shape[-1]).unsqueeze(-1)
        grad_hidden = (grad * wide_weight).addcmul_(normed, mean, value=-1).mul_(scale)
        grad_weight = by_normed.flatten(0, -2).sum(0)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None


def native_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
) -> torch.nn.Module:
    """PyTorch's RMSNorm or LayerNorm, whose gradients are summed over sequence-parallel ranks."""
    cls = {"RMSNorm": RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
    norm = cls(hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


class TorchNativeSpecProvider(LocalSpecProvider):
    """Upstream's local modules, but for attention, norms and experts."""

    def __init__(self, plan: Plan) -> None:
        self.kept = plan.kept

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        """Which module to use for norms."""
        return native_norm

    def core_attention(self) -> type:
        """Which module to use for attention."""
        return super().core_attention() if "attention" in self.kept else ScaledDotProductAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """Which module to use for experts."""
        if "experts" in self.kept:
            return super().grouped_mlp_modules(moe_use_grouped_gemm)
        return GroupedExperts


def with_native_modules(
    spec: TransformerBlockSubmodules, plan: Plan, config: TransformerConfig
) -> TransformerBlockSubmodules:
    """A copy of upstream's local spec with this back end's modules.

    Upstream's functions that build it name their provider themselves, so there is none to hand in.
    """
    provider = TorchNativeSpecProvider(plan)
    layers: dict[int, Any] = {}  # upstream shares one spec object among all layers
    for layer in spec.layer_specs:
        if id(layer) not in layers:
            layers[id(layer)] = _native_layer(layer, provider, config)
    return dataclasses.replace(
        spec,
        layer_specs=[layers[id(layer)] for layer in spec.layer_specs],
        layer_norm=_norm_or(provider, spec.layer_norm),
    )


def _native_layer(layer: Any, provider: TorchNativeSpecProvider, config: TransformerConfig) -> Any:
    submodules = layer.submodules
    attention = copy.copy(submodules.self_attention)
    parts = {
        name: _norm_or(provider, getattr(attention.submodules, name))
        for name in ("q_layernorm", "k_layernorm")
        if hasattr(attention.submodules, name)
    }
    attention.submodules = dataclasses.replace(
        attention.submodules, core_attention=provider.core_attention(), **parts
    )

    mlp = submodules.mlp
    if isinstance(mlp, partial) and mlp.func is MoELayer:
        experts = provider.grouped_mlp_modules(config.moe_grouped_gemm)
        moe = dataclasses.replace(mlp.keywords["submodules"], experts=experts)
        mlp = partial(MoELayer, **(mlp.keywords | {"submodules": moe}))
    layer = copy.copy(layer)
    layer.submodules = dataclasses.replace(
        submodules,
        self_attention=attention,
        mlp=mlp,
        input_layernorm=_norm_or(provider, submodules.input_layernorm),
        pre_mlp_layernorm=_norm_or(provider, submodules.pre_mlp_layernorm),
    )
    return layer


def _norm_or(provider: TorchNativeSpecProvider, norm: Any) -> Any:
    """This back end's norm where upstream's spec has one that ``normalization`` names."""
    return norm if norm in (None, IdentityOp, L2Norm) else provider.layer_norm(rms_norm=True)
