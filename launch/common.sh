# shellcheck shell=bash
# What the scripts of this folder share; they source it. How to use them: README.md.

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(dirname "$launch")

fail() {
  echo "error: $*" >&2
  exit 2
}

# Shows the comment at the top of the script that was called, and ends.
help() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit
}

# The settings of this cluster, from launch/cluster.env or the file that CLUSTER_ENV names.
load_settings() {
  CONTAINER=() SRUN_FLAGS=() DATA_FLAGS=() EXTRA_FLAGS=()
  LAUNCHER=torchrun DEVICE='' NETWORK_INTERFACE='' MAX_RESTARTS=2 RUNS=$checkout/runs PYTHON='' PARSE_FLAGS=yes
  local settings=${CLUSTER_ENV:-$launch/cluster.env}
  [[ -r $settings && ! -d $settings ]] ||
    fail "there is no $settings: cp $launch/cluster.env.example $settings, and fill it in."
  local status=0
  set +eu # what modules define reads unset variables
  # shellcheck source=/dev/null
  source "$settings" || status=$?
  set -eu
  ((status == 0)) ||
    fail "reading $settings ended with status $status: mend its last command, or end it with true."
  [[ $LAUNCHER == torchrun || $LAUNCHER == srun ]] ||
    fail "LAUNCHER is '$LAUNCHER' in $settings: use torchrun (one task a node) or srun (one a GPU)."
  if [[ -n $DEVICE ]]; then
    [[ -f $launch/devices/$DEVICE.env ]] ||
      fail "DEVICE is '$DEVICE' in $settings: use the name of a file in $launch/devices."
    # shellcheck source=/dev/null
    source "$launch/devices/$DEVICE.env"
  fi
  if [[ -z $PYTHON ]]; then
    PYTHON=python
    if [[ -x $checkout/.venv/bin/python ]]; then PYTHON=$checkout/.venv/bin/python; fi
  fi
  if [[ -n $NETWORK_INTERFACE ]]; then
    [[ $NETWORK_INTERFACE != ^* ]] ||
      fail "NETWORK_INTERFACE is '$NETWORK_INTERFACE' in $settings: name the interface to use. Only" \
        "NCCL leaves interfaces out: export NCCL_SOCKET_IFNAME='$NETWORK_INTERFACE' does it."
    # Only NCCL knows a = in front, for names in full.
    export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=${NETWORK_INTERFACE#=}
  fi
  export PYTHON LAUNCHER PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

# One short command of Python, where the training's Python is.
run_python() {
  if ((${#SRUN_FLAGS[@]} > 0)); then
    srun --nodes 1 --ntasks 1 --overlap "${SRUN_FLAGS[@]}" "${CONTAINER[@]}" "$PYTHON" "$@"
  else
    "${CONTAINER[@]}" "$PYTHON" "$@"
  fi
}

# Sets recipe and flags from [RECIPE] [FLAGS ...], the first argument being the default recipe.
read_arguments() {
  recipe=$1
  shift
  if (($# > 0)) && [[ $1 != --* ]]; then
    recipe=$1
    shift
  fi
  # Later flags win: the cluster's, the launcher's, the user's.
  flags=("${DATA_FLAGS[@]}" "${EXTRA_FLAGS[@]}" --exit-signal-handler
    --run-dir "$RUNS/$(basename "$recipe" .flags)-${SLURM_JOB_ID:-$(date +%Y%m%d-%H%M%S)}" "$@")
}

# Checks and opens the next attempt of the run, on so many processes; sets ATTEMPT and rank_flags.
begin_attempt() {
  local status=0
  ATTEMPT=$(run_python -m megatron_dynmoe attempt begin --world-size "$1" \
    --max-restarts "$MAX_RESTARTS" "$recipe" "${flags[@]}") || status=$?
  if ((status == 3)); then
    echo "the run is finished: nothing to do. Train on with more --train-iters, or name another" \
      "--run-dir."
    exit 0
  fi
  if ((status != 0)); then exit "$status"; fi
  export ATTEMPT
  rank_flags=()
  eval "rank_flags=($(<"$ATTEMPT/flags.txt"))" # the module has quoted them for a shell
  echo "logs of the ranks: $ATTEMPT/rank-*.log"
}

# Waits for the process "ranks", during which traps run; sets status.
wait_for_ranks() {
  status=0
  while kill -0 "$ranks" 2>/dev/null; do
    wait "$ranks" || true # returns at once when a trap has run
  done
  wait "$ranks" || status=$?
}

# The part of a Slurm script, with its default recipe and its arguments.
run_job() {
  [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] ||
    fail "this is a task of a job array, whose signals and requeues would reach its other tasks:" \
      "submit one job for each run."
  load_settings
  read_arguments "$@"
  if [[ -n ${CHECK_WORLD_SIZE:-} ]]; then # by submit.sh, before there is a job
    local parse=(--parse)
    if [[ $PARSE_FLAGS != yes ]]; then parse=(); fi
    run_python -W ignore -m megatron_dynmoe recipe --world-size "$CHECK_WORLD_SIZE" "${parse[@]}" \
      "$recipe" "${flags[@]}" >/dev/null
    exit
  fi
  [[ -n ${SLURMD_NODENAME:-} ]] ||
    fail "this is a batch job: submit it with sbatch $0 or launch/submit.sh $0, or train on this" \
      "machine alone with launch/local.sh."

  stopped='' ranks=''
  trap stop_ranks USR1 TERM
  export NPROC=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}} NODES=$SLURM_JOB_NUM_NODES
  [[ -n ${SLURM_GPUS_ON_NODE:-}${SLURM_NTASKS_PER_NODE:-} || ${SLURM_NTASKS:-1} -le $NODES ]] ||
    fail "--ntasks is $SLURM_NTASKS, which may be spread unevenly: give --ntasks-per-node."
  check_cpus
  # The batch script runs on the first node, as rank 0 does: no name has to be resolved.
  MASTER_ADDR=$(address_of_this_node)
  begin_attempt $((NODES * NPROC))
  local tasks=1
  if [[ $LAUNCHER == srun ]]; then tasks=$NPROC; fi
  # Below the ports that systems hand out; another one for the next job and the next attempt.
  MASTER_PORT=$((12000 + (SLURM_JOB_ID * 10 + ${SLURM_RESTART_COUNT:-0} % 10) % 20000))
  export MASTER_ADDR MASTER_PORT
  status=143
  if [[ -z $stopped ]]; then
    # shellcheck disable=SC2153 # Slurm sets it
    srun --nodes "$NODES" --ntasks $((NODES * tasks)) --ntasks-per-node "$tasks" \
      --cpus-per-task $((SLURM_CPUS_ON_NODE > tasks ? SLURM_CPUS_ON_NODE / tasks : 1)) \
      --kill-on-bad-exit=1 "${SRUN_FLAGS[@]}" "${CONTAINER[@]}" \
      bash "$launch/rank.sh" "${rank_flags[@]}" &
    ranks=$!
    wait_for_ranks
  fi
  local verdict=0
  run_python -m megatron_dynmoe attempt end "$ATTEMPT" --status "$status" \
    ${stopped:+--stopped} || verdict=$?
  if ((verdict == 75)); then requeue; fi
  exit "$verdict"
}

# Asks the ranks to save and exit, again and again, because one that is starting does not hear it.
stop_ranks() {
  if [[ -n $stopped ]]; then return; fi
  stopped=1
  echo "told to stop: asking the ranks to save a checkpoint"
  if [[ -z $ranks ]]; then return; fi
  while kill -0 "$ranks" 2>/dev/null; do
    scancel --signal=TERM "$SLURM_JOB_ID" || true # the steps, not this script
    sleep 10
  done &
}

requeue() {
  trap - USR1 TERM
  local state
  state=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*')
  if [[ $state != JobState=RUNNING ]]; then
    echo "not queued again by this script: the job is canceled, or Slurm queues it itself"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    echo "queued again; the next attempt goes on from the last checkpoint"
    sleep 60 # Slurm ends this script
  else
    echo "Slurm does not queue this job again: submit it with --run-dir $(dirname "$(dirname \
      "$ATTEMPT")") to go on" >&2
  fi
}

# Whether the job's processes have a CPU each; GPUs come without CPUs on many clusters.
check_cpus() {
  if ((SLURM_CPUS_ON_NODE >= NPROC)); then return; fi
  local told="the job has $SLURM_CPUS_ON_NODE CPUs for $NPROC processes a node: add --exclusive or"
  told+=" --cpus-per-task N"
  if [[ $LAUNCHER == srun ]]; then fail "$told."; fi
  echo "warning: $told; they will be slow." >&2
}

# The first IPv4 address of NETWORK_INTERFACE, or of this node.
address_of_this_node() {
  local address interface=${NETWORK_INTERFACE#=}
  if [[ -z $interface ]]; then
    read -r address _ < <(hostname -I) || true
    [[ -n $address ]] || fail "$(hostname) has no address: set NETWORK_INTERFACE."
  else
    command -v ip >/dev/null || fail "NETWORK_INTERFACE needs the program ip (iproute2) on each node."
    interface=${interface%%,*} # of several the first
    address=$(ip -o -4 address show dev "$interface" 2>/dev/null | awk '{print $4; exit}') || true
    [[ -n $address ]] ||
      fail "NETWORK_INTERFACE is '$NETWORK_INTERFACE', but $(hostname) has no $interface with an IPv4" \
        "address: use one of $(ip -o -4 address show | awk '{print $2}' | sort -u | paste -sd ' ')."
  fi
  echo "${address%/*}"
}
