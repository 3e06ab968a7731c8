#!/usr/bin/env bash
# Trains on this machine alone, without Slurm:
#
#   [NPROC=8] launch/local.sh RECIPE [FLAGS ...]
#
# One process a GPU, or one process in all on a machine without. The same command with
# --run-dir DIR goes on with an earlier run. Ctrl-C, SIGTERM or the end of the terminal lead to a
# checkpoint, and an exit code of 128 + the signal, because the run is not finished.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
if [[ ${1:-} == --help || ${1:-} == -h ]]; then help; fi
if (($# == 0)) || [[ $1 == --* ]]; then
  fail "name a recipe or a file of flags first, as in launch/local.sh my.flags --run-dir runs/mine." \
    "dynmoe recipe lists the recipes."
fi
if (($# > 1)) && [[ $2 != --* ]]; then fail "'$2' belongs to no flag: --run-dir names the run's folder."; fi
CLUSTER_ENV=${CLUSTER_ENV:-$launch/cluster.env}
if [[ ! -f $CLUSTER_ENV ]]; then CLUSTER_ENV=/dev/null; fi # a workstation needs none
load_settings
read_arguments "$@"
again=("$0" "$@")

NPROC_GIVEN=${NPROC:-}
if [[ -z $NPROC_GIVEN ]]; then
  NPROC=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
  if ((NPROC == 0)); then NPROC=1; fi
fi
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || fail "NPROC is '$NPROC': give the number of processes, from 1."
export NPROC NODES=1 LAUNCHER=torchrun
if [[ -n $NETWORK_INTERFACE ]]; then address_of_this_node >/dev/null; fi
begin_attempt "$NPROC"

stopped='' ranks=''
# shellcheck disable=SC2317 # trap calls it
stop_ranks() {
  stopped=$1
  if [[ -n $ranks ]]; then pkill -TERM -P "$ranks" || true; fi
}
trap 'stop_ranks 130' INT
trap 'stop_ranks 143' TERM
trap 'stop_ranks 129' HUP
"${CONTAINER[@]}" bash "$launch/rank.sh" "${rank_flags[@]}" &
ranks=$!
logs=("$ATTEMPT/rank-$(printf %03d $((NPROC - 1))).log") # the last rank prints the progress,
if ((NPROC > 1)); then logs=("$ATTEMPT/rank-000.log" "${logs[@]}"); fi # the first one what to know
touch "${logs[@]}"
tail --pid="$ranks" --quiet --lines=+1 --follow "${logs[@]}" |
  "$PYTHON" "$checkout/tools/show_progress.py" &
wait_for_ranks
wait # for the last lines

verdict=0
run_python -m megatron_dynmoe attempt end "$ATTEMPT" --status "$status" \
  ${stopped:+--stopped} || verdict=$?
if ((verdict == 75)); then
  if [[ " $* " != *" --run-dir "* ]]; then again+=(--run-dir "$(dirname "$(dirname "$ATTEMPT")")"); fi
  echo "to go on: ${NPROC_GIVEN:+NPROC=$NPROC }$(printf '%q ' "${again[@]}")"
  if [[ -n $stopped ]]; then verdict=$stopped; fi
fi
exit "$verdict"
