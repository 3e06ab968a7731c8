"""A run that goes on without its optimizer says that its learning rate begins anew."""

from argparse import Namespace

import pytest

from megatron_dynmoe.checkpoints.saved_arguments import tell_new_schedule

pytestmark = pytest.mark.megatron


@pytest.fixture
def said(capsys):
    """What a run with ``--no-load-optim`` says, if these arguments are otherwise."""

    def said(consumed=32, **changes):
        args = dict.fromkeys(("finetune", "skip_train", "train_samples"))
        args |= dict.fromkeys(("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"))
        args |= {"rank": 0, "lr_decay_style": "cosine"} | changes
        tell_new_schedule(Namespace(**args), Namespace(consumed_train_samples=consumed))
        return capsys.readouterr().out

    return said


def test_a_schedule_that_begins_anew_is_told(said):
    note = said()
    assert note.startswith("> note: --no-load-optim also begins the schedule")
    assert " 32 samples into the run" in note and "give --lr-decay-iters what is left" in note
    assert "--lr-decay-samples" in said(train_samples=640)
    assert said(lr_decay_style="constant", lr_warmup_iters=3)
    assert not said(rank=1)  # one rank says it


@pytest.mark.parametrize(
    "changes",
    [
        {"finetune": True},
        {"skip_train": True},
        {"lr_decay_style": "constant"},
        {"consumed": 0},  # a converted model
        {"consumed": None},
    ],
    ids=str,
)
def test_nothing_is_told_of_a_schedule_that_begins_with_the_run_or_has_no_shape(said, changes):
    assert not said(**changes)
