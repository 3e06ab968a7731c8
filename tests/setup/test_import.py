"""Importing the package is free of side effects."""

import subprocess
import sys


def test_import_loads_neither_torch_nor_megatron() -> None:
    heavy = {"torch", "megatron", "numpy", "transformers"}
    code = f"import sys, megatron_dynmoe; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
