"""Targets that are in the way or cannot be written: nothing is lost, nothing half-written."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_dynmoe.conversion import convert
from tests.conversion.bad_input.damage import (
    Refused,
    listing,
    main,
)


def test_targets_that_are_in_the_way(load: Path, model: Path, refused: Refused) -> None:
    refused.output.write_text("a file")
    refused.to_hf(load, "--output", "is a file", code=2)
    refused.from_hf(model, "--save", "is a file", flags=("--overwrite",), code=2)
    refused.output.unlink()
    refused.output.mkdir()
    (refused.output / "kept").write_text("kept")
    refused.to_hf(load, "not empty", "--overwrite", code=2)
    refused.from_hf(model, "not empty", "--overwrite", code=2)


@pytest.mark.parametrize("relation", (".", "inside", ".."))
def test_the_source_is_never_replaced(
    load: Path, model: Path, refused: Refused, relation: str
) -> None:
    for command, source, read, written in (
        ("to-hf", load, "--load", "--output"),
        ("from-hf", model, "--model", "--save"),
    ):
        before = listing(source)
        target = source / relation
        command_line = (command, read, source, written, target, "--overwrite")
        refused(*command_line, says=(str(source), "read"), code=2)
        link = refused.output.parent / "link"
        link.symlink_to(source)
        target = link / relation
        command_line = (command, read, source, written, target, "--overwrite")
        refused(*command_line, says=(str(source), "read"), code=2)
        link.unlink()
        assert listing(source) == before


@pytest.mark.parametrize("overwrite", (False, True))
@pytest.mark.parametrize("error", (OSError(28, "No space left on device"), KeyboardInterrupt()))
@pytest.mark.parametrize("name", ("write_shards", "write_manifest", "rename"))
def test_nothing_is_left_of_what_fails(
    load: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: BaseException,
    overwrite: bool,
) -> None:
    if overwrite:
        refused.output.mkdir()
        (refused.output / "kept").write_text("kept")

    def fail(*_: Any) -> None:
        raise error

    rename = Path.rename

    def fail_late(path: Path, target: Path) -> Path:
        return fail() if path.suffix == ".partial" else rename(path, target)

    if name == "rename":
        monkeypatch.setattr(Path, "rename", fail_late)
    else:
        monkeypatch.setattr(convert, name, fail)
    stopped = isinstance(error, KeyboardInterrupt)
    says = ("interrupted",) if stopped else ("No space left",)
    command = ("to-hf", "--load", load, "--output", refused.output, "--overwrite")
    refused(*command, says=says, code=130 if stopped else 1)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """The limit on the size of a file stands for one: writing fails in the libraries themselves."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk(load: Path, model: Path, refused: Refused, full_disk: None) -> None:
    refused.to_hf(load, str(refused.output), "cannot be written", "too large")
    refused.from_hf(model, str(refused.output), "cannot be written", "too large")


def test_a_parent_that_cannot_be_made(load: Path, model: Path, refused: Refused) -> None:
    file = refused.output.parent / "file"
    file.write_text("")
    for command in (
        ("to-hf", "--load", load, "--output", file / "new"),
        ("from-hf", "--model", model, "--save", file / "new"),
    ):
        refused(*command, says=(str(file),), code=2)


def test_a_missing_parent_is_made(model: Path, tmp_path: Path) -> None:
    save = tmp_path / "a" / "b" / "c"
    assert main(["from-hf", "--quiet", "--model", str(model), "--save", str(save)]) == 0
    assert sorted(path.name for path in save.parent.iterdir()) == ["c"]


def test_overwriting_replaces_all_of_a_folder(load: Path, tmp_path: Path) -> None:
    output = tmp_path / "parent" / "new"
    output.mkdir(parents=True)
    (output / "old").write_text("old")
    command = ["to-hf", "--quiet", "--load", str(load), "--output", str(output), "--overwrite"]
    assert main(command) == 0
    assert (output / "config.json").exists() and not (output / "old").exists()
    assert [path.name for path in output.parent.iterdir()] == ["new"]


def test_a_folder_of_links_is_read_and_left_alone(model: Path, tmp_path: Path) -> None:
    """As the cache of huggingface_hub keeps models, whose files nothing may change."""
    links = tmp_path / "links"
    links.mkdir()
    for path in model.iterdir():
        path.chmod(0o444)
        (links / path.name).symlink_to(path)
    before = listing(model), listing(links)
    assert main(["from-hf", "--quiet", "--model", str(links), "--save", str(tmp_path / "new")]) == 0
    assert (listing(model), listing(links)) == before
