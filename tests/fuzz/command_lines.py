"""Random command lines: a small model that trains, with some flags changed, added or left out.

Ours are drawn from the settings' own metadata, values of every kind among them that make no sense.
Upstream's are a list of those that matter to a model, its layout and its optimizer.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from megatron_dynmoe.settings.config import SETTINGS, Setting

# A flag and its value: None if it takes none, a list if it takes several.
Flags = dict[str, str | None]

# Two steps of this take some ten milliseconds.
BASE: Flags = {
    "--num-layers": "2",
    "--hidden-size": "32",
    "--ffn-hidden-size": "64",
    "--num-attention-heads": "4",
    "--seq-length": "16",
    "--max-position-embeddings": "32",
    "--micro-batch-size": "2",
    "--global-batch-size": "4",
    "--train-iters": "2",
    "--lr": "1e-3",
    "--mock-data": None,
    "--tokenizer-type": "NullTokenizer",
    "--vocab-size": "120",
    "--make-vocab-size-divisible-by": "8",
    "--normalization": "RMSNorm",
    "--swiglu": None,
    "--disable-bias-linear": None,
    "--position-embedding-type": "rope",
    "--untie-embeddings-and-output-weights": None,
    "--num-experts": "4",
    "--log-interval": "1",
    "--eval-iters": "0",
    "--eval-interval": "1000",
    "--num-workers": "0",
    "--distributed-timeout-minutes": "1",
}
# What may be left out of it.
OPTIONAL = (
    *("--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--num-experts", "--position-embedding-type", "--normalization"),
)
SWITCH = (None,)
# Upstream's flags, with values that work, do not, or make no sense.
UPSTREAM: dict[str, tuple[str | None, ...]] = {
    # the model
    "--num-layers": ("1", "3", "4"),
    "--hidden-size": ("16", "48", "33"),
    "--ffn-hidden-size": ("1", "63", "128"),
    "--num-attention-heads": ("1", "2", "3"),
    "--group-query-attention": SWITCH,
    "--num-query-groups": ("1", "2", "3"),
    "--kv-channels": ("8", "4"),
    "--seq-length": ("1", "2", "32", "33"),
    "--vocab-size": ("1", "7", "1000"),
    "--normalization": ("LayerNorm", "RMSNorm"),
    "--apply-layernorm-1p": SWITCH,
    "--qk-layernorm": SWITCH,
    "--qk-l2-norm": SWITCH,
    "--position-embedding-type": ("learned_absolute", "none", "relative", "yarn"),
    "--rotary-percent": ("0.5", "0"),
    "--rotary-interleaved": SWITCH,
    "--softmax-type": ("off-by-one", "learnable"),
    "--window-size": ("8,0",),
    "--attention-backend": ("local", "flash", "unfused"),
    "--attention-softmax-in-fp32": SWITCH,
    "--attention-output-gate": SWITCH,
    "--multi-latent-attention": SWITCH,
    "--add-qkv-bias": SWITCH,
    "--squared-relu": SWITCH,
    "--quick-geglu": SWITCH,
    "--activation-func-clamp-value": ("1.0",),
    "--glu-linear-offset": ("1.0",),
    "--use-mup": SWITCH,
    "--mtp-num-layers": ("0", "1"),
    "--hidden-dropout": ("0", "0.5"),
    "--attention-dropout": ("0", "0.5"),
    "--init-method-std": ("0", "1"),
    "--apply-residual-connection-post-layernorm": SWITCH,
    "--fp32-residual-connection": SWITCH,
    "--cross-entropy-loss-fusion": SWITCH,
    "--spec": ("megatron_dynmoe.specs dynmoe_layer_spec",),
    "--hybrid-layer-pattern": ("*E*E",),
    "--transformer-impl": ("local", "transformer_engine", "inference_optimized"),
    # experts
    "--num-experts": ("0", "1", "2", "3", "16", "64"),
    "--moe-ffn-hidden-size": ("1", "16", "48"),
    "--moe-layer-freq": ("1", "2", "[0,1]", "([1]*2)", "[0,0]", "[1]", "0", "-1", "[]", "x"),
    "--moe-shared-expert-intermediate-size": ("0", "32"),
    "--moe-shared-expert-gate": SWITCH,
    "--moe-shared-expert-overlap": SWITCH,
    "--moe-grouped-gemm": SWITCH,
    "--moe-permute-fusion": SWITCH,
    "--moe-token-dispatcher-type": ("alltoall", "allgather", "flex"),
    "--moe-router-load-balancing-type": (
        *("aux_loss", "seq_aux_loss", "global_aux_loss", "none", "sinkhorn"),
        *("quantile_balancing", "aux_loss seq_aux_loss"),
    ),
    "--moe-aux-loss-coeff": ("0", "0.01", "-1", "nan", "0.01 0.1"),
    "--moe-z-loss-coeff": ("0", "0.001"),
    "--moe-input-jitter-eps": ("0.1",),
    "--moe-router-topk": ("0", "1", "2", "4", "5"),
    "--moe-router-dtype": ("fp32", "fp64"),
    "--moe-router-score-function": ("softmax", "sigmoid"),
    "--moe-router-pre-softmax": SWITCH,
    "--moe-router-enable-expert-bias": SWITCH,
    "--moe-router-num-groups": ("2",),
    "--moe-router-group-topk": ("1",),
    "--moe-router-topk-scaling-factor": ("2.5",),
    "--moe-router-force-load-balancing": SWITCH,
    "--moe-router-force-biased": ("1.0",),
    "--moe-router-fusion": SWITCH,
    "--moe-router-padding-for-quantization": SWITCH,
    "--moe-expert-capacity-factor": ("1.0",),
    "--moe-pad-expert-input-to-capacity": SWITCH,
    "--moe-token-drop-policy": ("position",),
    "--moe-layer-recompute": SWITCH,
    "--moe-per-layer-logging": SWITCH,
    "--moe-use-upcycling": SWITCH,
    "--moe-latent-size": ("16",),
    "--moe-apply-probs-on-input": SWITCH,
    "--moe-enable-routing-replay": SWITCH,
    "--overlap-moe-expert-parallel-comm": SWITCH,
    "--delay-wgrad-compute": SWITCH,
    # memory and precision
    "--recompute-granularity": ("full", "selective"),
    "--recompute-method": ("uniform", "block"),
    "--recompute-num-layers": ("1", "2"),
    "--recompute-modules": ("core_attn", "moe", "moe_act layernorm", "mlp shared_experts", "x"),
    "--cpu-offloading-num-layers": ("1",),
    "--bf16": SWITCH,
    "--fp16": SWITCH,
    "--fp8-format": ("e4m3",),
    "--loss-scale": ("1024",),
    "--grad-reduce-in-bf16": SWITCH,
    "--accumulate-allreduce-grads-in-fp32": SWITCH,
    "--cuda-graph-impl": ("local", "full_iteration"),
    "--disable-jit-fuser": SWITCH,
    "--no-masked-softmax-fusion": SWITCH,
    "--no-bias-swiglu-fusion": SWITCH,
    # optimizer and batches
    "--optimizer": ("adam", "sgd", "muon", "lion", "soap"),
    "--use-distributed-optimizer": SWITCH,
    "--overlap-grad-reduce": SWITCH,
    "--overlap-param-gather": SWITCH,
    "--optimizer-cpu-offload": SWITCH,
    "--use-precision-aware-optimizer": SWITCH,
    "--use-torch-fsdp2": SWITCH,
    "--use-megatron-fsdp": SWITCH,
    "--num-distributed-optimizer-instances": ("2",),
    "--lr": ("0", "-1", "1e30", "nan"),
    "--min-lr": ("1e-4", "1"),
    "--lr-decay-style": ("constant", "cosine", "WSD"),
    "--lr-warmup-fraction": ("0.5", "1.5"),
    "--weight-decay": ("0", "0.1"),
    "--clip-grad": ("0", "1e-6"),
    "--calculate-per-token-loss": SWITCH,
    "--micro-batch-size": ("0", "1", "3", "4"),
    "--global-batch-size": ("1", "2", "6", "7"),
    "--step-batch-size-schedule": ("0:2 1:4", "0:3"),
    "--rampup-batch-size": ("2 2 4",),
    "--train-iters": ("1", "0"),
    "--train-samples": ("8",),
    "--eval-iters": ("1",),
    "--eval-interval": ("1", "0"),
    "--skip-train": SWITCH,
    "--dataloader-type": ("cyclic", "single"),
    "--reset-position-ids": SWITCH,
    "--reset-attention-mask": SWITCH,
    "--eod-mask-loss": SWITCH,
    "--no-create-attention-mask-in-dataloader": SWITCH,
    "--split": ("90,5,5", "1,0", "0,0,0"),
    "--seed": ("1", "0", "-1"),
    # what a run says and checks
    "--log-interval": ("2", "0"),
    "--tensorboard-log-interval": ("2", "0"),
    "--log-throughput": SWITCH,
    "--log-params-norm": SWITCH,
    "--log-num-zeros-in-grad": SWITCH,
    "--check-for-spiky-loss": SWITCH,
    "--no-check-for-nan-in-loss-and-grad": SWITCH,
    "--rerun-mode": ("disabled", "report_stats"),
    "--exit-interval": ("1",),
    "--iterations-to-skip": ("1",),
    "--manual-gc": SWITCH,
    "--deterministic-mode": SWITCH,
    "--live-plot": SWITCH,
    "--sft": SWITCH,
}
# Of one rank mostly impossible, of two possible or not.
LAYOUT: dict[str, tuple[str | None, ...]] = {
    "--tensor-model-parallel-size": ("2",),
    "--sequence-parallel": SWITCH,
    "--pipeline-model-parallel-size": ("2",),
    "--num-layers-per-virtual-pipeline-stage": ("1",),
    "--num-virtual-stages-per-pipeline-rank": ("2",),
    "--decoder-first-pipeline-num-layers": ("1", "2"),
    "--pipeline-model-parallel-layout": ("Et|tL", "Ett|L", "t|t"),
    "--expert-model-parallel-size": ("2",),
    "--expert-tensor-parallel-size": ("1", "2"),
    "--context-parallel-size": ("2",),
    "--cp-comm-type": ("a2a", "p2p"),
    "--num-layers": ("4",),
}
_STRANGE_FLOATS = st.one_of(st.floats(), st.sampled_from((-1.0, 0.0, 1.0, 2.0, 1e30, 1e-30)))
# Nothing is learned from letters beyond ASCII; a line feed or zero byte is no command line.
_TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=6)


@dataclass(frozen=True)
class CommandLine:
    """The flags of one trial."""

    num_ranks: int
    flags: tuple[tuple[str, str | None], ...]

    @property
    def arguments(self) -> list[str]:
        """As the shell would hand them over."""
        return [word for flag, value in self.flags for word in _words(flag, value)]

    def __str__(self) -> str:
        """A line to paste into a shell."""
        start = f"torchrun --standalone --nproc-per-node {self.num_ranks}"
        return f"{start} -m megatron_dynmoe.pretrain {shlex.join(self.arguments)}"


def _words(flag: str, value: str | None) -> list[str]:
    if value is None:
        return [flag]
    # An equals sign, or a negative number would be taken for a flag.
    return [flag, *value.split(" ")] if " " in value else [f"{flag}={value}"]


@st.composite
def command_lines(draw: st.DrawFn) -> CommandLine:
    """A random command line; about half of them train."""
    flags = dict(BASE)
    for flag in draw(_few(OPTIONAL, 1)):
        del flags[flag]
    num_ranks = draw(st.sampled_from((1, 1, 2)))
    layout = draw(_few(LAYOUT, 3)) if num_ranks == 2 else []
    for flag in [*draw(_few(UPSTREAM, 4)), *layout]:
        flags[flag] = draw(st.sampled_from((UPSTREAM | LAYOUT)[flag]))
    routing = draw(st.sampled_from(("top_k", "top_p", "dtop_p", "dtop_p", "dtop_p", None)))
    ours: Flags = {} if routing is None else {"routing": routing}
    if routing == "dtop_p":
        ours["target_experts_per_token"] = "2"
    is_sound = draw(st.sampled_from((True, True, False)))
    for name in draw(_few(_settings_of(routing) if is_sound else SETTINGS, 3)):
        good, strange = _values_of(SETTINGS[name])
        ours[name] = str(draw(good if is_sound else st.one_of(good, strange)))
    flags |= {"--moe-dynamic-" + name.replace("_", "-"): text for name, text in ours.items()}
    return CommandLine(num_ranks, tuple(flags.items()))


def _settings_of(routing: str | None) -> list[str]:
    if routing in (None, "top_k"):
        return ["backend"]
    mark = "dtop_p:" if routing == "top_p" else "top_p:"  # how the help of the other's begins
    return [n for n, s in SETTINGS.items() if n != "routing" and not s.help.startswith(mark)]


def _few(names: Any, most: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(list(names)), max_size=most, unique=True)


def _values_of(setting: Setting) -> tuple[st.SearchStrategy[Any], st.SearchStrategy[Any]]:
    """Values of a setting's kind, which may still not fit the others, and strange ones."""
    if setting.kind == "choice":
        return st.sampled_from(setting.choices), _TEXT
    if setting.kind == "int":
        return st.integers(1, 4), st.one_of(st.integers(), st.floats(), _TEXT)
    if setting.kind == "schedule":
        points = st.dictionaries(st.integers(0, 3), st.floats(1, 4), min_size=1, max_size=3)
        strange = st.dictionaries(st.integers(), _STRANGE_FLOATS, max_size=3)
        return points.map(_schedule), st.one_of(_STRANGE_FLOATS, strange.map(_schedule), _TEXT)
    good = st.floats(0, 1)
    if setting.kind == "float_or_auto":
        return st.one_of(good, st.just("auto")), st.one_of(_STRANGE_FLOATS, _TEXT)
    return good, st.one_of(_STRANGE_FLOATS, _TEXT)


def _schedule(points: dict[int, float]) -> str:
    return ",".join(f"{iteration}:{points[iteration]}" for iteration in sorted(points))
