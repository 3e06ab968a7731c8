"""What cannot work ends at start-up, with one line that names flag, reason and remedy."""

import pytest

from tests.distributed.harness import DTOP_P, TINY, Case, Results, add

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

MISTAKES = {
    "--sequence-parallel --tensor-model-parallel-size 2 --moe-dynamic-backend local": (
        "the norms of local",
        "torch_native",
    ),
    "--moe-dynamic-backend torch_native --disable-bias-linear --softmax-type off-by-one": (
        "attention cannot do softmax_type off-by-one",
        "auto",
    ),
    "--moe-dynamic-backend transformer_engine": ("not installed", "use auto or torch_native"),
    "--transformer-impl transformer_engine --moe-dynamic-backend local": (
        "--moe-dynamic-backend is 'local', which needs local",
    ),
    "--moe-expert-capacity-factor 1.0": ("fixed number", "--moe-dynamic-max-experts-per-token"),
    "--moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity": ("fixed number",),
    "--mtp-num-layers 1": ("top-k", "leave it out"),
    "--moe-token-dispatcher-type flex": ("deep_ep cannot be imported", "use alltoall"),
    "--moe-router-load-balancing-type sinkhorn": ("sinkhorn", "seq_aux_loss"),
    "--moe-router-score-function sigmoid": ("sum to 1", "use softmax"),
    "--moe-router-enable-expert-bias": ("top-p's rule", "balance with --moe-aux-loss-coeff"),
    "--moe-dynamic-target-experts-per-token 9": ("use 1 to 8",),
    "--moe-dynamic-max-experts-per-token 0": ("use 1 to 8",),
    "--moe-dynamic-threshold 0.4": ("use --moe-dynamic-initial-threshold",),
    "--moe-dynamic-integral-gain 0": ("auto",),
    "--hybrid-layer-pattern M*E*": ("M is Mamba, which has no CPU kernel", "use * for attention"),
    "--spec megatron_dynmoe.specs dynmoe_layer_spec": ("itself", "leave it out"),
    "--sft": ("--sft", "pretrain_gpt.py"),
    "--lr 1e-4": ("Megatron refuses", "it requires: --min-lr <= --lr."),
    "--start-weight-decay 0.1": ("it requires: --start-weight-decay is not given.",),
    "--save {dir}/refused": ("--save-interval is not given", "--run-dir"),
}
CASES = {
    flags: add(Case(f"refused_{number}", 1, f"{TINY} {DTOP_P} {flags}"))
    for number, flags in enumerate(MISTAKES)
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_named_at_start_up(results: Results, flags: str) -> None:
    result = results.any(CASES[flags])
    assert result.error, f"{flags} was accepted"
    message = result.error.strip().splitlines()[-1]
    assert message.startswith("UsageError: "), message
    for part in (flags.split()[0], *MISTAKES[flags]):
        assert part in message
    assert result.ranks[0]["steps"] == []
