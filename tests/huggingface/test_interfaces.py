"""Whatever implements one of Transformers' interfaces runs the model: experts, attention, caches.

Flash attention and sonicmoe need a GPU. Here stand-ins take their calls, so what is tested of them
is how they are called.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.flash_attention as flash
import transformers.integrations.sonicmoe as sonicmoe
from transformers import AttentionInterface, GenerationConfig, StaticCache
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tests.huggingface.tiny import left_padded, tiny_model, tokens

ROUTINGS = {
    "dtop_p": {"routing": "dtop_p", "threshold": 0.5},
    "capped": {"threshold": 0.9, "max_experts_per_token": 3},
    "top_k": {"routing": "top_k", "num_experts_per_tok": 2},
    "shared": {"threshold": 0.5, "shared_expert_intermediate_size": 24},
}
# In another order of sums. Rounding of 1e-7 grows through three layers of large random weights.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
PACKED = torch.cat((torch.arange(7), torch.arange(5)))[None]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def recorded():
    """What the experts of a model are called with, and the loop's result."""
    calls = []

    def record(self, hidden_TD, ids_TK, weights_TK):
        calls.append((hidden_TD, ids_TK, weights_TK))
        return type(self).forward.__wrapped__(self, hidden_TD, ids_TK, weights_TK)

    ALL_EXPERTS_FUNCTIONS.register("recorder", record)
    yield calls
    del ALL_EXPERTS_FUNCTIONS._global_mapping["recorder"]


# Experts


def test_the_default_is_the_exact_loop(tmp_path):
    model = tiny_model()
    assert model.config._experts_implementation == "eager"
    model.set_experts_implementation("grouped_mm")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config._experts_implementation == "eager"
    chosen = type(model).from_pretrained(tmp_path, experts_implementation="batched_mm")
    assert chosen.config._experts_implementation == "batched_mm"
    with pytest.raises(ValueError, match="grouped_nm"):
        model.set_experts_implementation("grouped_nm")


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_every_implementation_of_experts_gives_the_same(name, implementation, monkeypatch):
    calls, theirs = [], ALL_EXPERTS_FUNCTIONS[implementation]
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping,
        implementation,
        lambda *given: calls.append(given) or theirs(*given),
    )
    model = tiny_model(**ROUTINGS[name])
    ids, mask = left_padded([tokens(1, length)[0] for length in (4, 12, 7)])
    given = {"attention_mask": mask, "labels": ids}
    exact = model(ids, **given)
    exact.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_experts_implementation(implementation)
    other = model(ids, **given)
    other.loss.backward()
    assert len(calls) == len(model.model.layers)
    torch.testing.assert_close(other.logits, exact.logits, **CLOSE)
    assert torch.equal(other.experts_per_token, exact.experts_per_token)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", ROUTINGS)
def test_experts_get_valid_ids_and_no_weight_in_unused_slots(name, recorded):
    model = tiny_model(**ROUTINGS[name])
    model.set_experts_implementation("recorder")
    ids, mask = left_padded([tokens(1, 4)[0], tokens(1, 9)[0]])
    counts = model(ids, attention_mask=mask).experts_per_token
    num_slots = model.config.num_experts_per_tok
    assert num_slots == {"top_k": 2, "capped": 3}.get(name, 8)
    for (_, ids_TK, weights_TK), counts_BS in zip(recorded, counts, strict=True):
        assert ids_TK.shape == weights_TK.shape == (18, num_slots)
        assert ids_TK.dtype == torch.int64 and ids_TK.min() >= 0 and ids_TK.max() < 8
        unused_TK = torch.arange(num_slots) >= counts_BS.flatten().unsqueeze(-1)
        assert torch.equal(weights_TK == 0, unused_TK)
        first_TK = ids_TK[:, :1].expand_as(ids_TK)
        valid_TK = unused_TK & mask.flatten().bool().unsqueeze(-1)
        assert torch.equal(ids_TK[valid_TK], first_TK[valid_TK])  # no other expert is read


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}], ids=["plain", "with norms"])
def test_the_source_of_the_attention_calls_the_interface(settings):
    """So vLLM finds the modules that attend: it reads their classes' ``forward``."""
    attention = type(tiny_model(**settings).model.layers[0].self_attn)
    assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in inspect.getsource(attention.forward)


def test_a_cap_set_later_is_the_number_of_slots(recorded):
    model = tiny_model(threshold=0.9)
    model.set_experts_implementation("recorder")
    model.config.inference_max_experts_per_token = 2
    assert model.config.num_experts_per_tok == 2
    model(tokens(1, 9))
    assert {weights_TK.shape[1] for _, _, weights_TK in recorded} == {2}


def test_an_expert_that_no_token_uses_is_not_computed(recorded):
    """Also by those who compute every slot: its weights may be anything."""
    model, ids = tiny_model(threshold=0.3), tokens(1, 2)
    model.set_experts_implementation("recorder")
    expected = model(ids).logits
    with torch.no_grad():
        for layer, (_, ids_TK, _) in zip(model.model.layers, recorded, strict=True):
            unused = [expert for expert in range(8) if expert not in ids_TK]
            assert unused
            layer.mlp.experts.gate_up_proj[unused] = torch.nan
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


def test_sonicmoe_is_called_as_its_kernel_asks(monkeypatch):
    """With the arguments of the kernel, sorted by token, from which a loop gets the same."""

    def kernel(
        hidden_TD, weights_A, tokens_A, experts_A, gate_up, b1, down, b2, *, E, activation_type,
        is_inference_mode_enabled, concat_layout, stream_id,
    ):  # fmt: skip
        assert (b1, b2, stream_id) == (None, None, None)
        assert (activation_type, concat_layout) == ("swiglu", True)
        assert tokens_A.dtype == experts_A.dtype == torch.int32
        assert (tokens_A.diff() >= 0).all() and E == 8
        output_TD = torch.zeros_like(hidden_TD)
        for token, expert, weight in zip(tokens_A, experts_A, weights_A, strict=True):
            gate, up = (gate_up[:, :, expert] @ hidden_TD[token]).chunk(2)
            output_TD[token] += weight * (down[:, :, expert] @ (F.silu(gate) * up))
        return output_TD, None

    fake = SimpleNamespace(
        moe_general_routing_inputs=kernel, activation_type_enum=SimpleNamespace(SWIGLU="swiglu")
    )
    monkeypatch.setattr(sonicmoe, "load_sonicmoe_kernel", lambda: fake)
    model, ids = tiny_model(**ROUTINGS["capped"]), tokens(2, 5)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_experts_implementation("sonicmoe")
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


# Attention


def test_flex_attention_gives_the_same():
    """Its own lines, which a GPU compiles: plain, with padding, and with packed documents."""
    flex, sdpa = (tiny_model(attention=name, threshold=0.5) for name in ("flex_attention", "sdpa"))
    ids, mask = left_padded([tokens(1, 5)[0], tokens(1, 12)[0]])
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for given in ({}, {"attention_mask": mask}, {"position_ids": PACKED}):
            valid = given.get("attention_mask", torch.ones_like(ids)).bool()
            found, expected = (model(ids, **given).logits[valid] for model in (flex, sdpa))
            torch.testing.assert_close(found, expected, **CLOSE)


@pytest.fixture
def flash_model(monkeypatch):
    """A model whose calls of flash attention are computed by SDPA from the kernel's arguments."""
    signature = inspect.signature(flash._flash_attention_forward)

    def forward(*args, **kwargs):
        call = signature.bind(*args, **kwargs).arguments
        named = call | call.get("kwargs", {})
        query, key, value = (call[f"{name}_states"] for name in ("query", "key", "value"))
        assert query.shape[1:] == (12, 4, 8) and key.shape[1:] == (12, 2, 8)  # [B, S, N, H]
        sees = torch.ones(12, 12, dtype=torch.bool).tril()
        positions, lengths = named.get("position_ids"), named.get("cu_seq_lens_q")
        mask = call["attention_mask"]
        if mask is not None:
            assert mask.dim() == 2
            sees = sees & mask.bool()[:, None, None, :]
        elif lengths is not None:
            document = torch.bucketize(torch.arange(12), lengths[1:], right=True)
            sees = sees & (document == document[:, None])
        elif len(positions) == 1 and len(query) == 1:  # what the kernel takes for packed rows
            document = (positions[0].diff(prepend=positions[0, :1] - 1) != 1).cumsum(-1)
            sees = sees & (document == document[:, None])
        heads = (part.transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(
            *heads, attn_mask=sees, scale=call["softmax_scale"], enable_gqa=True
        ).transpose(1, 2)

    monkeypatch.setattr(flash, "_flash_attention_forward", forward)
    model = tiny_model(threshold=0.5)
    model.config._attn_implementation_internal = "flash_attention_2"  # it is not installed here
    return model


def test_flash_attention_is_called_as_its_kernel_asks(flash_model):
    sdpa = tiny_model(threshold=0.5)
    ids, mask = left_padded([tokens(1, 5)[0], tokens(1, 12)[0]])
    lengths = torch.tensor([0, 7, 12], dtype=torch.int32)
    of_flash = {
        "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 7, "max_length_k": 7
    }  # fmt: skip
    for rows, given, more in (
        (ids, {}, {}),
        (ids, {"attention_mask": mask}, {}),
        (ids[:1], {"position_ids": PACKED}, {}),
        (ids[:1], {"position_ids": PACKED}, of_flash),
    ):
        valid = given.get("attention_mask", torch.ones_like(rows)).bool()
        found = flash_model(rows, **given, **more).logits[valid]
        torch.testing.assert_close(found, sdpa(rows, **given).logits[valid], **CLOSE)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"attention_mask": torch.ones(2, 1, 12, 12).bool()}, "4 dimensions, which flash_attent"),
        ({"position_ids": PACKED}, "2 rows, which flash_attention_2 does not take together"),
        (
            {"position_ids": PACKED, "attention_mask": torch.arange(12).expand(2, -1) > 1},
            "padding, which flash_attention_2 does not take together.*'sdpa'",
        ),
    ],
)
def test_what_flash_attention_cannot_honor_is_refused(flash_model, given, said):
    with pytest.raises(ValueError, match=said):
        flash_model(tokens(2, 12), **given)


def test_an_attention_of_ones_own_gets_the_keywords_of_its_own():
    seen = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, attention_mask, kwargs["note"]))
        return torch.zeros_like(query.transpose(1, 2)), None

    AttentionInterface.register("mine", attend)
    try:
        model = tiny_model()
        model.set_attn_implementation("mine")
        model(tokens(1, 4), note="to myself")
    finally:
        del AttentionInterface._global_mapping["mine"]
    assert seen == [(layer, None, "to myself") for layer in range(3)]


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"threshold": 0.5}, True),
        ({"threshold": 0.5, "inference_max_experts_per_token": 3}, False),
        ({"threshold": 0.5, "max_experts_per_token": 3}, False),
        (ROUTINGS["top_k"], False),
    ],
)
def test_an_engine_that_pads_without_a_cap_is_told_the_remedy(settings, warns, caplog):
    AttentionInterface.register("engine", lambda *_, **__: None)
    try:
        tiny_model(**settings)
        assert not caplog.records  # our own experts pay for no slot
        tiny_model(attention="engine", **settings)
    finally:
        del AttentionInterface._global_mapping["engine"]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warns
    if warns:
        assert "all 8 experts for every token" in said[0]
        assert "--hf-overrides '{\"inference_max_experts_per_token\": N}'" in said[0]


# Masks of four dimensions


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_a_mask_for_every_two_tokens(attention, dtype):
    model, ids = tiny_model(attention=attention, threshold=0.5), tokens(2, 12)
    sees = torch.ones(12, 12, dtype=torch.bool).tril()
    apart = sees & (torch.arange(12) >= 7) == (torch.arange(12) >= 7)[:, None]
    apart &= sees
    for wanted, given in ((sees, {}), (apart, {"position_ids": PACKED})):
        mask = wanted[None, None].expand(2, 1, 12, 12)
        if dtype != torch.bool:
            lowest = torch.finfo(dtype).min
            mask = torch.zeros(2, 1, 12, 12, dtype=dtype).masked_fill(~mask, lowest)
        found = model(ids, attention_mask=mask, **given)
        torch.testing.assert_close(found.logits, model(ids, **given).logits, **CLOSE)


def test_who_sees_nothing_is_padding():
    model = tiny_model(threshold=0.5)
    ids, mask = left_padded([tokens(1, 5)[0], tokens(1, 9)[0]])
    sees = torch.ones(9, 9, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    found = model(ids, attention_mask=sees, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    expected = model(ids, attention_mask=mask)
    assert torch.equal(found.experts_per_token, expected.experts_per_token)
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()], **CLOSE)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(1, 4, 4), r"\(1, 4, 4\): give \[1, 4\]"),
        (torch.ones(1, 1, 4, 5), r"\(1, 1, 4, 5\).* or \[1, 1, 4, 4\]"),
        (torch.ones(3, 1, 4, 4), r"\(3, 1, 4, 4\)"),
        (torch.ones(1, 3, 4, 4), r"\(1, 3, 4, 4\)"),
        (torch.ones(1, 1, 4, 4, dtype=torch.int64), "torch.int64: give bool, True where"),
        ({"full_attention": None}, "is a dict, which sdpa cannot take"),
    ],
    ids=str,
)
def test_a_mask_that_cannot_be_honored_is_refused(mask, said):
    with pytest.raises(ValueError, match=said):
        tiny_model()(tokens(1, 4), attention_mask=mask)


# Caches, continuous batching


def test_a_static_cache_gives_what_a_growing_one_gives():
    model = tiny_model(threshold=0.5)
    ids, mask = left_padded([tokens(1, 4)[0], tokens(1, 9)[0]])
    growing = model.generate(ids, attention_mask=mask, **GREEDY)
    static = model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)
    assert torch.equal(static, growing)
    # by hand, with a mask as long as what was seen, or as the cache
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        longer = F.pad(mask, (0, 2), value=1)
        found = model(tokens(2, 2), attention_mask=longer, past_key_values=cache)
        expected = model(torch.cat((ids, tokens(2, 2)), dim=1), attention_mask=longer)
        last = model(tokens(2, 1), attention_mask=F.pad(longer, (0, 1), value=1),
                     past_key_values=cache)  # fmt: skip
    torch.testing.assert_close(found.logits, expected.logits[:, 9:], **CLOSE)
    assert torch.equal(found.experts_per_token, expected.experts_per_token[:, :, 9:])
    assert last.logits.isfinite().all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_continuous_batching_gives_what_each_prompt_gives_alone(attention):
    model = tiny_model(attention=attention, eos_token_id=1, **ROUTINGS["dtop_p"])
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 9, 3, 17)]
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(eos_token_id=1, pad_token_id=0, **GREEDY),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
    )
    assert [output.generated_tokens for output in outputs.values()] == [
        model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


def test_text_after_padding_on_the_right_goes_on_where_the_row_ended():
    """The padding's own logits begin it, so only positions and what is seen can be right."""
    model, rows = tiny_model(threshold=0.5), [tokens(1, length)[0] for length in (4, 9)]
    ids = torch.stack([F.pad(row, (0, 9 - len(row))) for row in rows])
    mask = (torch.arange(9) < torch.tensor([[4], [9]])).long()
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["position_ids"][:, -1].tolist()), with_kwargs=True
    )
    new = model.generate(ids, attention_mask=mask, **GREEDY)[:, 9:]
    hook.remove()
    assert seen == [[3 + step, 8 + step] for step in range(6)]
    whole = model(torch.cat((rows[0], new[0]))[None]).logits[0, 4:-1].argmax(-1)
    assert torch.equal(new[0, 1:], whole)


def test_a_server_may_pass_its_tokenizer():
    model, ids = tiny_model(), tokens(1, 4)
    assert torch.equal(model(ids, tokenizer=object()).logits, model(ids).logits)
