"""``@FILE``: the flags of a training in a file, written as a recipe is."""

from argparse import ArgumentParser

import pytest

from megatron_dynmoe.settings.messages.command_line import UsageError
from megatron_dynmoe.training.flags import add_flags

pytestmark = pytest.mark.megatron


@pytest.fixture
def parse(tmp_path, monkeypatch):
    parser = ArgumentParser()
    parser.add_argument("--lr", type=float)
    parser.add_argument("--tokenizer-model")
    add_flags(parser)

    def parse(text, word="@my.flags"):
        (tmp_path / "my.flags").write_text(text)
        return parser.parse_args([word])

    monkeypatch.chdir(tmp_path)
    return parse


def test_comments_and_quotes_are_read_as_in_a_recipe(parse):
    args = parse("# mine\n\n--lr 1e-3 # low\n--tokenizer-model 'a b.model'\n")
    assert (args.lr, args.tokenizer_model) == (1e-3, "a b.model")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("--tokenizer-model 'a b", '@my.flags, line 1: No closing quotation in "--tokenizer-mod'),
        ("\ninclude other.flags", r"@my.flags, line 2: .* give \$\(dynmoe recipe FILE\) in place"),
        ("--lr\0 1", "^my.flags is not a file of flags: it is binary, or in UTF-16.$"),
    ],
)
def test_a_line_that_cannot_be_read_is_a_plain_refusal(parse, text, says):
    with pytest.raises(UsageError, match=says):
        parse(text)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("my.flags", "^my.flags belongs to no flag: @my.flags gives the flags that stand in"),
        ("@mine.flags", "^@mine.flags names a file of flags: no such file or directory in /"),
        ("@/", "^@/ names a file of flags: is a directory.$"),
    ],
)
def test_a_file_that_is_named_in_another_way_is_a_plain_refusal(parse, word, says):
    with pytest.raises(UsageError, match=says):
        parse("--lr 1", word)
