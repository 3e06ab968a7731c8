#!/usr/bin/env bash
# One task of a job: with LAUNCHER=torchrun a node, which starts torchrun; else one rank.
set -euo pipefail

# Nobody dies of SIGTERM, not torchrun either (it would kill its ranks after 30 s): each rank's
# --exit-signal-handler hears it, saves a checkpoint and exits.
trap '' TERM

if [[ $LAUNCHER == torchrun && -z ${RANK:-} ]]; then
  rendezvous=(--standalone --local-addr 127.0.0.1)
  if ((NODES > 1)); then
    rendezvous=(--nnodes "$NODES" --node-rank "$SLURM_NODEID"
      --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
  fi
  exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$NPROC" \
    --signals-to-handle "SIGINT,SIGHUP,SIGQUIT" --no-python bash "${BASH_SOURCE[0]}" "$@" \
    >>"$ATTEMPT/torchrun-$(printf %03d "${SLURM_NODEID:-0}").log" 2>&1
fi

if [[ -z ${RANK:-} ]]; then
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
  export WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_WORLD_SIZE=$NPROC
fi
if [[ -z ${GLOO_SOCKET_IFNAME:-} ]] && ((${NODES:-1} > 1)) && command -v ip >/dev/null; then
  # Gloo would look up this node's name. Instead: where the first node's address is, or leads to.
  GLOO_SOCKET_IFNAME=$(ip -o -4 address show to "$MASTER_ADDR" | awk '{print $2; exit}')
  if [[ -z $GLOO_SOCKET_IFNAME ]]; then
    GLOO_SOCKET_IFNAME=$(ip -o route get "$MASTER_ADDR" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
  fi
  export GLOO_SOCKET_IFNAME
fi
exec "$PYTHON" -m megatron_dynmoe.pretrain "$@" \
  >>"$ATTEMPT/rank-$(printf %03d "$RANK").log" 2>&1
