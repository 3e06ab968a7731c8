"""What a run says at its start of what it rules out, and at its end of how to go on."""

import dataclasses
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_dynmoe.storage.megatron_names import TRACKER

pytestmark = pytest.mark.megatron

EXPORTABLE = {
    **{"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True},
    **{"add_bias_linear": False, "num_experts": 8, "ckpt_format": "torch_dist"},
}


def ruled_out(
    backend: str = "torch_native",
    kept: dict[str, str] | None = None,
    routing: str = "top_p",
    **changes,
) -> str:
    from megatron_dynmoe.backends.choice import BackEnd
    from megatron_dynmoe.training.notices import start_notes

    args = EXPORTABLE | {"save": "checkpoints", "load": None} | changes
    return "\n".join(
        start_notes(Namespace(**args), BackEnd(backend, "asked for", kept or {}), routing)
    )


def test_a_model_that_can_be_exported_gets_no_note() -> None:
    assert ruled_out() == ""


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type rope"),
        ({"normalization": "LayerNorm"}, "--normalization RMSNorm"),
        ({"swiglu": False}, "--swiglu"),
        ({"add_bias_linear": True}, "--disable-bias-linear"),
        ({"layernorm_zero_centered_gamma": True}, "leave out --apply-layernorm-1p"),
        ({"ckpt_format": "torch"}, "--ckpt-format is torch"),
    ],
)
def test_what_conversion_will_refuse_is_said_with_the_flag(changes, remedy) -> None:
    said = ruled_out(**changes)
    assert "exported to Hugging Face" in said and remedy in said and "\n" not in said


def test_a_routing_that_no_format_has_is_said(monkeypatch) -> None:
    from megatron_dynmoe.settings.routings import ROUTINGS

    row = dataclasses.replace(ROUTINGS["top_p"], is_exported=False)
    monkeypatch.setitem(ROUTINGS, "other", row)
    assert "because of its routing other, which no format has" in ruled_out(routing="other")


def test_the_note_and_the_converter_agree_on_every_setting() -> None:
    from megatron_dynmoe.conversion.megatron.settings import (
        NEEDED_OF_MEGATRON,
        config_from_megatron,
    )

    for needed in NEEDED_OF_MEGATRON:
        args = EXPORTABLE | {needed.name: not needed.value if needed.value else "other"}
        assert needed.otherwise in ruled_out(**args)
        with pytest.raises(ValueError, match=f"{needed.name} is .*which no format has"):
            config_from_megatron(Namespace(**args), 8, {})


def test_every_remedy_names_a_flag_of_megatrons_for_that_setting() -> None:
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    from megatron_dynmoe.conversion.megatron.settings import NEEDED_OF_MEGATRON

    parser = add_megatron_arguments(ArgumentParser())
    for needed in NEEDED_OF_MEGATRON:
        flag = next(word for word in needed.remedy.split() if word.startswith("--"))
        assert parser._option_string_actions[flag].dest == needed.name


def test_experts_with_biases_are_bound_to_expert_parallelism() -> None:
    bound = "cannot go on later without expert parallelism"
    assert bound in ruled_out("local", add_bias_linear=True)
    assert bound in ruled_out(kept={"experts": "biases"}, add_bias_linear=True)
    assert bound not in ruled_out("transformer_engine", add_bias_linear=True)
    assert bound not in ruled_out("local")
    assert bound not in ruled_out("local", add_bias_linear=True, num_experts=None)


def test_a_run_that_goes_on_hears_none_of_it_again(tmp_path: Path) -> None:
    changes = {"swiglu": False, "load": str(tmp_path), "save": str(tmp_path)}
    assert "--swiglu" in ruled_out(**changes)
    (tmp_path / TRACKER).write_text("4")
    assert ruled_out(**changes) == ""


def test_without_save_there_is_one_note() -> None:
    assert "nothing of this run will be kept" in ruled_out(save=None, swiglu=False)
    assert "Hugging Face" not in ruled_out(save=None, swiglu=False)


def said_at_the_end(stopped_by: str | None = None, ends: bool = True, **changes) -> str:
    from megatron_dynmoe.training.notices import how_to_resume

    args = {"run_dir": None, "save": None, "load": None, "curr_iteration": 5, "train_iters": 20}
    args |= {"train_samples": None, "lr_decay_iters": 20, "override_opt_param_scheduler": False}
    return how_to_resume(Namespace(**args | changes), stopped_by, ends)


def test_a_run_that_was_stopped_says_where_it_is_and_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("6\n")
    said = said_at_the_end("SIGINT", False, run_dir="runs/mine", save=str(tmp_path))
    assert said == (
        "stopped by SIGINT: iteration 6 of 20; the run is in runs/mine, last checkpoint: 6; "
        f"to go on: the same command with --load {tmp_path}"
    )
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / TRACKER).write_text("6")
    spaced = said_at_the_end("SIGINT", False, save=str(tmp_path / "my run"))
    assert spaced.endswith(f"the same command with --load '{tmp_path / 'my run'}'")  # for a shell
    again = said_at_the_end("SIGINT", False, save=str(tmp_path), load=f"{tmp_path}/.")
    assert again.endswith(f"are in {tmp_path}, last checkpoint: 6; to go on: the same command")


def test_a_finished_run_says_how_to_train_further(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("20")
    said = said_at_the_end(save=str(tmp_path), curr_iteration=19)
    assert said.startswith("finished: iteration 20 of 20; ")
    longer = "and a larger --train-iters"
    assert said.endswith(f"--load {tmp_path} {longer} and --override-opt-param-scheduler")
    assert said_at_the_end(save=str(tmp_path), lr_decay_iters=50).endswith(longer)


def test_what_was_not_kept_is_not_named(tmp_path: Path) -> None:
    assert "nothing was kept" in said_at_the_end()
    assert said_at_the_end(save=str(tmp_path)).endswith("no checkpoint was saved")
