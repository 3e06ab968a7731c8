"""The command ``dynmoe``: its list, its answers to mistakes, its exit codes, its examples."""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dynmoe.__main__ import COMMANDS, main
from megatron_dynmoe.jobs.recipes import recipe_flags, recipe_names
from megatron_dynmoe.settings.messages.command_line import UsageError, ending_plainly
from megatron_dynmoe.settings.messages.words import format_flags

ROOT = Path(__file__).resolve().parents[2]

PIPE_SIZE = 2**16  # bytes that Linux keeps of what nobody has read yet


def dynmoe(*words: str, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_dynmoe", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **settings)


def run_here(capsys: pytest.CaptureFixture, *words: str) -> tuple[int | str | None, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


@pytest.fixture(autouse=True)
def argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", sys.argv)


def test_help_lists_every_command_and_imports_no_framework() -> None:
    code = (
        "import sys; from megatron_dynmoe.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'megatron', 'numpy', 'argparse'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^  {name} ", done.stdout, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("words", [("converd",), ("recipes",)])
def test_a_misspelled_command_is_answered_in_one_line(capsys, words) -> None:
    code, out, error = run_here(capsys, *words)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"dynmoe: error: there is no command \w+: did you mean \w+\?\n", error)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_every_commands_help_ends_with_an_example_that_it_can_read(
    capsys, monkeypatch, tmp_path, name
):
    code, out, _ = run_here(capsys, name, "--help")
    assert code == 0
    assert out.startswith(f"usage: dynmoe {name}")
    (example,) = re.findall(r"^example: (dynmoe .*)$", out, re.MULTILINE)
    first, command, *words = shlex.split(example)
    assert (first, command) == ("dynmoe", name)
    # Its flags are the command's: what is refused, if anything, is the made-up file or folder.
    monkeypatch.chdir(tmp_path)
    if name in ("doctor", "plan"):
        return  # they take seconds or need no file: their own tests run them
    with pytest.raises(SystemExit) as ended:
        main([command, *words])
    said = f"{ended.value.code} {capsys.readouterr().err}"
    for fault in (
        "there is no flag",
        "belongs to no flag",
        "required",
        "number of values",
        "use one of",
    ):
        assert fault not in said, said


def test_a_recipe_is_printed_or_written(capsys, tmp_path) -> None:
    code, _, error = run_here(capsys, "recipe", "nothere")
    assert code == 2 and error.startswith("dynmoe recipe: error: recipe is 'nothere'")
    assert run_here(capsys, "recipe", "smoke", "--seed", "7")[1].split("\n")[-2] == "--seed 7"
    file = tmp_path / "my.flags"
    assert run_here(capsys, "recipe", "--output", str(file), "smoke", "--seed", "7")[0] is None
    assert recipe_flags(file) == [*recipe_flags("smoke"), "--seed", "7"]
    code, _, error = run_here(capsys, "recipe", "--output", str(file), "smoke")
    assert code == 2 and f"--output is {file}, which is there already" in error
    listed = run_here(capsys, "recipe")[1]
    assert [line.split()[0] for line in listed.splitlines()] == recipe_names()
    assert format_flags(recipe_flags("smoke")) in run_here(capsys, "recipe", "smoke")[1]


def test_launch_scripts_are_written_whole(capsys, tmp_path) -> None:
    folder = tmp_path / "launch"
    assert run_here(capsys, "recipe", "--write-launch-scripts", str(folder))[0] is None
    wanted = {path.relative_to(ROOT / "launch") for path in (ROOT / "launch").rglob("*")}
    written = {path.relative_to(folder) for path in folder.rglob("*")}
    assert written == wanted - {Path("cluster.env")}
    assert run_here(capsys, "recipe", "--write-launch-scripts", str(folder))[0] == 2


def test_errors_and_signals_have_the_same_exit_codes_everywhere(capsys) -> None:
    with pytest.raises(SystemExit) as ended, ending_plainly("dynmoe x"):
        raise ValueError("a line\n and another")
    assert ended.value.code == "dynmoe x: error: a line and another"  # which exits with 1
    with pytest.raises(SystemExit) as ended, ending_plainly("dynmoe x"):
        raise UsageError("cannot be")
    assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended, ending_plainly("dynmoe x"):
        signal.raise_signal(signal.SIGINT)
    assert ended.value.code == 130
    with pytest.raises(SystemExit) as ended, ending_plainly("dynmoe x", "half is there"):
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    assert capsys.readouterr().err.endswith("dynmoe x: interrupted: half is there\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    "words",
    [
        "report absent",
        "plot absent",
        "plan absent.flags --gpus 8 --gpu a800-80g",
        "recipe absent.flags",
        "tokenizer --input absent --vocab-size 300 --output new",
        "preprocess --input absent --output-prefix new --tokenizer-type SentencePieceTokenizer "
        "--tokenizer-model absent",
        "convert to-hf --load absent --output new",
        "convert from-hf --model absent --save new",
        "analyze --model absent --data here.txt --output new",
        "analyze --model . --data absent.txt --output new",
        "analyze --merge absent.json --output new",
        "evaluate --model absent --tasks piqa",
        "calibrate --model absent --data here.txt --target 2",
        "generate --model absent --prompt x",
        "generate --model . --prompt-file absent",
    ],
)
def test_an_input_that_is_not_there_is_misuse(capsys, monkeypatch, tmp_path, words) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("Some text.")
    (tmp_path / "config.json").write_text("{}")
    code, out, error = run_here(capsys, *words.split())
    assert (code, out) == (2, "") and "absent" in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"here.txt", "config.json"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("convert from-hf --model MODEL --save new --threshold 0.3", "needs --routing"),
        ("convert from-hf --model MODEL --save new --routing top_p --threshold 2", "threshold is"),
        ("convert from-hf --model MODEL --save new --routing top_k", "--routing top_k: "),
        ("convert from-hf --model MODEL --save full", "--save: full is not empty"),
        ("convert to-hf --load MODEL --output full", "--output: full is not empty"),
        ("calibrate --model MODEL --data full --target 5", "--target is 5: "),
        ("calibrate --model MODEL --data full --budgets 1,5", "--budgets is 5: "),
        ("calibrate --model MODEL --data full --target 2 --max-experts-per-token 5", "4 experts"),
        ("calibrate --model MODEL --data full --target 2 --sequence-length 33", "32 positions"),
        ("calibrate --model MODEL --data full --target 2 --output full", "full is not empty"),
        ("calibrate --model MODEL --data full --target 2 --output no/new", "no folder no: create"),
        ("analyze --model MODEL --data full --sequence-length 33", "32 positions"),
        ("analyze --model MODEL --data full --output full", "--output: full is not empty"),
        ("generate --model MODEL --prompt x --max-experts-per-token 5", "4 experts"),
        ("generate --model MODEL --prompt x --budget 2", "--budget: "),
        ("evaluate --model MODEL --tasks piqa --output no/new", "no folder no: create"),
        ("plot full --output no/new.png", "no folder no: create"),
        ("tokenizer --input full --vocab-size 300 --output no/new", "no folder no: create"),
    ],
)
def test_a_flag_that_cannot_work_is_misuse(capsys, monkeypatch, tmp_path, words, said) -> None:
    """By itself, beside another flag, or with the model or folder that is named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "here.txt").write_text("Some text.")
    model = str(ROOT / "tests" / "fixtures" / "exported")
    code, _, error = run_here(capsys, *words.replace("MODEL", model).split())
    assert code == 2 and said in error and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_ctrl_c_ends_a_command_without_a_stack(tmp_path) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "megatron_dynmoe", "preprocess", "--input", "/dev/stdin",
         "--output-prefix", str(tmp_path / "out"), "--tokenizer-type", "SentencePieceTokenizer",
         "--tokenizer-model", "/dev/stdin"],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert running.stdin is not None
    running.stdin.write("x" * PIPE_SIZE + "\n")  # a full pipe is emptied by a command at work
    running.stdin.flush()
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130, error
    assert "Traceback" not in error
