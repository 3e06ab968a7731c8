"""Text from an exported model: streaming, counts, what is shown, and plain errors."""

import contextlib
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dynmoe.cli import generate as command
from megatron_dynmoe.huggingface import DynMoEForCausalLM
from megatron_dynmoe.use.generate import generate
from megatron_dynmoe.use.load import load_config, load_model, load_tokenizer
from megatron_dynmoe.use.token_display import (
    PALETTE,
    ColorScale,
    Detokenizer,
    TokenDisplay,
    paint_digits,
    printable,
)
from tests.helpers.tiny_export import VOCAB_SIZE, command_environment, export_tiny, make_tokenizer

PROMPT = "It is a truth universally acknowledged, “naïve” 🙂\n  日本 and so"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    export_tiny(folder, make_tokenizer(folder), threshold=0.6, max_position_embeddings=256)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder, load_config(folder))


def run(folder: Path, *flags: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command in this process: exit status, stdout, stderr."""
    with pytest.raises(SystemExit) as exit_info:
        command.main(["--model", str(folder), *flags])
    out, err = capsys.readouterr()
    status = exit_info.value.code
    if isinstance(status, str):
        status, err = 1, err + status + "\n"
    return status, out, err


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# Detokenizer


TOKEN = st.one_of(
    st.integers(0, VOCAB_SIZE + 7),  # also ids without a token
    st.integers(0, 258),  # special tokens and bytes
    st.sampled_from([3 + byte for byte in "é日🙂\n a".encode()]),
)


@settings(max_examples=200)
@given(ids=st.lists(TOKEN, max_size=120))
def test_pieces_of_any_tokens_are_the_decoded_whole(tokenizer: Any, ids: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in ids] + [detokenizer.finish()]
    assert "".join(pieces) == decode(tokenizer, ids)


@settings(max_examples=40)
@given(text=st.text(max_size=60))
def test_pieces_of_text_are_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in ids] + [detokenizer.finish()]
    assert "".join(pieces) == decode(tokenizer, ids)


def byte_level_tokenizer() -> Any:
    """As GPT-2's: a token may be any part of a character."""
    import tokenizers
    import transformers

    rust = tokenizers.Tokenizer(tokenizers.models.BPE())
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator([PROMPT] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=rust)


def test_characters_of_several_byte_level_tokens_are_held_back() -> None:
    tokenizer = byte_level_tokenizer()
    text = "aé日🙂 b"
    ids = tokenizer(text)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) == text and detokenizer.finish() == ""
    assert len(ids) > len(text)  # so that there was something to hold back
    assert "\ufffd" not in pieces


def test_the_space_that_decoding_strips_comes_once(folder: Path) -> None:
    """As Llama's: a space is put before the text, and decoding takes the first one away."""
    import tokenizers
    import transformers

    rust = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    rust.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=rust)
    ids = tokenizer(" and so they were  very good" * 30)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in ids] + [detokenizer.finish()]
    assert "".join(pieces) == decode(tokenizer, ids)
    assert not pieces[0].startswith(" ") and pieces[1].startswith(" ")


def test_words_appear_with_their_token(tokenizer: Any) -> None:
    """Holding everything back to the end would be right, too, but no streaming."""
    ids = tokenizer("and so they were very good " * 30)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    assert all(detokenizer.add(token) for token in ids)


# TokenDisplay


def test_tokens_and_counts_may_come_in_any_order(tokenizer: Any) -> None:
    ids = tokenizer("and 日 so\n")["input_ids"]
    counts_LT = torch.arange(2 * len(ids)).view(2, -1)
    shown = []
    for tokens_first in (True, False):
        written: list[str] = []
        display = TokenDisplay(tokenizer, written.append, paint_digits)
        for i, token in enumerate(ids):
            steps = [
                lambda d=display, t=token: d.add_tokens([t]),
                lambda d=display, c=counts_LT[:, i : i + 1]: d.add_counts(c),
            ]
            for step in steps if tokens_first else reversed(steps):
                step()
        display.finish()
        shown.append("".join(written))
        assert torch.equal(display.counts_LT, counts_LT)
    assert shown[0] == shown[1]
    figures = re.findall(r"\[([\d.]+)\]", shown[0])
    assert re.sub(r"\[[\d.]+\]", "", shown[0]) == "and 日 so\n"
    assert float(figures[0]) == counts_LT[:, 0].double().mean()


def test_bytes_of_one_character_show_their_mean(tokenizer: Any) -> None:
    ids = [3 + byte for byte in "日".encode()]
    written: list[str] = []
    display = TokenDisplay(tokenizer, written.append, paint_digits)
    display.add_tokens(ids)
    display.add_counts(torch.tensor([[1, 2, 6]]))
    display.finish()
    assert written == ["日[3.0]"]


def test_a_token_without_a_count_is_shown_at_the_end(tokenizer: Any) -> None:
    written: list[str] = []
    display = TokenDisplay(tokenizer, written.append, paint_digits)
    display.add_tokens([3 + byte for byte in "日".encode()])
    display.add_counts(torch.tensor([[1, 3]]))
    assert not written
    display.finish()  # the mean of the bytes that have one
    assert written == ["日[2.0]"]

    written.clear()
    display = TokenDisplay(tokenizer, written.append, paint_digits)
    display.add_tokens(tokenizer("and so", add_special_tokens=False)["input_ids"])
    display.add_counts(torch.ones(1, len(display.tokens) - 1).long())
    display.finish()
    shown = "".join(written)
    assert shown.replace("[1.0]", "") == "and so" and not shown.endswith("]")


def test_digits_stand_before_the_line_break() -> None:
    assert paint_digits("word\n\n", 1.75) == "word[1.8]\n\n"


def test_colors_go_from_the_first_to_the_last() -> None:
    scale = ColorScale(16)
    colors = [
        int(re.search(r"48;5;(\d+)m", scale.paint("x", mean)).group(1))  # type: ignore[union-attr]
        for mean in (1.0, 1.5, 2.0, 3.0, 8.0, 16.0)
    ]
    ranks = [PALETTE.index(color) for color in colors]
    assert ranks == sorted(set(ranks)) and (ranks[0], ranks[-1]) == (0, len(PALETTE) - 1)
    assert scale.paint("a\nb", 1.0).split("\n")[0].endswith("\x1b[0m")
    assert scale.legend().count("\x1b[0m") == len(PALETTE)


def test_a_model_cannot_steer_the_terminal() -> None:
    assert printable("\x1b[2J\r\x9b\tok\n") == "\ufffd[2J\ufffd\ufffd\tok\n"


# The command


def test_plain_text_is_the_decoded_whole(
    folder: Path, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--prompt", PROMPT, "--max-new-tokens", "40", "--experts", "none")
    status, out, err = run(folder, *flags, capsys=capsys)
    ids = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=40, do_sample=False)[0].tolist()
    assert (status, out, err) == (0, decode(tokenizer, expected) + "\n", "")


def test_ids_without_a_token_are_never_chosen(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here one of two rows of the vocabulary's padding has the largest logit, whatever is read."""
    copy = shutil.copytree(folder, tmp_path / "model")
    model = DynMoEForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[VOCAB_SIZE], weight[VOCAB_SIZE + 1] = 50 * weight[5], -50 * weight[5]
    model.save_pretrained(copy)
    flags = ("--prompt", PROMPT, "--max-new-tokens", "8", "--experts", "none")
    written = run(copy, *flags, capsys=capsys)
    assert written == run(folder, *flags, capsys=capsys)
    assert len(written[1]) > len(PROMPT) + 1


def test_digits_are_the_counts_of_a_pass_over_the_text(
    folder: Path, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--prompt", "and so they", "--max-new-tokens", "12")
    status, out, _ = run(folder, *flags, capsys=capsys)
    prompt = tokenizer("and so they", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    counts_LT = model(ids[:, :-1]).experts_per_token[:, 0].double()  # the last one is never read
    legend, body = out.split("\n\n", 1)
    body, summary = body.rsplit("\n\n", 1)

    assert status == 0 and "1 to 8" in legend
    written: list[str] = []
    display = TokenDisplay(tokenizer, written.append, paint_digits)
    display.add_tokens(ids[0].tolist())
    display.add_counts(counts_LT)
    display.finish()
    assert body == "".join(written)

    split = prompt["input_ids"].shape[1]
    rows = {line.rsplit(None, 2)[0]: line.split()[-2:] for line in summary.splitlines()}
    means = [[f"{part.mean():.2f}" for part in (row[:split], row[split:])] for row in counts_LT]
    assert rows["layer 1"] == means[0] and rows["layer 3"] == means[1]  # the second is dense
    assert rows["all"] == [
        f"{part.mean():.2f}" for part in (counts_LT[:, :split], counts_LT[:, split:])
    ]
    assert rows["tokens read"] == [str(split), str(ids.shape[1] - split - 1)]
    assert len(set(means[0] + means[1])) > 1  # so that the test can tell layers apart


def test_streams_while_it_generates(model: Any, tokenizer: Any) -> None:
    """The first words are there before the last step."""
    written: list[str] = []
    display = TokenDisplay(tokenizer, written.append)
    lengths = []
    hook = model.register_forward_hook(lambda *_: lengths.append(len("".join(written))))
    ids = tokenizer("and so they were")["input_ids"]
    generate(model, ids, display, count_experts=False, max_new_tokens=8, do_sample=False)
    hook.remove()
    assert lengths == sorted(lengths) and len(set(lengths)) > 4
    assert lengths[0] >= len("and so they")


def test_no_token_is_read_for_its_count_alone(model: Any, tokenizer: Any) -> None:
    read: list[int] = []
    hook = model.register_forward_hook(
        lambda _module, _args, given, _output: read.append(given["input_ids"].shape[1]),
        with_kwargs=True,
    )
    display = TokenDisplay(tokenizer, lambda _: None, paint_digits)
    ids = tokenizer("and so they were")["input_ids"]
    generate(model, ids, display, count_experts=True, max_new_tokens=8, do_sample=False)
    hook.remove()
    assert sum(read) == display.counts_LT.shape[1] == len(display.tokens) - 1
    assert read == [len(ids)] + [1] * (len(read) - 1)


def test_beams_come_at_the_end_with_counts(
    folder: Path, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--prompt", "and so", "--max-new-tokens", "6", "--num-beams", "3")
    status, out, _ = run(folder, *flags, capsys=capsys)
    ids = model.generate(
        **tokenizer("and so", return_tensors="pt"), max_new_tokens=6, num_beams=3, do_sample=False
    )
    assert status == 0
    assert decode(tokenizer, ids[0].tolist()) in re.sub(r"\[[\d.]+\]", "", out)
    mean = model(ids[:, :-1]).experts_per_token.double().mean(dim=0)
    assert f"[{mean[0, 0]:.1f}]" in out
    read = next(line for line in out.splitlines() if line.startswith("tokens read"))
    assert sum(map(int, read.split()[2:])) == ids.shape[1] - 1


def test_seed_decides_and_temperature_zero_is_greedy(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def text(*flags: str) -> str:
        basics = ("--prompt", "and so", "--max-new-tokens", "10", "--experts", "none")
        return run(folder, *basics, *flags, capsys=capsys)[1]

    hot = ("--temperature", "3.0")
    assert text(*hot, "--seed", "1") == text(*hot, "--seed", "1") != text(*hot, "--seed", "2")
    assert text("--temperature", "0") == text()
    assert text("--top-k", "1") == text()
    assert text("--top-p", "0.0001") == text()


def test_threshold_and_cap_override(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def figures(*flags: str) -> set[str]:
        out = run(folder, "--prompt", "and", "--max-new-tokens", "3", *flags, capsys=capsys)[1]
        return set(re.findall(r"\[(\d\.\d)\]", out))

    assert figures("--threshold", "0") == {"1.0"}
    assert figures("--threshold", "1") == {"8.0"}
    assert figures("--threshold", "1", "--max-experts-per-token", "3") == {"3.0"}


def test_prompt_from_a_pipe_or_file(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "two\nlines\n"
    flags = ("--max-new-tokens", "3", "--experts", "none")
    expected = run(folder, "--prompt", "two\nlines", *flags, capsys=capsys)[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert run(folder, "--prompt", "-", *flags, capsys=capsys)[1] == expected
    (tmp_path / "prompt.txt").write_text(text)
    prompt_file = ("--prompt-file", str(tmp_path / "prompt.txt"))
    assert run(folder, *prompt_file, *flags, capsys=capsys)[1] == expected


def test_new_tokens_end_where_the_positions_do(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(folder, "--prompt", "a " * 120, "--max-new-tokens", "999", capsys=capsys)
    assert status == 0 and "new tokens fit" in err
    tokens = next(line for line in out.splitlines() if line.startswith("tokens")).split()[2:]
    assert sum(map(int, tokens)) <= 256
    status, _, err = run(folder, "--prompt", "a " * 300, capsys=capsys)
    assert status == 1 and "256 positions: shorten" in err


def test_fixed_experts_are_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    flags = ("--prompt", "and", "--max-new-tokens", "2")
    status, out, err = run(tmp_path, *flags, capsys=capsys)
    assert status == 0 and out.startswith("and") and "experts per token" not in out
    assert "every token of this model (mixtral) uses 2 experts" in err
    status, _, err = run(tmp_path, *flags, "--threshold", "0.5", capsys=capsys)
    assert status == 2 and "--threshold is 0.5, but every token" in err


@pytest.mark.slow
def test_color_on_a_real_terminal_without_megatron(folder: Path) -> None:
    """One process: --help loads no torch, the terminal gets color, Megatron is never loaded."""
    code = f"""
import sys
from megatron_dynmoe.generate import main
def run(*flags):
    try: main(flags)
    except SystemExit as end: assert end.code == 0, end.code
run("--help")
assert "torch" not in sys.modules
run("--model", {str(folder)!r}, "--prompt", "and so", "--max-new-tokens", "2")
assert not any(name.startswith("megatron.") for name in sys.modules)
"""
    environment = command_environment() | {"TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    reader, writer = pty.openpty()
    command_line = [sys.executable, "-c", code]
    process = subprocess.Popen(command_line, stdout=writer, stderr=writer, env=environment)
    os.close(writer)
    out = b""
    with contextlib.suppress(OSError):  # what a pseudo-terminal says at the end
        while part := os.read(reader, 4096):
            out += part
    os.close(reader)
    assert process.wait() == 0, out.decode()
    assert re.search(rb"\x1b\[38;5;16;48;5;\d+m and\x1b\[0m|5;\d+mand\x1b\[0m", out)


@pytest.mark.parametrize(
    ("is_terminal", "variables", "asked_for", "mode"),
    [
        (True, {}, None, "color"),
        (True, {"NO_COLOR": "1"}, None, "digits"),
        (True, {"NO_COLOR": ""}, None, "color"),  # no-color.org: only where it is not empty
        (True, {"TERM": "dumb"}, None, "digits"),
        (False, {}, None, "digits"),
        (False, {"NO_COLOR": "1"}, "color", "color"),
        (True, {}, "none", "none"),
    ],
)
def test_color_where_it_is_wanted(
    is_terminal: bool,
    variables: dict[str, str],
    asked_for: str | None,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert command._mode(asked_for) == mode


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--prompt", "x", "--threshold", "1.5"], 2, "--threshold is 1.5: use 0 to 1."),
        (["--prompt", "x", "--threshold", "nan"], 2, "--threshold is nan: use 0 to 1."),
        (["--prompt", "x", "--threshold", "high"], 2, "--threshold is 'high': give a number."),
        (["--prompt", "x", "--max-new-tokens", "0"], 2, "--max-new-tokens is 0: use at least 1."),
        (["--prompt", "x", "--max-experts-per-token", "9"], 2, "the model has 8 experts"),
        (["--prompt-file", "missing.txt"], 2, "--prompt-file is missing.txt: No such file"),
        (["--prompt", "x", "--device", "abacus"], 2, "--device is abacus, which is not here: "),
        ([], 2, "give --prompt or --prompt-file."),
    ],
)
def test_bad_flags_are_named(
    folder: Path,
    flags: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    actual, _, err = run(folder, *flags, capsys=capsys)
    assert actual == status and message in err
    assert "Traceback" not in err and len(err.splitlines()[-1]) < 400


def damage(folder: Path, kind: str) -> None:
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif kind == "threshold":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"threshold": 1.2}))
    elif kind == "no JSON":
        (folder / "config.json").write_text("{")
    elif kind == "no weights":
        (folder / "model.safetensors").unlink()
    elif kind == "truncated":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-100])
    elif kind in ("missing weight", "unknown weight"):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.router.weight"
        if kind == "missing weight":
            del weights[name]
        else:
            weights[f"{name}2"] = weights[name].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "no bos":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("bos_token")
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "it has no config.json"),
        ("no tokenizer", "it has no tokenizer"),
        ("threshold", "threshold is 1.2"),
        ("no JSON", "config.json"),
        ("no weights", "no .safetensors file"),
        ("truncated", "model"),
        ("missing weight", "1 missing weights, the first is model.layers.0.mlp.router.weight"),
        ("unknown weight", "1 unexpected weights"),
        ("no bos", "the prompt is empty"),
    ],
)
def test_bad_folders_are_named(
    folder: Path,
    tmp_path: Path,
    kind: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path, kind)
    prompt = "" if kind == "no bos" else "x"
    status, out, err = run(tmp_path, "--prompt", prompt, capsys=capsys)
    assert (status, out) == (2 if kind == "no config" else 1, "") and message in err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_missing_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(tmp_path / "nowhere", "--prompt", "x", capsys=capsys)
    assert status == 2 and err.strip().endswith("/nowhere: there is no such folder")
    assert "--model is " in err


@pytest.mark.parametrize("named", ["run", "run/checkpoints", "run/checkpoints/iter_0000004"])
def test_a_checkpoint_in_place_of_a_model_is_told_the_way(
    named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "iter_0000004").mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("4")
    status, _, err = run(tmp_path / named, "--prompt", "x", capsys=capsys)
    assert status == 2 and err.strip().endswith(
        f"but a checkpoint: dynmoe evaluate takes it as --load {checkpoints}, and dynmoe convert "
        f"to-hf --load {checkpoints} --output DIR makes a model of it"
    )


def test_empty_prompt_begins_with_bos(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(folder, "--prompt", "", "--max-new-tokens", "4", capsys=capsys)
    assert status == 0 and re.search(r"^tokens read +1 +\d$", out, re.MULTILINE)


def test_code_in_the_folder_is_not_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", None],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    status, _, err = run(tmp_path, "--prompt", "x", "--max-new-tokens", "1", capsys=capsys)
    assert status == 0, err
    assert not (tmp_path / "ran").exists()
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "foreign"}))
    status, _, err = run(tmp_path, "--prompt", "x", capsys=capsys)
    assert status == 1 and "config.json" in err
    assert not (tmp_path / "ran").exists()
