#!/usr/bin/env bash
# From text to a trained model on this machine: tokenizer, data, pre-training, report.
#
#   RUN      folder of the run             (runs/quickstart)
#   STEPS    training steps                (300)
#   NPROC    processes: 1, 2, 4 or 8       (2, or 1 on a single core)
#   ROUTING  flags of the routing          (DTop-p at a target of 2 experts per token)
#
# Further arguments are passed on to the training command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RUN=${RUN:-runs/quickstart}
STEPS=${STEPS:-300}
NPROC=${NPROC:-$(($(env -u OMP_NUM_THREADS nproc) > 1 ? 2 : 1))}
ROUTING=${ROUTING:---moe-dynamic-routing dtop_p --moe-dynamic-target-experts-per-token 2 \
--moe-dynamic-balance-loss-coeff 1e-2}
KINDS=(book code reference dictionary)
# shellcheck source=common.sh
source examples/common.sh

if [ -e "$RUN" ]; then
  kept="$RUN-$(date -r "$RUN" +%Y%m%d-%H%M%S)"
  mv "$RUN" "$kept"
  echo "the earlier run is kept as $kept"
fi
mkdir -p "$RUN/data"

say "1/4  a tokenizer of 4096 pieces from examples/data"
show dynmoe tokenizer --input "examples/data/*.jsonl.gz" --vocab-size 4096 \
  --output "$RUN/data/tokenizer"

say "2/4  text to token files"
data=()
for kind in "${KINDS[@]}"; do # one data set a kind, so that validation holds out a part of each
  show dynmoe preprocess --input "examples/data/$kind.jsonl.gz" --append-eod \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$RUN/data/tokenizer.model" \
    --output-prefix "$RUN/data/$kind"
  data+=("$RUN/data/${kind}_text_document")
done

say "3/4  pre-training: 6 layers of 16 experts, $STEPS steps on $NPROC processes"
# shellcheck disable=SC2206 # the routing's flags are words
command=(
  torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node "$NPROC" -m megatron_dynmoe.pretrain
  --run-dir "$RUN" --data-cache-path "$RUN/data/cache"
  --num-layers 6 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4
  --num-experts 16 --expert-model-parallel-size "$NPROC" --moe-token-dispatcher-type alltoall
  $ROUTING
  --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope
  --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
  --tokenizer-type SentencePieceTokenizer --tokenizer-model "$RUN/data/tokenizer.model"
  --data-path "${data[@]}" --split "95,5,0" --seq-length 256 --max-position-embeddings 256
  --micro-batch-size $((NPROC > 2 ? 8 / NPROC : 4)) --global-batch-size 8 --train-iters "$STEPS"
  --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters $((STEPS / 10))
  --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
  --log-interval $((STEPS >= 10 ? 10 : 1)) --eval-interval $((STEPS > 2 ? STEPS / 3 : 1)) --eval-iters 8
  --save-interval $((STEPS > 2 ? STEPS / 3 : 1))
  "$@"
)
train_and_show "${command[@]}"

say "4/4  what came out: $RUN/summary.json"
cat "$RUN/summary.json"
say "next"
cat <<NEXT
  see the curves          $RUN/curves.png
  more of them            .venv/bin/tensorboard --logdir $RUN/tensorboard
  text from the model     RUN=$RUN bash examples/export_and_generate/run.sh
  where the experts go    RUN=$RUN bash examples/analyze/run.sh
  the baseline, top-2     RUN=runs/top2 ROUTING="--moe-router-topk 2 --moe-aux-loss-coeff 2e-2 --moe-router-load-balancing-type seq_aux_loss" make quickstart
  a fixed threshold       RUN=runs/top_p ROUTING="--moe-dynamic-routing top_p --moe-dynamic-threshold 0.2" make quickstart
  train on                the command in $RUN/command.txt with
                          --load $RUN/checkpoints --train-iters $((STEPS * 2)) --override-opt-param-scheduler
NEXT
