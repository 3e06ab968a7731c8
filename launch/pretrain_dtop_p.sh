#!/usr/bin/env bash
#SBATCH --job-name=dtop_p
#SBATCH --nodes=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# Pre-trains DTop-p: a PI controller holds the mean number of experts per token at a target.
#
#   sbatch [SBATCH OPTIONS] launch/pretrain_dtop_p.sh [RECIPE] [FLAGS ...]     # dtop_p_16e
#
# Any recipe of launch/recipes may be named; see launch/README.md.
set -euo pipefail
launch=$(dirname "$0")
if [[ -n ${SLURM_JOB_ID:-} && ! -f $launch/common.sh ]]; then # Slurm runs a copy of this script
  command=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=||p')
  script=${command%%.sh *} # the arguments follow, which may hold anything
  launch=$(cd "$SLURM_SUBMIT_DIR" && cd "$(dirname "${script%%$'\n'*}")" && pwd)
fi
# shellcheck source=common.sh
source "$launch/common.sh"
run_job dtop_p_16e "$@"
