"""What is measured on trained models, against sums by hand."""

import gzip
import json

import pytest
import torch

from study import afterwards, corpus
from tests.huggingface.tiny import tiny_model


@pytest.mark.parametrize("dense", [False, True])
def test_all_held_out_text_counts_alike(dense, monkeypatch):
    """Also the sequences of the last batch, which is smaller."""
    layers = {"mlp_layer_types": ["dense", "dense"], "intermediate_size": 16} if dense else {}
    model = tiny_model(num_hidden_layers=2, **layers)
    tokens_NS = torch.randint(0, model.config.vocab_size, (11, 16))
    found = afterwards._evaluate(model, tokens_NS)
    losses, counts = [], []
    for sequence_1S in tokens_NS.split(1):
        with torch.no_grad():
            output = model(sequence_1S)
        logs_SV = output.logits[0].double().log_softmax(-1)
        losses += [-logs_SV[at, sequence_1S[0, at + 1]].item() for at in range(15)]
        counts += output.experts_per_token.flatten().tolist()
    assert len(losses) == 11 * 15
    assert found["validation_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    if dense:
        assert found.keys() == {"validation_loss"}
    else:
        assert len(counts) == 2 * 11 * 16
        mean = sum(counts) / len(counts)
        variance = sum((count - mean) ** 2 for count in counts) / len(counts)
        assert found["validation_experts_per_token"] == pytest.approx(mean)
        assert found["validation_std_experts_per_token"] == pytest.approx(variance**0.5)
        assert variance > 0


def test_what_was_measured_is_kept(tmp_path):
    file = tmp_path / "held_out.json"
    assert afterwards._kept(file, lambda: {"loss": 0.1}) == {"loss": 0.1}
    assert afterwards._kept(file, lambda: pytest.fail("measured again")) == {"loss": 0.1}


def test_an_analysis_of_another_format_is_made_again(tmp_path):
    file = tmp_path / "routing.json"
    assert not afterwards._is_analysis(file)
    file.write_text(json.dumps({"format": "megatron-dynmoe routing, 1"}))
    assert not afterwards._is_analysis(file)
    file.write_text(json.dumps({"format": afterwards.FORMAT}))
    assert afterwards._is_analysis(file)


def test_text_of_which_too_little_is_held_out_is_refused_before_anything_is_trained(tmp_path):
    file = tmp_path / "short.jsonl.gz"
    with gzip.open(file, "wt") as lines:
        lines.writelines(
            json.dumps({"text": f"The {n}th of many words."}) + "\n" for n in range(40)
        )
    made = corpus.corpus_of([file], 300, tmp_path)
    with pytest.raises(
        ValueError, match=r"--text .*short.jsonl.gz: \d+ tokens at its end are held"
    ):
        corpus.prepare(made, [file], 300, sequence_length=256)
    assert not made.folder.exists()
