"""The training losses of the Transformers model, their gradients, and recomputation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from tests.huggingface.tiny import left_padded, tiny_model, tokens
from tests.oracles import routing as oracle

ROOT = Path(__file__).parents[2]
SCOPES = ("seq_aux_loss", "aux_loss", "global_aux_loss", "none")


def padded_batch():
    return left_padded([tokens(1, length, seed=length)[0] for length in (4, 11, 7)])


def losses_by_oracle(config, router_logits, mask):
    """Both losses of every layer, valid tokens only, summed over layers."""
    total = torch.zeros(())
    for layer, logits_BSE in enumerate(router_logits):
        rows = [
            [[prob.squeeze() for prob in oracle.softmax(list(logits))] for logits in row[keep]]
            for row, keep in zip(logits_BSE, mask.bool(), strict=True)
        ]
        if config.balance_loss != "seq_aux_loss":
            rows = [[probs for row in rows for probs in row]]
        threshold, _ = config.threshold_and_cap(layer, training=True)
        balance = 0
        for row in rows:
            choices = [oracle.algorithm_1([float(p) for p in probs], threshold) for probs in row]
            balance = balance + oracle.load_balance_loss(row, choices) / len(rows)
        if config.balance_loss != "none":
            total = total + config.balance_loss_coeff * balance
        everything = [probs for row in rows for probs in row]
        total = total + config.dynamic_loss_coeff * oracle.dynamic_loss(everything)
    return total


@pytest.mark.parametrize("scope", SCOPES)
def test_losses_and_their_gradients_are_the_papers(scope):
    model = tiny_model(
        routing="dtop_p",
        threshold=0.4,
        balance_loss=scope,
        balance_loss_coeff=0.3,
        dynamic_loss_coeff=0.2,
    ).train()
    ids, mask = padded_batch()
    labels = ids.masked_fill(mask == 0, -100)
    outputs = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    expected = losses_by_oracle(model.config, outputs.router_logits, mask)
    torch.testing.assert_close(outputs.aux_loss, expected)
    routers = [layer.mlp.router for layer in model.model.layers]
    parameters = [p for router in routers for p in (router.weight, router.theta_offset)]
    ours = torch.autograd.grad(outputs.aux_loss, parameters, retain_graph=True)
    theirs = torch.autograd.grad(expected, parameters, retain_graph=True)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)

    # cross entropy, one token at a time; the padding before a row does not predict its first
    negative_log_probs = [
        -torch.log_softmax(outputs.logits[row, position], dim=-1)[labels[row, position + 1]]
        for row, position in mask[:, :-1].nonzero().tolist()
    ]
    cross_entropy = torch.stack(negative_log_probs).mean()
    torch.testing.assert_close(outputs.loss, cross_entropy + expected)


def test_the_scope_of_a_sequence_does_not_depend_on_the_batch():
    model = tiny_model(balance_loss_coeff=1.0, dynamic_loss_coeff=0.0).train()
    ids = tokens(4, 9)
    together = model(ids, labels=ids).aux_loss
    alone = torch.stack([model(row, labels=row).aux_loss for row in ids.split(1)]).mean()
    torch.testing.assert_close(together, alone)


def test_padding_enters_no_loss():
    model = tiny_model(threshold=0.5, balance_loss_coeff=0.3, dynamic_loss_coeff=0.2).train()
    row = tokens(1, 6)
    ids, mask = left_padded([row[0], tokens(1, 11)[0]])
    alone = model(row, labels=row).aux_loss
    padded = model(ids[:1], attention_mask=mask[:1], labels=ids[:1]).aux_loss
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize(
    "given",
    [
        {"labels": tokens(1, 5)},
        {"labels": tokens(1, 6), "logits_to_keep": 2},
        {"shift_labels": tokens(1, 5)},
    ],
    ids=" and ".join,
)
def test_labels_that_do_not_fit_the_logits_are_refused(given):
    with pytest.raises(ValueError, match="targets: give labels of the shape of input_ids"):
        tiny_model()(tokens(1, 6), **given)


@pytest.mark.parametrize("num_items", [None, 10])
def test_a_batch_without_targets_has_only_the_losses_of_routing(num_items):
    """The mean cross entropy of nothing would be NaN, and after a step all weights with it."""
    model = tiny_model(balance_loss_coeff=0.1).train()
    ids = tokens(2, 7)
    outputs = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=num_items)
    torch.testing.assert_close(outputs.loss, outputs.aux_loss * (0 if num_items else 1))
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    only_one_token = model(ids[:, :1], labels=ids[:, :1])
    assert only_one_token.loss == only_one_token.aux_loss


def test_an_evaluation_has_the_cross_entropy_alone():
    """Or the exponential of the loss, which everybody takes for the perplexity, were none."""
    model, ids = tiny_model(threshold=0.5, balance_loss_coeff=0.3), tokens(2, 9)
    evaluated = model(ids, labels=ids, output_router_logits=True)
    entropy = F.cross_entropy(evaluated.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(evaluated.loss, entropy)
    assert evaluated.aux_loss > 1
    trained = model.train()(ids, labels=ids)
    torch.testing.assert_close(trained.loss, entropy + evaluated.aux_loss)


def test_label_smoothing_in_trainer_predicts_the_next_token(tmp_path):
    """Trainer computes this loss from the logits, and shifts labels only for models that it knows.

    For any other it would train each token to predict itself.
    """
    model, ids = tiny_model(threshold=0.5), tokens(2, 9)
    arguments = TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[]
    )
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    logits, targets = model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, label_smoothing=0.1))


def test_top_k_has_a_routing_loss_only_where_one_is_set():
    ids = tokens(2, 9)
    plain = tiny_model(routing="top_k", num_experts_per_tok=2)
    assert plain(ids, labels=ids).aux_loss == 0
    balanced = tiny_model(
        routing="top_k",
        num_experts_per_tok=2,
        balance_loss="seq_aux_loss",
        balance_loss_coeff=1.0,
    )
    # a loss of k if all is balanced, for each of three layers
    assert 5 < balanced(ids, labels=ids).aux_loss < 3 * 8


def gradients(model, ids, mask):
    outputs = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    outputs.loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return outputs, found


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [pytest.param(True, marks=pytest.mark.long), False])
def test_recomputation_changes_no_bit(use_reentrant):
    """In a process of its own.

    The CPU layer under Megatron, which other tests leave in theirs, has a second random generator,
    and torch's recomputation does not restore it: dropout would draw other numbers.
    """
    call = "from tests.huggingface.test_training import check_recomputation; "
    call += f"check_recomputation({use_reentrant})"
    run = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def check_recomputation(use_reentrant):
    model = tiny_model(
        routing="dtop_p",
        threshold=0.4,
        balance_loss_coeff=0.3,
        attention_dropout=0.1,
        hidden_dropout=0.1,
    ).train()
    ids, mask = padded_batch()
    torch.manual_seed(1)
    outputs, plain = gradients(model, ids, mask)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    runs = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    torch.manual_seed(1)
    again, recomputed = gradients(model, ids, mask)
    hook.remove()
    assert len(runs) == 2  # once forward, once again in the backward pass
    assert torch.equal(outputs.loss, again.loss)
    assert torch.equal(outputs.aux_loss, again.aux_loss)
    assert torch.equal(outputs.experts_per_token, again.experts_per_token)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, recomputed[name]), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["hidden_dropout", "attention_dropout"])
def test_dropout_is_for_training_only(name, attention):
    model, ids = tiny_model(attention=attention, **{name: 0.3}), tokens(1, 9)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_training_in_bfloat16_autocast_routes_in_float32():
    model, ids = tiny_model(threshold=0.5).train(), tokens(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, labels=ids, output_router_logits=True)
    assert outputs.router_logits[0].dtype == outputs.aux_loss.dtype == torch.float32
    assert (outputs.router_logits[0] != outputs.router_logits[0].bfloat16()).any()
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_trainer_learns_a_text_and_evaluates(tmp_path):
    """Gradients accumulated over two batches are those of one, so the loss is scaled right."""
    model = tiny_model(threshold=0.5, initializer_range=0.1)
    rows = [{"input_ids": row, "labels": row} for row in tokens(1, 12).repeat(8, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:3])
    with torch.no_grad():
        row = rows[0]["input_ids"][None]
        before = model.train()(row, labels=row).loss.item()
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(before, rel=0.02)
    assert logged[-1] < 0.5 * before
    assert trainer.evaluate()["eval_loss"] < 0.5 * before


def test_shifted_labels_take_the_place_of_labels():
    model, ids = tiny_model(threshold=0.5), tokens(2, 9)
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    expected = model(ids, labels=ids)
    for given in ({}, {"labels": torch.zeros_like(ids)}):
        output = model(ids, shift_labels=shifted, **given)
        torch.testing.assert_close(output.loss, expected.loss)
        assert torch.equal(output.aux_loss, expected.aux_loss)
