#!/usr/bin/env bash
# Submits a script of this folder with the cluster's settings, after checking what it asks for:
#
#   launch/submit.sh [SBATCH OPTIONS] launch/pretrain_dtop_p.sh [RECIPE] [FLAGS ...]
#
# As sbatch, but partition, account and the like come from cluster.env, and mistakes are found here.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
load_settings

options=()
while (($# > 0)) && [[ $1 != *.sh ]]; do
  options+=("$1")
  shift
done
[[ -f ${1:-} ]] || fail "name a script to submit: launch/submit.sh --nodes 2 launch/pretrain_dtop_p.sh"

nodes=1 per_node=${SBATCH_GPUS_PER_NODE:-1}
for ((i = 0; i < ${#options[@]}; i++)); do
  value=${options[i]#*=}
  if [[ $value == "${options[i]}" ]]; then value=${options[i + 1]:-}; fi
  case ${options[i]} in
    -N | --nodes | --nodes=*) nodes=$value ;;
    -N*) nodes=${options[i]#-N} ;;
    --gpus-per-node | --gpus-per-node=*) per_node=$value ;;
    --ntasks-per-node | --ntasks-per-node=*)
      if [[ -z ${SBATCH_GPUS_PER_NODE:-} ]]; then per_node=$value; fi
      ;;
  esac
done
per_node=${per_node##*:} # a800:8
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes is '$nodes': use a whole number from 1 up."
[[ $per_node =~ ^[1-9][0-9]*$ ]] || fail "--gpus-per-node is '$per_node': use a whole number from 1 up."

if ((${#SRUN_FLAGS[@]} > 0)); then
  echo "not checked here, because Python is in a container that srun starts: the job will check"
else
  CHECK_WORLD_SIZE=$((nodes * per_node)) bash "$@"
  echo "checked for $nodes nodes of $per_node processes"
fi
exec sbatch "${options[@]}" "$@"
