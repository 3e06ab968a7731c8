"""Documents of one row against the same documents alone, each in a row of its own."""

from argparse import Namespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.backends.model import config

pytestmark = pytest.mark.megatron

S, EOD, VOCABULARY = 12, 7, 24
# The rows of a batch, by the positions of their eods. A row may begin inside a document.
BATCHES = {
    "no boundary": ([], []),
    "ends at the end of the row": ([S - 1], [4, S - 1]),
    "a document of one token": ([0], [5, 6]),
    "eods in a row": ([3, 4, 5], [S - 2, S - 1]),
    "every token": (range(S), [1]),
}
EODS = st.lists(st.sets(st.integers(0, S - 1)), min_size=1, max_size=3)


def tokens_of(batch, seed: int = 0) -> Tensor:
    """[B, S] of random tokens, with eods at the places of the batch's and nowhere else."""
    tokens = torch.randint(EOD + 1, VOCABULARY, (len(batch), S), generator=generator(seed))
    for row, eods in zip(tokens, batch, strict=True):
        row[list(eods)] = EOD
    return tokens


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def upstreams(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masks [B, 1, S, S], loss masks and positions [B, S] of upstream's data loader."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    rows = [_get_ltor_masks_and_position_ids(row, EOD, True, True, True, True) for row in tokens]
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))


def spans(batch) -> list[tuple[int, int, int]]:
    """Row, first position and end of each document, counted one by one."""
    found = []
    for row, eods in enumerate(batch):
        start = 0
        for position in range(S):
            if position in eods or position == S - 1:
                found.append((row, start, position + 1))
                start = position + 1
    return found


@given(EODS)
def test_lengths_are_those_of_the_documents(batch):
    from megatron_dynmoe.backends.attention.documents import document_lengths

    _, _, positions = upstreams(tokens_of(batch))
    expected = [end - start for _, start, end in spans(batch)]
    assert document_lengths(positions).tolist() == expected


# --- attention -----------------------------------------------------------------------------------


def attention():
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_dynmoe.backends.torch_native import ScaledDotProductAttention

    return ScaledDotProductAttention(
        config=config(attention_dropout=0.0, num_query_groups=2),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
    )


def attend_token_by_token(query, key, value, batch) -> Tensor:
    """Loops in float64: token, head, and the tokens before it in its document."""
    output = torch.zeros_like(query)
    for row, start, end in spans(batch):
        for position in range(start, end):
            for head in range(query.shape[2]):
                group = head * key.shape[2] // query.shape[2]
                keys, values = (x[start : position + 1, row, group] for x in (key, value))
                scores = keys @ query[position, row, head] / query.shape[3] ** 0.5
                output[position, row, head] = scores.softmax(0) @ values
    return output.flatten(2)


def check_attention(batch) -> None:
    from megatron_dynmoe.backends.attention.documents import document_lengths

    ours = attention()
    draw = generator(1)
    shapes = [(S, len(batch), heads, 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    direction = torch.randn((S, len(batch), 32), generator=draw, dtype=torch.float64)
    lengths = document_lengths(upstreams(tokens_of(batch))[2])
    results = []
    for attend, dtype in ((attend_token_by_token, torch.float64), (ours, torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        output = attend(*leaves, batch if attend is attend_token_by_token else lengths)
        gradients = torch.autograd.grad(output, leaves, direction.to(dtype))
        results.append([output, *gradients])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=list(BATCHES))
def test_attention_is_that_of_each_document(batch):
    check_attention(batch)


@settings(max_examples=20)  # the loops of the oracle are slow
@given(EODS)
def test_attention_is_that_of_each_document_wherever_they_end(batch):
    check_attention(batch)


# --- a model, with experts, their losses and counts ----------------------------------------------


def model(balance_loss: str, positions: str):
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_dynmoe.settings.config import DynMoEConfig
    from tests.moe import one_rank

    model_parallel_cuda_manual_seed(5)
    torch.manual_seed(5)
    coefficients = {"balance_loss_coeff": 1.0, "dynamic_loss_coeff": 1.0}
    dynmoe = DynMoEConfig(
        routing="top_p", threshold=0.5, normalization="drn", balance_loss=balance_loss,
        backend="torch_native", **coefficients,
    )  # fmt: skip
    transformer = config(
        hidden_dropout=0.0, attention_dropout=0.0, moe_z_loss_coeff=0.1, num_query_groups=2,
        moe_shared_expert_intermediate_size=12,
    )  # fmt: skip
    return GPTModel(
        transformer,
        one_rank.prepared_spec(transformer, dynmoe),
        VOCABULARY,
        S,
        position_embedding_type=positions,
    )


def trained(model, *inputs, labels, loss_mask, padding_mask=None):
    """The token losses of one step, gradients by name, and what the routers counted."""
    from megatron_dynmoe.control.update import routers_of

    losses = model(*inputs, labels=labels, padding_mask=padding_mask)
    (losses * loss_mask).sum().backward()
    gradients = {name: x.grad for name, x in model.named_parameters()}
    counted = [
        [sums.assignments, sums.tokens, sums.balance_loss]
        for sums in (router.counters.sums for router in routers_of([model]))
    ]
    return losses.detach(), gradients, counted


@pytest.mark.parametrize("positions", ["rope", "learned_absolute"])
@pytest.mark.parametrize("batch", list(BATCHES.values())[1:], ids=list(BATCHES)[1:])
def test_a_row_trains_as_its_documents_alone(batch, positions):
    """Also the routers: f and Q of the balance loss are sums over the tokens of a row.

    Alone, the documents are rows that are padded to the length of the longest. Later tokens, and so
    padding, change nothing, and the routers leave it out.
    """
    from megatron_dynmoe.backends.attention.documents import document_lengths

    for row in batch:
        tokens = tokens_of([row])
        labels = torch.randint(VOCABULARY, (1, S), generator=generator(2))
        _, loss_mask, position_ids = upstreams(tokens)
        lengths = document_lengths(position_ids)
        packed = trained(
            model("seq_aux_loss", positions),
            *(tokens, position_ids, lengths),
            labels=labels,
            loss_mask=loss_mask,
        )

        bounds = [(start, end) for _, start, end in spans([row])]
        padding_mask = torch.ones(len(bounds), S, dtype=torch.bool)
        alone = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask}
        alone = {name: x.new_zeros(len(bounds), S) for name, x in alone.items()}
        for document, (start, end) in enumerate(bounds):
            padding_mask[document, : end - start] = False
            for name, x in {"tokens": tokens, "labels": labels, "loss_mask": loss_mask}.items():
                alone[name][document, : end - start] = x[0, start:end]
        from_zero = torch.arange(S).expand(len(bounds), S)
        expected = trained(
            # One balance loss of all rows, because these are the documents of one row.
            model("aux_loss", positions),
            *(alone.pop("tokens"), from_zero, None),
            padding_mask=padding_mask,
            **alone,
        )
        torch.testing.assert_close(packed[0].flatten(), expected[0][~padding_mask])
        assert packed[1].keys() == expected[1].keys()
        for name, gradient in expected[1].items():
            off = (packed[1][name] - gradient).abs().max()
            assert off <= 5e-5 * gradient.abs().max(), name  # float32, in sums of another order
        torch.testing.assert_close(packed[2], expected[2], rtol=1e-6, atol=0)


# --- settings ------------------------------------------------------------------------------------


def arguments(**given) -> Namespace:
    defaults = {
        "reset_attention_mask": True, "create_attention_mask_in_dataloader": True,
        "pipeline_model_parallel_size": 1, "num_virtual_stages_per_pipeline_rank": None,
    }  # fmt: skip
    return Namespace(**(defaults | given))


@pytest.mark.parametrize(
    ("backend", "given", "makes_mask"),
    [
        ("torch_native", {}, False),
        ("torch_native", {"pipeline_model_parallel_size": 4}, False),
        ("torch_native", {"softmax_type": "off-by-one"}, True),
        ("torch_native", {"softmax_type": "off-by-one", "reset_attention_mask": False}, False),
        ("local", {}, True),
        ("local", {"pipeline_model_parallel_size": 2}, True),
        ("transformer_engine", {}, True),
    ],
)
def test_only_attention_that_needs_a_mask_gets_one(backend, given, makes_mask):
    from megatron_dynmoe.backends.choice import adapt_masks

    args = arguments(**given)
    adapt_masks(backend, args)
    assert args.create_attention_mask_in_dataloader is makes_mask


@pytest.mark.parametrize(
    ("backend", "given", "message"),
    [
        (
            "local",
            {"pipeline_model_parallel_size": 4},
            "--pipeline-model-parallel-size is 4.*use --moe-dynamic-backend torch_native",
        ),
        (
            "local",
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
            "--pipeline-model-parallel-size is 2.*not interleaved",
        ),
        (
            "torch_native",
            {"pipeline_model_parallel_size": 4, "softmax_type": "off-by-one"},
            "attention of local, which softmax_type off-by-one needs, needs one",
        ),
        (
            "local",
            {"create_attention_mask_in_dataloader": False},
            "--no-create-attention-mask-in-dataloader, .* leave the second out",
        ),
    ],
)
def test_a_mask_that_would_not_arrive_is_refused(backend, given, message):
    from megatron_dynmoe.backends.choice import adapt_masks

    with pytest.raises(ValueError, match=message):
        adapt_masks(backend, arguments(**given))
    adapt_masks(backend, arguments(**{**given, "reset_attention_mask": False}))
