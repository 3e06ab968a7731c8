"""Whether the original or the double is asked."""

import os
import subprocess

import pytest

from tests.doubles import on_cpu


def test_make_asks_the_original_or_ends_with_an_error():
    # Not as a part of `make test`, which would make it say which folder it enters.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    commands = subprocess.run(
        ["make", "-n", "test-te"], env=alone, capture_output=True, text=True
    ).stdout
    assert commands.splitlines()[0].endswith("-m tests.doubles.on_cpu")
    if on_cpu.has_the_original():
        on_cpu.main()
    else:
        with pytest.raises(
            SystemExit, match=r"Transformer Engine is not installed here.*extra 'te'"
        ):
            on_cpu.main()
