"""What the study trains: the variants of the routing, and the model, data and steps they share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

TARGET = 2.0  # mean experts per token, of 16
NUM_EXPERTS = 16
SEEDS = 3  # of the main variants; the others have one

_TOP_P_04 = "--moe-dynamic-routing top_p --moe-dynamic-threshold 0.4 "
# DTop-p's baseline: its losses and weights, with a fixed threshold.
_FIXED = (
    "--moe-dynamic-routing top_p --moe-dynamic-weights renormalized "
    "--moe-dynamic-dynamic-loss-coeff 1e-3 "
)
# For 64 experts and 100 B tokens DTop-p's authors take 1e-4, with which a model this small lets
# single experts take ten times the mean load (docs/log.md).
_BALANCE = "--moe-dynamic-balance-loss-coeff 1e-2 "


def top_k(k: int) -> str:
    """The flags of top-k, with the balance loss of the others, which Megatron divides by k."""
    # Softmax over the one selected expert would give the router no gradient.
    weights = "--moe-router-pre-softmax " if k == 1 else ""
    return (
        "--moe-router-dtype fp32 --moe-router-load-balancing-type seq_aux_loss "
        f"--moe-router-topk {k} {weights}--moe-aux-loss-coeff {k}e-2"
    )


def dtop_p(target: float = TARGET) -> str:
    """The flags of DTop-p at a mean number of experts per token."""
    return (
        f"--moe-dynamic-routing dtop_p --moe-dynamic-target-experts-per-token {target:g} {_BALANCE}"
    )


@dataclass(frozen=True)
class Variant:
    """One routing.

    Attributes:
        name: its name in folders and results.
        title: its name in tables and plots.
        flags: what distinguishes it from the others.
        num_seeds: number of trainings, with the seeds 1, 2, ...
        tokens: what it is trained on, times the tokens of the size.
    """

    name: str
    title: str
    flags: str
    num_seeds: int = 1
    tokens: float = 1.0


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("top2", "top-2", top_k(2), SEEDS),
        Variant("dtop_p", "DTop-p, target 2", dtop_p(), SEEDS),
        Variant("top_p_04", "top-p 0.4 with dynamic loss", _TOP_P_04, SEEDS),
        Variant(
            "fixed_020",
            "fixed top-p 0.2",
            _FIXED + _BALANCE + "--moe-dynamic-threshold 0.2",
            SEEDS,
        ),
        # As wide as the two experts of a token.
        Variant("dense", "dense, equal active size", "--ffn-hidden-size {twice_ffn}"),
        Variant("top1", "top-1", top_k(1)),
        Variant(
            "top_p_04_no_dynamic_loss",
            "top-p 0.4 without dynamic loss",
            _TOP_P_04 + "--moe-dynamic-dynamic-loss-coeff 0",
        ),
        Variant(
            "fixed_030",
            "fixed top-p 0.3",
            _FIXED + _BALANCE + "--moe-dynamic-threshold 0.3",
        ),
        Variant("no_drn", "DTop-p without DRN", dtop_p() + "--moe-dynamic-normalization none"),
        # The threshold at which DTop-p begins.
        Variant(
            "no_controller",
            "DRN without controller",
            _FIXED + _BALANCE + "--moe-dynamic-normalization drn --moe-dynamic-threshold 0.3322",
        ),
        Variant("by_layer", "DTop-p by layer", dtop_p() + "--moe-dynamic-scope layer"),
    )
}


@dataclass(frozen=True)
class Size:
    """The model and the steps that all variants share.

    Attributes:
        name: the name of the file of results.
        ffn: hidden size of an expert.
        flags: the model, the batch and the optimizer.
        vocab_size: size of the tokenizer that is trained on the study's text.
        steps: training steps of a run.
        num_evaluations: how often a run is evaluated while it trains.
        eval_iters: batches of such an evaluation.
        jobs: how many runs train at a time.
        recorded: whether results of this size are kept in study/results.
    """

    name: str
    ffn: int
    flags: str
    vocab_size: int
    tokens_per_step: int
    steps: int
    num_evaluations: int
    eval_iters: int
    jobs: int
    recorded: bool = True

    @property
    def sequence_length(self) -> int:
        return self._number("--seq-length")

    @property
    def sizes(self) -> dict[str, object]:
        """What the flags of a variant may name: widths, and which layers have experts."""
        but_the_first = f"([0]+[1]*{self._number('--num-layers') - 1})"
        return {"ffn": self.ffn, "twice_ffn": 2 * self.ffn, "but_the_first": but_the_first}

    def scaled(self, factor: float) -> Size:
        """The same with more or fewer tokens a run, which is not recorded."""
        eighths = max(1, round(factor * self.steps / self.num_evaluations))
        return dataclasses.replace(self, steps=eighths * self.num_evaluations, recorded=False)

    def _number(self, flag: str) -> int:
        flags = self.flags.split()
        return int(flags[flags.index(flag) + 1])


_COMMON = (
    "--normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--lr-decay-style cosine --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 "
)
SIZES = {
    size.name: size
    for size in (
        # The quickstart's model and batch, one process of one thread a run.
        Size(
            name="cpu",
            ffn=256,
            flags=_COMMON + "--num-layers 6 --hidden-size 128 --ffn-hidden-size 256 "
            "--num-attention-heads 4 --seq-length 256 --max-position-embeddings 256 "
            "--micro-batch-size 8 --global-batch-size 8 --lr 2e-3 --min-lr 2e-4 --num-workers 0",
            vocab_size=4096,
            tokens_per_step=2048,
            steps=504,
            num_evaluations=4,
            eval_iters=59,  # as much as there is held-out text
            jobs=2,
        ),
        Size(
            name="gpu",
            ffn=1024,
            flags=_COMMON + "--num-layers 12 --hidden-size 512 --ffn-hidden-size 1024 "
            "--num-attention-heads 8 --seq-length 1024 --max-position-embeddings 1024 "
            "--micro-batch-size 16 --global-batch-size 64 --lr 6e-4 --min-lr 6e-5 --bf16",
            vocab_size=16384,
            tokens_per_step=65536,
            steps=3000,
            num_evaluations=10,
            eval_iters=16,
            jobs=1,
        ),
        # To see whether everything works; its results mean nothing.
        Size(
            name="quick",
            ffn=64,
            flags=_COMMON + "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 "
            "--num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
            "--micro-batch-size 8 --global-batch-size 8 --lr 2e-3 --min-lr 2e-4 --num-workers 0",
            vocab_size=1024,
            tokens_per_step=512,
            steps=12,
            num_evaluations=2,
            eval_iters=1,
            jobs=2,
            recorded=False,
        ),
    )
}


def training_flags(variant: Variant, size: Size, seed: int) -> list[str]:
    """All flags that say what is trained, without paths.

    Later flags override earlier ones.
    """
    interval = size.steps // size.num_evaluations
    experts = f"--num-experts {NUM_EXPERTS} --moe-token-dispatcher-type alltoall "
    text = (
        f"{size.flags} {'' if variant.name == 'dense' else experts}"
        f"{variant.flags.format(**size.sizes)} --seed {seed} "
        f"--train-iters {size.steps} --lr-warmup-iters {size.steps // 10} "
        f"--eval-interval {interval} --eval-iters {size.eval_iters} "
        f"--log-interval {max(1, interval // 4)}"
    )
    return text.split()
