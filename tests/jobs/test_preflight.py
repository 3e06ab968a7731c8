"""What is checked before a run has a GPU, beside its layout."""

import pytest

from megatron_dynmoe.jobs.parse import parse
from megatron_dynmoe.jobs.preflight import check_files, check_routing, check_run
from megatron_dynmoe.jobs.recipes import recipe_flags, recipe_names


@pytest.fixture(autouse=True)
def no_settings_file(monkeypatch):
    monkeypatch.delenv("DYNMOE_CONFIG", raising=False)


@pytest.fixture
def data(tmp_path):
    """Flags of data that is there."""
    for name in ("text.bin", "text.idx", "tokenizer.model"):
        (tmp_path / name).touch()
    return f"--data-path 0.5 {tmp_path}/text --tokenizer-model {tmp_path}/tokenizer.model".split()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_passes_on_a_node_of_eight(name, data):
    check_run([*recipe_flags(name), *data], 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--moe-dynamic-target-experts-per-token 17", "^--moe-dynamic-target-.* is 17"),
        ("--moe-dynamic-taget 2", "no setting 'taget'; known are --moe-dynamic-routing, "),
        ("--moe-dynamic-scope", "--moe-dynamic-scope is without a value"),
        ("--moe-dynamic-scope layer global", "--moe-dynamic-scope is layer global: give one"),
    ],
)
def test_a_mistake_in_routing_is_found(change, message):
    with pytest.raises(ValueError, match=message):
        check_routing([*recipe_flags("dtop_p_16e"), *change.split()], 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "null_experts --moe-dynamic-target-experts-per-token 0",
            "^--moe-dynamic-target-experts-per-token is 0: .*use more than 0 to 16",
        ),
        ("null_experts --moe-dynamic-null-slots 1", "^--moe-dynamic-null-slots is 1, fewer than"),
        ("relu --moe-dynamic-balance-loss none", "^--moe-dynamic-balance-loss is 'none'.* holds"),
    ],
)
def test_what_a_rule_cannot_do_is_found(change, message):
    flags = f"--moe-dynamic-target-experts-per-token 2 --moe-dynamic-routing {change}"
    with pytest.raises(ValueError, match=message):
        check_routing(flags.split(), 16)


def test_settings_in_yaml_count(tmp_path, monkeypatch):
    (tmp_path / "dynmoe.yaml").write_text("routing: dtop_p\ntarget_experts_per_token: 9")
    monkeypatch.setenv("DYNMOE_CONFIG", str(tmp_path / "dynmoe.yaml"))
    with pytest.raises(ValueError, match=r"^target_experts_per_token is 9"):
        check_routing([], 8)


def test_a_prefix_without_its_ending_is_completed(tmp_path):
    (tmp_path / "wiki_text_document.idx").touch()
    with pytest.raises(ValueError, match=f"did you mean {tmp_path / 'wiki_text_document'}"):
        check_files(["--data-path", str(tmp_path / "wiki")])


def test_missing_files_are_named(tmp_path, data):
    check_files(data)
    (tmp_path / "text.idx").unlink()
    with pytest.raises(ValueError, match=r"no file .*text\.idx: make it with"):
        check_files(data)
    with pytest.raises(ValueError, match="there is no data: give --data-path"):
        check_files(["--tokenizer-model", "x"])
    check_files(["--mock-data"])


def test_a_missing_tokenizer_is_named(tmp_path, data):
    with pytest.raises(ValueError, match="--tokenizer-model is missing"):
        check_files([*data[:3], "--tokenizer-type", "HuggingFaceTokenizer"])
    with pytest.raises(ValueError, match="--tokenizer-model is nowhere, but"):
        check_files([*data, "--tokenizer-model", "nowhere"])
    check_files([*data[:3], "--tokenizer-type", "NullTokenizer"])


@pytest.mark.megatron
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--clip-grads 1", "no flag --clip-grads: did you mean --clip-grad?"),
        ("--qqq", "no flag --qqq: look for it in --help"),
        ("--bf16 yes", "yes belongs to no flag"),
        ("--lr fast", "--lr is 'fast': give a number"),
    ],
)
def test_flags_are_those_of_the_training(change, message):
    flags = recipe_flags("dtop_p_64e8a")
    parse(flags)
    with pytest.raises(ValueError) as error:
        parse([*flags, *change.split()])
    assert message in str(error.value)
