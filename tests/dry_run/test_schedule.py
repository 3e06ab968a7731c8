"""Which micro-batches are run, and what one of the middle stands for."""

import pytest

from megatron_dynmoe.dry_run.recording.recorder import Moment
from megatron_dynmoe.dry_run.recording.schedule import MicroBatches


@pytest.mark.parametrize(
    ("planned", "pipeline", "stage", "chunks", "run", "middle"),
    [
        (1, 1, 0, 1, 1, 1),
        (512, 1, 0, 1, 3, 1),  # one before, one of the middle, one after
        (8, 2, 0, 1, 5, 2),  # one more is ahead of the backward pass
        (8, 2, 1, 1, 3, 1),
        (4, 2, 0, 1, 4, 2),
        (64, 8, 0, 1, 17, 8),
        (64, 4, 0, 2, 28, 12),  # 10 passes ahead are two groups of four micro-batches
    ],
)
def test_as_many_run_as_the_schedule_has_kinds_of(planned, pipeline, stage, chunks, run, middle):
    chosen = MicroBatches.of(planned, pipeline, stage, chunks)
    assert (chosen.planned, chosen.run, chosen.middle) == (planned, run, middle)


@pytest.mark.parametrize("planned", [1, 2, 3, 4, 5, 8, 512])
@pytest.mark.parametrize(("pipeline", "stage"), [(1, 0), (2, 0), (2, 1), (4, 1)])
@pytest.mark.parametrize("chunks", [1, 2])
def test_they_stand_for_all(planned, pipeline, stage, chunks):
    planned *= pipeline
    chosen = MicroBatches.of(planned, pipeline, stage, chunks)
    each = [Moment("forward", 0, number) for number in range(chosen.run)]
    assert sum(chosen.times(moment) for moment in each) == planned
    assert chosen.times(Moment("optimizer")) == 1
    assert sum(chosen.in_sample(moment) for moment in each) == chosen.group
