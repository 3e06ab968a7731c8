#!/usr/bin/env bash
# Submits a script of this folder with the cluster's settings, after checking what it asks for:
#
#   launch/submit.sh [--dry-run] [SBATCH OPTIONS] launch/pretrain_dtop_p.sh [RECIPE] [FLAGS ...]
#
# As sbatch, but partition, account and the like come from cluster.env, and mistakes are found here.
# --dry-run checks, and shows the command in place of running it. Recipes are listed by
# dynmoe recipe; flags are those of megatron_dynmoe.pretrain. More: README.md.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
if [[ ${1:-} == --help || ${1:-} == -h ]]; then help; fi
load_settings

options=() dry_run=''
while (($# > 0)) && [[ $1 != *.sh ]]; do
  if [[ $1 == --dry-run ]]; then dry_run=yes; else options+=("$1"); fi
  shift
done
[[ -f ${1:-} ]] || fail "name a script to submit: launch/submit.sh --nodes 2 launch/pretrain_dtop_p.sh"

# Sets given[--NAME] to the value of each option among the arguments; the last of a name counts.
declare -A given=()
read_options() {
  local name value
  while (($# > 0)); do
    value=${2:-}
    case $1 in
      --*=*) name=${1%%=*} value=${1#*=} ;;
      --*) name=$1 ;;
      -[aGNn]*)
        name=${1:0:2}
        if [[ $1 != "$name" ]]; then value=${1:2}; fi
        case $name in -a) name=--array ;; -G) name=--gpus ;; -N) name=--nodes ;; -n) name=--ntasks ;; esac
        ;;
      *) name='' ;;
    esac
    if [[ -n $name ]]; then given[$name]=$value; fi
    shift
  done
}

# The GPUs in a list as --gres has it: gpu, gpu:8, gpu:a800:8,shm:1; 0 where it names none.
count_gpus() {
  local item total=0
  for item in ${1//,/ }; do
    if [[ $item =~ ^(gres[:/])?gpu(:[^:]*[^:0-9][^:]*)?(:([0-9]+))?$ ]]; then
      total=$((total + ${BASH_REMATCH[4]:-1}))
    fi
  done
  echo "$total"
}

# Sets per_node to the processes that the job will start on each node, as run_job counts them, or
# unknown to the reason why it cannot be told before there is a job.
count_processes() {
  local gpus counts=()
  gpus=$(count_gpus "${given[--gres]:-}")
  if ((gpus > 0)); then counts+=("$gpus"); fi
  if [[ -n ${given[--gpus-per-node]:-} ]]; then
    counts+=("$(count_gpus "gpu:${given[--gpus-per-node]//,/,gpu:}")")
  fi
  if [[ -n ${given[--gpus]:-} ]]; then
    gpus=$(count_gpus "gpu:${given[--gpus]//,/,gpu:}")
    counts+=($((gpus / nodes)))
    if ((gpus % nodes > 0)); then unknown="$nodes nodes do not share $gpus GPUs evenly"; fi
  fi
  per_node=${counts[0]:-${given[--ntasks-per-node]:-1}}
  if ((${#counts[@]} > 1)); then
    unknown="GPUs are asked for in two ways, counting options, SBATCH_* and the script's #SBATCH lines"
  elif [[ -n ${given[--gpus-per-task]:-}${given[--gpus-per-socket]:-} ]]; then
    unknown="--gpus-per-task and --gpus-per-socket do not say how many a node has"
  elif ((${#counts[@]} == 0)) && [[ -z ${given[--ntasks-per-node]:-} ]]; then
    if [[ -n ${given[--ntasks]:-} ]]; then
      unknown="--ntasks does not say how many there are on each node: give --ntasks-per-node"
    elif [[ -v given[--exclusive] ]]; then
      unknown="--exclusive gives all GPUs of a node, whose number is not known here: add --gres=gpu:N"
    fi
  fi
}

asked=()
while read -ra words; do asked+=("${words[@]}"); done < <(sed -n 's/^#SBATCH //p' "$1")
for name in ARRAY_INX EXCLUSIVE GPUS GPUS_PER_NODE GPUS_PER_TASK GRES; do
  variable=SBATCH_$name option=--${name//_/-}
  if [[ -n ${!variable:-} ]]; then asked+=("${option,,}=${!variable}"); fi
done
read_options "${asked[@]}" "${options[@]}"

[[ -z ${given[--array]:-}${given[--array-inx]:-} ]] ||
  fail "job arrays are not supported: submit one job for each run."
nodes=${given[--nodes]:-1} per_node='' unknown=''
if [[ $nodes =~ ^[1-9][0-9]*$ ]]; then
  count_processes
elif [[ $nodes =~ ^[1-9][0-9]*-[1-9][0-9]*$ ]]; then
  unknown="--nodes is the range $nodes"
else
  fail "--nodes is '$nodes': use a whole number from 1 up."
fi
if ((${#SRUN_FLAGS[@]} > 0)); then
  unknown="Python is in a container that srun starts"
fi
if [[ -n $unknown ]]; then
  echo "not checked here: $unknown. The job will check."
else
  [[ $per_node =~ ^[1-9][0-9]*$ ]] ||
    fail "the processes of a node are '$per_node': use a whole number from 1 up."
  CHECK_WORLD_SIZE=$((nodes * per_node)) bash "$@"
  echo "checked for nodes x processes = $nodes x $per_node"
fi
if [[ -n $dry_run ]]; then
  for variable in "${!SBATCH_@}"; do printf '%s=%q ' "$variable" "${!variable}"; done
  printf '%q ' sbatch "${options[@]}" "$@"
  echo
  exit
fi
exec sbatch "${options[@]}" "$@"
