"""The code that lies in a model's folder, so that the folder loads without this package."""

import re
from pathlib import Path

# In ``config.json``: where in the folder Transformers finds the classes.
AUTO_MAP = {
    "AutoConfig": "configuration_dynmoe.DynMoEModelConfig",
    "AutoModel": "modeling_dynmoe.DynMoEModel",
    "AutoModelForCausalLM": "modeling_dynmoe.DynMoEForCausalLM",
}
# The place of these files in the package. In a folder they lie side by side.
SHIPPED = (
    "huggingface/budgets_dynmoe.py",
    "huggingface/configuration_dynmoe.py",
    "huggingface/layers_dynmoe.py",
    "huggingface/loss_dynmoe.py",
    "huggingface/masking_dynmoe.py",
    "huggingface/modeling_dynmoe.py",
    "huggingface/validation_dynmoe.py",
    "kernels/choose_cpu.py",
    "layers/moe.py",
    "layers/rules.py",
    "routing/keep_dtype.py",
    "routing/losses.py",
    "routing/normalize.py",
    "routing/rules/expert_threshold.py",
    "routing/rules/null_experts.py",
    "routing/rules/relu.py",
    "routing/rules/seq_top_k.py",
    "routing/select.py",
)
_PACKAGE = Path(__file__).parent.parent


def write_code(folder: Path) -> None:
    """Copy the files into an existing folder; there they import each other, not the package."""
    for name in SHIPPED:
        code = (_PACKAGE / name).read_text("utf-8")
        code = re.sub(
            r"^from megatron_dynmoe\.[\w.]*\b(\w+) import", r"from .\1 import", code, flags=re.M
        )
        (folder / Path(name).name).write_text(code, "utf-8")
