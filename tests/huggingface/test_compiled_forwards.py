"""The exported model compiles to one graph.

In a process of its own: in others a test may have put the CPU layer underneath, which compiles
nothing, and then a compiled model is the plain one.
"""

import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("compiled_forwards.py")


@pytest.mark.slow
def test_compiled_forwards():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FILE)]
    done = subprocess.run(command, cwd=FILE.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert f"{FILE.read_text().count('def test_')} passed" in done.stdout
