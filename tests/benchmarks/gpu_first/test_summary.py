"""The files that a call leaves, of rows that stages have written."""

import csv
import io

import pytest

from benchmarks.gpu_first import predict, publish, stages, summary
from benchmarks.gpu_first.state import DONE, State

STEP = "provider,median_s,tokens_per_s,of_ceiling,experts_per_token,peak_memory_gb\n"
AGAIN = summary.Again("make gpu-first", "make gpu-first RESUME=archive.tar.gz")
TABLE = [
    stages.Stage(name, f"{name}?", "", 1, 1, writes="rows.csv") for name in ("train-2", "memory")
]


@pytest.fixture
def measured(tmp_path):
    """A run with one training step of 22 GB, of which 20 were predicted."""
    state = State.open(tmp_path, "abc", "code", "NVIDIA H200")
    row = {"predicts": "train-2", "predicted_gb": "20.00", "formula_gb": "21.00"}
    for stage, text in (
        (TABLE[0], f"{STEP}dtop_p,0.5,32768,0.4,2.01,22.00\n"),
        (TABLE[1], f"{','.join(row)}\n{','.join(row.values())}\n"),
    ):
        (state.begin(stage.name) / "rows.csv").write_text(text)
        state.end(stage.name, DONE, "", 1.0)
    return state


def test_a_measured_peak_stands_beside_the_prediction(measured):
    text = summary.write(measured, TABLE, AGAIN)
    assert "| `train-2` | 0.5 | 32768 | 0.4 |  | 22.00 | 20.00 | 1.100 |" in text
    assert "| `memory` | memory? | 20.00 GB | 1 |" in text


def test_every_row_stands_under_the_stage_that_wrote_it(measured):
    rows = [*csv.DictReader(io.StringIO(publish._rows(measured, TABLE)))]
    assert [row["stage"] for row in rows] == ["train-2", "memory"]
    assert rows[1]["predicts"] == "train-2" and rows[0]["predicts"] == ""


def test_predictions_name_the_step_that_they_are_of(tmp_path, monkeypatch):
    file = tmp_path / "memory.csv"
    found = {"predicted_gb": "20.00", "formula_gb": "21.00"}
    monkeypatch.setattr(predict, "dry_run", lambda row: found)
    monkeypatch.setattr("sys.argv", ["predict", "--output", str(file), "--only", "train-2"])
    predict.main()
    (row,) = csv.DictReader(file.open())
    assert row["predicts"] == "train-2" and "stage" not in row
