"""Documents packed in one row: each is computed as alone; and no keyword vanishes."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from tests.huggingface.tiny import left_padded, tiny_model, tokens

ROUTING = {"routing": "dtop_p", "threshold": 0.5}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LENGTHS = (5, 1, 9)


def documents(*lengths, seed=0):
    return [tokens(1, length, seed=seed + place)[0] for place, length in enumerate(lengths)]


def packed(rows, start=0):
    """A row of documents, [1, S], and its positions as a collator gives them."""
    positions = [torch.arange(start, start + len(row)) for row in rows]
    return torch.cat(rows).unsqueeze(0), torch.cat(positions).unsqueeze(0)


def alone(model, rows):
    with torch.no_grad():
        return torch.cat([model(row.unsqueeze(0), use_cache=False).logits[0] for row in rows])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", [None, 1])
@pytest.mark.parametrize("start", [0, 7])
def test_each_document_gives_what_it_gives_alone(attention, mask, start):
    """Whatever comes with them; rotary positions are relative, so that a start is none."""
    model, rows = tiny_model(attention=attention, **ROUTING), documents(*LENGTHS)
    ids, positions = packed(rows, start)
    mask = None if mask is None else torch.ones_like(ids)
    expected = alone(model, rows)
    plain = model(ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(plain.logits[0], expected, **CLOSE)
    assert plain.past_key_values is None  # which would not tell the documents apart
    with_labels = model(ids, attention_mask=mask, position_ids=positions, labels=ids)
    torch.testing.assert_close(with_labels.logits[0], expected, **CLOSE)
    # and it is the positions that do it
    together = model(ids, attention_mask=mask, use_cache=False)
    assert (together.logits[0] - expected).abs().max() > 0.1


def test_rows_of_a_batch_are_packed_each_in_its_way():
    model = tiny_model(**ROUTING)
    rows = [documents(*lengths, seed=sum(lengths)) for lengths in ((4, 6), (1, 2, 7), (10,))]
    ids, positions = (torch.cat(parts) for parts in zip(*map(packed, rows), strict=True))
    logits = model(ids, position_ids=positions).logits
    for row, found in zip(rows, logits, strict=True):
        torch.testing.assert_close(found, alone(model, row), **CLOSE)
    # one row of positions for all
    same = [documents(3, 7, seed=seed) for seed in (0, 10)]
    ids = torch.cat([packed(row)[0] for row in same])
    logits = model(ids, position_ids=packed(same[0])[1]).logits
    for row, found in zip(same, logits, strict=True):
        torch.testing.assert_close(found, alone(model, row), **CLOSE)


@pytest.mark.parametrize("filled", [-1, 0, 1, 3])
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_beside_packed_documents(side, filled):
    model, (one, two) = tiny_model(**ROUTING), documents(4, 6)
    pad = torch.zeros(3, dtype=torch.int64)
    parts = {"left": [pad, one, two], "right": [one, two, pad], "between": [one, pad, two]}[side]
    ids = torch.cat(parts).unsqueeze(0)
    mask = torch.cat([torch.full_like(part, part is not pad) for part in parts]).unsqueeze(0)
    positions = [pad + filled if part is pad else torch.arange(len(part)) for part in parts]
    positions = torch.cat(positions).unsqueeze(0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    torch.testing.assert_close(logits, alone(model, [one, two]), **CLOSE)


@pytest.mark.parametrize("filled", [0, 1])
def test_a_padded_row_is_no_packed_one(filled):
    """Positions as generate and other callers count them, with whatever stands for padding."""
    model = tiny_model(**ROUTING)
    ids, mask = left_padded(documents(4, 9))
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filled)
    counted = model(ids, attention_mask=mask, use_cache=True)
    given = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    assert torch.equal(counted.logits[mask.bool()], given.logits[mask.bool()])
    # padding within a row, its positions counted with it and without
    ids, mask = tokens(1, 8), torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    for positions in (torch.arange(8)[None], torch.tensor([[0, 1, 2, filled, filled, 3, 4, 5]])):
        row = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        assert row.past_key_values is not None


@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_and_its_gradients_are_the_mean_over_the_documents_tokens(recompute):
    """Without the routing's losses, which are a row's; a document of one token has no target."""
    off = {"balance_loss": "none", "dynamic_loss_coeff": 0.0}
    model, rows = tiny_model(**ROUTING, **off).train(), documents(*LENGTHS)
    losses = [
        model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows if len(row) > 1
    ]
    expected = sum(losses) / sum(len(row) - 1 for row in rows)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, positions = packed(rows)
    marked = ids.masked_fill(positions == 0, -100)
    for labels in (ids, marked):
        loss = model(ids, position_ids=positions, labels=labels).loss
        torch.testing.assert_close(loss, expected)
        loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], **CLOSE, msg=name)
        model.zero_grad()


def test_the_balance_loss_takes_a_row_for_a_sequence_packed_or_not():
    """As in training, where the documents of a sequence count together, too."""
    model = tiny_model(balance_loss_coeff=1.0, dynamic_loss_coeff=0.0, threshold=0.5).train()
    ids, positions = packed(documents(6, 5))
    outputs = model(ids, position_ids=positions, labels=ids, output_router_logits=True)
    expected = 0
    for logits_BSE, counts in zip(outputs.router_logits, outputs.experts_per_token, strict=True):
        probs_SE = logits_BSE[0].softmax(-1)
        ranks_SE = probs_SE.argsort(-1, descending=True).argsort(-1)
        fractions_E = (ranks_SE < counts[0, :, None]).float().mean(0)
        expected = expected + 8 * (fractions_E * probs_SE.mean(0)).sum()
    torch.testing.assert_close(outputs.aux_loss, expected)


def test_shares_of_the_loss_add_up_to_that_of_the_whole():
    model, rows = tiny_model(**ROUTING).train(), tokens(2, 9).split(1)
    whole = model(torch.cat(rows), labels=torch.cat(rows)).loss
    shares = [model(row, labels=row, num_items_in_batch=torch.tensor(16)).loss for row in rows]
    torch.testing.assert_close(sum(shares), whole)


def test_a_cache_takes_one_document_a_row():
    model, rows = tiny_model(**ROUTING), documents(5, 9)
    ids, positions = packed(rows)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, position_ids=positions, use_cache=True)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, position_ids=positions, max_new_tokens=2, do_sample=False)
    # behind a first document
    cache = model(rows[0][None], use_cache=True).past_key_values
    second = {"past_key_values": cache, "position_ids": torch.arange(9)[None]}
    with pytest.raises(ValueError, match="begin again, at 0, after 5 positions"):
        model(rows[1][None], **second)
    again = {"past_key_values": cache, "position_ids": torch.tensor([[5, 6, 0, 1]])}
    with pytest.raises(ValueError, match="use_cache=False"):
        model(rows[1][None, :4], **again)


def test_without_a_cache_a_packed_row_goes_on_with_its_last_document():
    model, rows = tiny_model(**ROUTING), documents(5, 9)
    ids, positions = packed(rows)
    how = {"max_new_tokens": 4, "do_sample": False, "use_cache": False}
    continued = model.generate(ids, position_ids=positions, **how)
    assert torch.equal(continued[:, 14:], model.generate(rows[1][None], **how)[:, 9:])


def test_the_trainer_takes_what_the_collator_flattens(tmp_path):
    """Without a column lost on the way: one step with rate 0 gives the loss of the documents."""
    model, rows = tiny_model(**ROUTING), documents(4, 6)
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, learning_rate=0.0, report_to=[],
        per_device_eval_batch_size=2, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row.tolist()} for row in rows]
    collator = DataCollatorWithFlattening()
    trainer = Trainer(model, arguments, collator, train_dataset=data, eval_dataset=data)
    result = trainer.train()
    ids, positions = packed(rows)
    for loss, training in (
        (result.training_loss, True),
        (trainer.evaluate()["eval_loss"], False),
    ):
        expected = model.train(training)(ids, position_ids=positions, labels=ids).loss.item()
        assert loss == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"attention_masks": torch.ones(1, 5)}, TypeError, "'attention_masks'.*'attention_mask'"),
        ({"postion_ids": torch.arange(5)[None]}, TypeError, "did you mean 'position_ids'"),
        ({"encoder_hidden_states": torch.ones(1)}, TypeError, "'encoder_hidden_states'"),
        ({"token_type_ids": torch.ones(1, 5)}, TypeError, "'token_type_ids'"),
        ({"is_causal": False}, TypeError, "'is_causal'"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, ValueError, "cu_seq_lens_q.*position_ids"),
        ({"max_length_q": 3}, ValueError, "max_length_q.*position_ids"),
        ({"seq_idx": torch.zeros(1, 5)}, ValueError, "seq_idx.*position_ids"),
        ({"attention_mask": torch.tensor([[1, 1, 2, 2, 2]])}, ValueError, "other than 0"),
        ({"attention_mask": torch.full((1, 5), 2)}, ValueError, "other than 0"),
        ({"attention_mask": torch.ones(3, 5)}, ValueError, r"\(3, 5\): give \[1, 5\]"),
        ({"attention_mask": torch.ones(1, 6)}, ValueError, r"\(1, 6\): give \[1, 5\]"),
        ({"position_ids": torch.arange(5)}, ValueError, r"\(5,\): give \[1, 5\]"),
        ({"position_ids": torch.arange(4)[None]}, ValueError, r"\(1, 4\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_no_keyword_vanishes(given, error, said):
    model = tiny_model()
    for forward in (model, model.model):
        with pytest.raises(error, match=said):
            forward(tokens(1, 5), **given)


def test_what_transformers_passes_on_has_its_effect_or_none_to_have():
    model, ids = tiny_model(), tokens(1, 5)
    passed = {
        "cache_position": torch.arange(5),
        "token_type_ids": torch.zeros(1, 5, dtype=torch.int64),
        "is_causal": True,
        "cu_seq_lens_q": None,
        "return_dict": True,
    }
    assert torch.equal(model(ids, **passed).logits, model(ids).logits)
    assert len(model(ids, return_dict=False)) == 3
