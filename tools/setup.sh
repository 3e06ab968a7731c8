#!/usr/bin/env bash
# Makes .venv with a Python that this package supports and installs the tested set of packages.
#
#   tools/setup.sh                          finds the Python itself
#   PYTHON=/path/to/python tools/setup.sh   takes this one and no other
#
# .venv/.installed records what was installed from what; while that is unchanged, a call does
# nothing. It needs no root, and writes nothing outside the repository but pip's (or uv's) cache.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv stamp=.venv/.installed
readonly minors="12 13" # of Python 3; in step with requires-python in pyproject.toml
# Called with the modules that it has to have.
readonly probe='
import sys
version = "%d.%d.%d" % sys.version_info[:3]
if not (3, 12) <= sys.version_info[:2] <= (3, 13):
    print("is Python " + version)
elif sys.implementation.name != "cpython" or "t" in sys.abiflags:
    print("is not the usual CPython (PyPy or free-threaded)")
else:
    try:
        for name in sys.argv[1:]:
            __import__(name)
        print("ok " + version)
    except ImportError:
        print("is Python " + version + " without " + name)
'
python="" verdict="" looked_at=""

main() {
    if [[ -n ${PYTHON:-} ]]; then
        accept "$PYTHON" || fail_with_remedies "PYTHON=$PYTHON cannot be used: it $verdict."
    fi
    local wanted=$verdict
    wait_for_others

    if has_working_venv && [[ -z $wanted || $wanted == "$verdict" ]]; then
        if cmp -s "$stamp" <(describe_installation); then
            echo "The environment in $venv is up to date."
            return
        fi
    else
        [[ -n $python ]] || find_python || fail_with_remedies "No Python 3.12 or 3.13 was found."
        echo "Making $venv with $python"
        "$python" -m venv --clear "$venv"
        has_working_venv || fail_with_remedies "$python made a $venv that $verdict."
    fi
    install
}

# Every target of make calls this script, and two shells may: they would install into one another's
# files. What is locked is this folder, so that nothing is left behind.
wait_for_others() {
    command -v flock >/dev/null || return 0 # macOS has none
    exec 9<.
    flock --nonblock 9 && return
    echo "Another setup is at work in this folder: waiting for it."
    flock 9
}

# Sets verdict to "ok VERSION" or to why the interpreter $1, which has to have the modules $2...,
# cannot be used. It is started for real, since a file of the right name may be a pyenv shim of a
# version that is not installed.
examine() {
    verdict=$("$1" -Ic "$probe" "${@:2}" 2>/dev/null </dev/null) || verdict="does not run"
    [[ -n $verdict ]] || verdict="does not run"
    [[ $verdict == "ok "* ]]
}

# Takes the interpreter $1 if it can be used, and remembers that it was looked at if not.
accept() {
    if examine "$1" venv ensurepip; then # Debian and Ubuntu have a package apart for ensurepip
        python=$1
    else
        looked_at+="  $1 $verdict"$'\n'
        return 1
    fi
}

find_python() {
    local name candidate minor pyenv_versions=${PYENV_ROOT:-${HOME:-}/.pyenv}/versions

    for name in python3.12 python3.13 python3; do
        while read -r candidate; do
            accept "$candidate" && return
        done < <(type -aP "$name" || true)
    done
    for minor in $minors; do
        for candidate in "$pyenv_versions/3.$minor"*/bin/python; do
            [[ -e $candidate ]] || continue
            accept "$candidate" && return
        done
    done
    if ! command -v uv >/dev/null; then
        looked_at+="  uv is not on the path"$'\n'
        return 1
    fi
    for minor in $minors; do
        candidate=$(uv python find --system --no-python-downloads "3.$minor" 2>/dev/null) || continue
        accept "$candidate" && return
    done
    echo "No Python 3.12 or 3.13 is installed: uv downloads one into its own folder (about 30 MB)"
    if uv python install 3.12 && candidate=$(uv python find --system 3.12); then
        accept "$candidate"
    else
        looked_at+="  uv could not install Python 3.12"$'\n'
        return 1
    fi
}

# An interrupted `python -m venv` leaves an interpreter without pip.
has_working_venv() {
    [[ -e $venv/bin/python ]] && examine "$venv/bin/python" pip
}

# The folder is part of it because the package is installed in place: after a move of the
# repository the installation would point to where it was.
describe_installation() {
    echo "Python ${verdict#ok } in $PWD"
    cat pyproject.toml setup.py constraints.txt
}

install() {
    local quiet=()
    [[ -t 1 ]] || quiet=(--quiet) # pip's own progress is for people, not for logs
    rm -f "$stamp"
    echo "Installing the package and the tested set of its dependencies into $venv:" \
        "the first time about 6 GB on disk, most of it torch's CUDA libraries, in 2 to 20 minutes"
    "$venv/bin/python" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} \
        --editable '.[dev]' --constraint constraints.txt || {
        echo "The installation did not finish (pip's message is above). Run it again when that is" \
            "mended: what is already there is kept." >&2
        exit 1
    }
    describe_installation >"$stamp.new"
    mv "$stamp.new" "$stamp"
    echo "Ready after $SECONDS s: Python ${verdict#ok } in $venv"
}

fail_with_remedies() {
    {
        echo "$1"
        [[ -z $looked_at ]] || printf 'Looked at:\n%s' "$looked_at"
        cat <<'END'
This package needs Python 3.12 or 3.13 (CPython, with its venv module). Any of these brings one:
  uv       pipx install uv                     (found by itself, downloads Python 3.12)
  pyenv    pyenv install 3.12                  (found by itself)
  conda    conda create -n dynmoe python=3.12 && conda activate dynmoe
  system   apt-get install python3.12 python3.12-venv   (Ubuntu 24.04; Debian 12 has 3.11 only)
Then call it again, or name an interpreter: make setup PYTHON=/path/to/python3.12
END
    } >&2
    exit 1
}

main
