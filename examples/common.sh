# shellcheck shell=bash
# What the examples share; they source it from the repository's root.

# One thread a process: these models are so small that more threads would wait for each other, and
# for hundreds of times as long as they work if something else runs beside them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The environment of make setup, unless another one is in use that has what is needed.
if [ -x .venv/bin/python ] && ! python -c '
import importlib.util, sys
sys.exit(importlib.util.find_spec("megatron") is None)' 2>/dev/null; then
  PATH=$PWD/.venv/bin:$PATH
fi

say() { # a heading, bold on a terminal
  if [ -t 1 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then
    printf '\n\033[1m%s\033[0m\n' "$1"
  else
    printf '\n%s\n' "$1"
  fi
}

show() { # print a command, then run it
  printf '  %s\n' "$(printf '%q ' "$@")"
  "$@"
}
