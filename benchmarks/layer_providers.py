"""MoE layers of several routings and back ends, each with its input."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from benchmarks import measure, profiling
from benchmarks.logits import normal_logits, read_logits, trained_logits

OURS, STOCK, DENSE = "ours", "stock top-k, local", "dense"
CPU_SCALE = 4
BALANCE_LOSS = ("seq_aux_loss", 1e-2)


class Workload(NamedTuple):
    """Sizes of a layer and of its input."""

    hidden: int
    ffn: int
    experts: int
    mean: int  # experts per token
    sequence: int
    sequences: int

    @property
    def tokens(self) -> int:
        return self.sequence * self.sequences

    def scaled_down(self) -> Workload:
        """For a CPU."""
        smaller = {name: getattr(self, name) // CPU_SCALE for name in ("hidden", "ffn", "sequence")}
        return self._replace(**smaller)

    def flops(self, experts_per_token: float, dense: bool = False) -> float:
        """FLOPs of the matrix products, forward and (twice as many) backward."""
        per_token = 6 * experts_per_token * self.hidden * self.ffn
        per_token += 0 if dense else 2 * self.hidden * self.experts
        return 3 * self.tokens * per_token

    def least_bytes(self, itemsize: int, dense: bool = False) -> float:
        """Bytes: weights, read twice, and their gradients; input, output and both gradients."""
        experts = self.mean if dense else self.experts
        weights = 3 * experts * self.hidden * self.ffn
        return itemsize * (3 * weights + 5 * self.tokens * self.hidden)


WORKLOADS = {
    "a": Workload(hidden=1024, ffn=2816, experts=16, mean=2, sequence=2048, sequences=8),
    "b": Workload(hidden=1536, ffn=256, experts=128, mean=8, sequence=2048, sequences=12),
    "c": Workload(hidden=2048, ffn=896, experts=64, mean=8, sequence=2048, sequences=4),
}


@dataclass
class Provider:
    """A layer and its input.

    Attributes:
        experts_per_token: mean on this input; measured if it varies.
        kernels: DYNMOE_KERNELS, or nothing.
    """

    layer: Any
    hidden_SBD: torch.Tensor
    gradient_SBD: torch.Tensor
    experts_per_token: float
    kernels: str

    def clear(self) -> None:
        self.output = None
        self.hidden_SBD.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None

    def forward(self) -> None:
        os.environ["DYNMOE_KERNELS"] = self.kernels
        self.output = self.layer(self.hidden_SBD)[0]

    def backward(self) -> None:
        self.output.backward(self.gradient_SBD)

    def timed(self) -> tuple[float, ...]:
        """Seconds of the forward and of the backward pass."""
        self.clear()
        return measure.timed(self.forward, self.backward)

    def memory(self) -> profiling.PassMemory:
        self.clear()
        return profiling.memory(self.forward, self.backward)

    def operations(self) -> str:
        self.clear()
        return profiling.operations(lambda: (self.forward(), self.backward()))


def logits_for(workload: Workload, path: Path | None) -> tuple[str, torch.Tensor]:
    """Their kind, and [T, E].

    Args:
        path: of a trained router's; None: those of this project for 16 experts, normal ones else.

    Raises:
        ValueError: there are none in the file, or of another number of experts.
    """
    if path is not None:
        logits_TE = read_logits(path)
        if logits_TE.shape[1] != workload.experts:
            raise ValueError(
                f"--logits {path} is for {logits_TE.shape[1]} experts, the workload has "
                f"{workload.experts}: name one that fits by --workloads"
            )
        repeated = logits_TE.repeat(-(-workload.tokens // len(logits_TE)), 1)
        return "trained", repeated[: workload.tokens]
    if workload.experts == 16:
        return "trained", trained_logits(workload.tokens)
    return "normal", normal_logits(workload.tokens, workload.experts)


@functools.cache
def start_megatron() -> None:
    """Make process groups of this process alone."""
    from megatron_dynmoe.run import prepare

    prepare()  # before anything of Megatron's is imported
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "nccl" if measure.on_gpu() else "gloo",
            store=torch.distributed.HashStore(),
            rank=0,
            world_size=1,
        )
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def factories(
    workload: Workload, logits: Path | None, dtype: torch.dtype
) -> dict[str, tuple[Any, ...]]:
    """All that run here: name to the function that makes it and its arguments.

    They have the same input, whose first hidden states are the logits (:func:`logits_for`).
    """
    if not measure.on_gpu():
        start_megatron()  # this process runs them, and what comes imports Megatron
    from megatron_dynmoe import kernels
    from megatron_dynmoe.backends.choice import has_transformer_engine

    make = (make_provider, workload, logits, dtype)
    os.environ["DYNMOE_KERNELS"] = "1"
    has_kernels = kernels.available(torch.device("cuda" if measure.on_gpu() else "cpu"))
    best = "1" if has_kernels else ""
    found: dict[str, tuple[Any, ...]] = {OURS: (*make, "dtop_p", "torch_native", best)}
    if has_kernels:
        found["ours, experts fused"] = (*make, "dtop_p", "torch_native", "fused")
        found["ours, no kernels"] = (*make, "dtop_p", "torch_native", "")
    found["ours, worst-case rows"] = (*make, "dtop_p", "torch_native", best, 2)
    found["plain reference"] = (*make, "dtop_p", "local", "")
    backends = ["local", "torch_native"]
    backends += ["transformer_engine"] if has_transformer_engine() else []
    for backend in backends:
        found[f"stock top-k, {backend}"] = (*make, "top_k", backend, "")
    found[DENSE] = (*make, "dense", "torch_native", "")
    return found


def make_provider(
    workload: Workload,
    logits: Path | None,
    dtype: torch.dtype,
    routing: str,
    backend: str,
    kernels: str,
    room: int | None = None,
) -> Provider:
    """One of them, in this process.

    Args:
        kernels: DYNMOE_KERNELS, or nothing.
        room: with DTop-p, allocate rows for this many times the mean instead of counting them. The
            host then does not wait, and a token uses no more experts than that.
    """
    start_megatron()
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dynmoe.model.prepare import prepare_training
    from megatron_dynmoe.model.settled import settle_run
    from megatron_dynmoe.model.spec import layer_spec
    from megatron_dynmoe.settings.config import DynMoEConfig

    loss, coefficient = BALANCE_LOSS
    dynmoe = DynMoEConfig(backend=backend)
    settings: dict[str, Any] = {
        "num_moe_experts": workload.experts,
        "moe_ffn_hidden_size": workload.ffn,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_topk": workload.mean,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": loss,
        "moe_aux_loss_coeff": coefficient,
        "moe_grouped_gemm": backend == "transformer_engine",
    }
    if routing == "dtop_p":
        settings |= {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
        dynmoe = DynMoEConfig(
            routing=routing,
            target_experts_per_token=workload.mean,
            balance_loss=loss,
            balance_loss_coeff=coefficient,
            max_experts_per_token=room and room * workload.mean,
            row_buffer="worst_case" if room else None,
            backend=backend,
        )
    elif routing == "dense":
        settings = {"ffn_hidden_size": workload.mean * workload.ffn}
    config = TransformerConfig(
        num_layers=1,
        hidden_size=workload.hidden,
        num_attention_heads=max(1, workload.hidden // 64),
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=measure.on_gpu(),  # as in training
        add_bias_linear=False,
        use_cpu_initialization=not measure.on_gpu(),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        transformer_impl="transformer_engine" if backend == "transformer_engine" else "local",
        **settings,
    )
    torch.manual_seed(1)
    settled = settle_run(dynmoe.resolve(config.num_moe_experts), config)
    prepare_training(settled, config)
    spec = layer_spec(SimpleNamespace(transformer=config), settled=settled)
    layer = spec.layer_specs[0].submodules.mlp(
        config=config,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        is_mtp_layer=False,
    )
    if not measure.on_gpu():
        layer = layer.to(dtype)
    hidden_SBD, gradient_SBD = _input(workload, logits_for(workload, logits)[1], dtype)
    experts = float(workload.mean)
    if routing != "dense":
        layer.set_layer_number(1)
        with torch.no_grad():
            torch.nn.init.eye_(layer.router.weight)  # passes the first hidden states on
        if routing == "dtop_p":
            experts = _calibrate(layer.router, hidden_SBD, workload)
    return Provider(layer, hidden_SBD, gradient_SBD, experts, kernels)


def _input(
    workload: Workload, logits_TE: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, a leaf, and the gradient of what becomes of them; both [S, B, D]."""
    generator = torch.Generator().manual_seed(0)
    shape = (workload.sequence, workload.sequences, workload.hidden)
    hidden_SBD, gradient_SBD = (torch.randn(shape, generator=generator) for _ in range(2))
    hidden_SBD[..., : workload.experts] = logits_TE.view(*shape[:2], -1)
    device = torch.device("cuda" if measure.on_gpu() else "cpu")
    hidden_SBD, gradient_SBD = (t.to(device, dtype) for t in (hidden_SBD, gradient_SBD))
    return hidden_SBD.requires_grad_(), gradient_SBD


@torch.no_grad()
def _calibrate(router: Any, hidden_SBD: torch.Tensor, workload: Workload) -> float:
    """Set the router's threshold for the mean on its input; returns the mean that this gives."""
    from megatron_dynmoe.control.calibrate import threshold_for_target
    from megatron_dynmoe.routing.normalize import normalize

    logits_TE = hidden_SBD[..., : workload.experts].reshape(-1, workload.experts).float()
    probs_TE = normalize(logits_TE, 1.0).softmax(-1)
    cap = router.dynmoe.max_experts_per_token
    router.threshold.fill_(threshold_for_target(probs_TE, workload.mean, cap))
    _, map_TE = router.routing(logits_TE.view(*hidden_SBD.shape[:2], -1))
    return map_TE.sum().item() / len(map_TE)
