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

# Runs a training whose --run-dir is $RUN, and shows its progress. If it fails or is stopped, this
# says what to do, and ends the script.
train_and_show() {
  local status stopped
  printf '  %s\n  everything Megatron says goes to %s\n\n' "$(printf '%q ' "$@")" "$RUN/log.txt"
  status=0
  trap 'stopped=yes' INT # the training saves and ends; what shows its progress stays until then
  # The last line of a training says how to go on, but not with the whole command, as this script does.
  "$@" > >(trap '' INT; tee "$RUN/log.txt" | python tools/show_progress.py |
    sed -u 's/; to \(go on\|train further\): .*//') 2>"$RUN/errors.txt" || status=$?
  wait
  if [ -n "${stopped:-}" ] && [ ! -e "$RUN/finished.json" ]; then
    if [ -f "$RUN/checkpoints/latest_checkpointed_iteration.txt" ]; then
      printf '\nto go on:\n  %s\n' "$(printf '%q ' "$@" --load "$RUN/checkpoints")"
    else
      printf '\nstopped before there was a checkpoint\n'
    fi
    exit 130
  fi
  if [ "$status" -ne 0 ]; then
    echo "training failed (exit code $status); the end of $RUN/errors.txt:" >&2
    grep -E '^(error: |(\[rank[0-9]+\]: )?[A-Za-z]*(Error|Exception)\b)' "$RUN/errors.txt" | head -5 >&2 ||
      tail -20 "$RUN/errors.txt" >&2
    exit "$status"
  fi
  trap - INT
}
