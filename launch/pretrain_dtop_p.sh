#!/usr/bin/env bash
#SBATCH --nodes=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# Pre-trains any recipe of launch/recipes; the name under which it is called chooses the default:
#
#   sbatch [SBATCH OPTIONS] launch/pretrain_dtop_p.sh  [RECIPE] [FLAGS ...]     # dtop_p_16e
#   sbatch [SBATCH OPTIONS] launch/pretrain_dynamic.sh [RECIPE] [FLAGS ...]     # moe_dynamic_p04
#   sbatch [SBATCH OPTIONS] launch/pretrain_topk.sh    [RECIPE] [FLAGS ...]     # moe_top2
#   sbatch [SBATCH OPTIONS] launch/pretrain_dense.sh   [RECIPE] [FLAGS ...]     # dense_374m
#
# The others are links to this script, and Slurm calls a job after the name; see launch/README.md.
set -euo pipefail
script=$0 launch=$(dirname "$0")
if [[ -n ${SLURM_JOB_ID:-} && ! -f $launch/common.sh ]]; then # Slurm runs a copy of this script
  command=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=||p')
  script=${command%%.sh *} # the arguments follow, which may hold anything
  script=${script%%$'\n'*}
  launch=$(cd "$SLURM_SUBMIT_DIR" && cd "$(dirname "$script")" && pwd)
fi
# shellcheck source=common.sh
source "$launch/common.sh"
case $(basename "$script" .sh) in
  pretrain_dynamic) default=moe_dynamic_p04 ;;
  pretrain_topk) default=moe_top2 ;;
  pretrain_dense) default=dense_374m ;;
  *) default=dtop_p_16e ;;
esac
run_job "$default" "$@"
