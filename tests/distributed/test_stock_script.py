"""``python -m megatron_dynmoe.run`` with a script that knows nothing of dynamic routing."""

import shlex
from pathlib import Path

import pytest

from tests.distributed.harness import DTOP_P, TINY, Case, Results, add

pytestmark = [pytest.mark.distributed, pytest.mark.megatron]

SCRIPT = Path(__file__).with_name("stock_script.py")
SPEC = "--spec megatron_dynmoe.specs dynmoe_layer_spec"
RUN = "megatron_dynmoe.run:main"
EP2 = "--expert-model-parallel-size 2"


def stock(name: str, num_ranks: int, flags: str, **fields) -> Case:
    flags = f"{shlex.quote(str(SCRIPT))} {TINY} {flags}"
    return add(Case(f"stock_{name}", num_ranks, flags, entry=RUN, **fields))


OURS = add(Case("ours_ep2", 2, f"{TINY} {DTOP_P} {EP2}"))
WITH_SETTINGS = {
    "env": {"DYNMOE_CONFIG": "{dir}/dynmoe.yaml"},
    "files": {"dynmoe.yaml": "routing: dtop_p\ntarget_experts_per_token: 2\n"},
}
DYNAMIC = stock("dynamic", 2, f"{EP2} {SPEC}", **WITH_SETTINGS)
TOP_K = stock("top_k", 2, EP2)
NO_SETTINGS = stock("no_settings", 1, SPEC)
MISSPELLED = stock("misspelled", 1, "--hiden-size 32")
MISTAKE = stock("mistake", 1, f"{SPEC} --moe-expert-capacity-factor 1.0", **WITH_SETTINGS)


def test_the_spec_gives_what_our_entry_point_gives(results: Results) -> None:
    stock_script, ours = results[DYNAMIC], results[OURS]
    assert stock_script.losses == ours.losses
    assert stock_script.finalized == ours.finalized
    assert stock_script.thresholds == ours.thresholds
    assert "experts per token: " in stock_script.log()


def test_a_script_without_the_spec_stays_stock(results: Results) -> None:
    result = results[TOP_K]
    assert result.losses[-1] < result.losses[0]
    assert result.finalized == []


def test_a_misspelled_flag_is_one_line(results: Results) -> None:
    message = results.any(MISSPELLED).error
    assert message == "UsageError: there is no flag --hiden-size: did you mean --hidden-size?"
    assert "usage:" not in results.any(MISSPELLED).log()


def test_the_spec_needs_settings(results: Results) -> None:
    message = results.any(NO_SETTINGS).error.strip().splitlines()[-1]
    assert message.startswith("ValueError: DYNMOE_CONFIG is not set")


def test_the_spec_refuses_what_cannot_work(results: Results) -> None:
    message = results.any(MISTAKE).error.strip().splitlines()[-1]
    assert "FlagError: --moe-expert-capacity-factor is 1.0" in message
