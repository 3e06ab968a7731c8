"""Hashes of what a result depends on besides its flags: the code that trains, and the text."""

from __future__ import annotations

import ast
import hashlib
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The parts of megatron_dynmoe that run in a training. The others only read what it has written.
TRAINING_CODE = (
    "backends", "control", "data", "kernels", "model", "moe", "routing", "run.py",
    "settings/arguments.py", "settings/config.py", "settings/distribution.py",
    "settings/schedule.py", "settings/setting.py",
    "training/datasets", "training/forward.py", "training/loop.py", "upstream",
)  # fmt: skip
PACKAGES = ("torch", "megatron-core", "numpy")


def of_code(root: Path = ROOT / "megatron_dynmoe") -> str:
    """A hash of what the training code does: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for part in TRAINING_CODE:
        path = root / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                _drop_docstring(node)
            digest.update(f"{file.relative_to(root)}\n{ast.dump(tree)}\n".encode())
    for package in PACKAGES:
        digest.update(f"{package} {metadata.version(package)}\n".encode())
    return digest.hexdigest()[:12]


def commit() -> str:
    """The commit that is checked out, with a plus if other files than results differ from it."""
    name, changes = (
        subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        for words in (
            ("describe", "--always"),
            # Every run that ends writes into the results, which the next one does not read.
            ("diff", "--quiet", "HEAD", "--", ".", ":(exclude)study/results"),
        )
    )
    return (name.stdout.strip() or "unknown") + "+" * (changes.returncode == 1)


def of_files(paths: Iterable[Path]) -> str:
    """A hash of the names and contents of files."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()[:12]


def _drop_docstring(node: ast.AST) -> None:
    body = getattr(node, "body", None)
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        assert isinstance(body, list)
        if isinstance(body[0] if body else None, ast.Expr) and ast.get_docstring(node) is not None:
            del body[0]
