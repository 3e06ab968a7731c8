"""Where kernel tests run: on CUDA, or under Triton's interpreter (see tests/conftest.py)."""

import importlib.util
from typing import Any

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _round_to_nearest() -> None:
    """Let the interpreter round float32 to bf16 as a GPU does. By itself it cuts off."""
    from triton import language
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder

    def create_fp_trunc(self: Any, source: Any, to: Any) -> Any:
        kinds = source.dtype.scalar, to.scalar
        if kinds != (language.float32, language.bfloat16):
            return self.cast_impl(source, to)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        bits = rounded.view(torch.uint16).numpy().reshape(np.shape(source.data))
        return interpreter.TensorHandle(bits, to.scalar)

    builder.create_fp_trunc = create_fp_trunc


if DEVICE == "cpu" and importlib.util.find_spec("triton"):
    _round_to_nearest()
