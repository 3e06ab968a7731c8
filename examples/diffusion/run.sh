#!/usr/bin/env bash
# Trains a small Diffusion Transformer on labeled images of this machine, and draws samples.
#
#   IMAGES   what to train on               (Debian's Fashion-MNIST; see examples/diffusion/images.py)
#   PATCH    pixels of a patch's side        (4; 2 for digits)
#   RUN      folder of the run               (runs/diffusion)
#   STEPS    training steps                  (1500)
#   NPROC    processes: 1, 2, 4 or 8         (2, or 1 on a single core)
#   SAMPLES  of each class, to be judged     (50)
#   ROUTING  flags of the routing            (DTop-p at a target of 2 experts per token)
#
# Further arguments are passed on to the training command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

IMAGES=${IMAGES:-/usr/share/datasets/fashion-mnist}
PATCH=${PATCH:-$([ "$IMAGES" = digits ] && echo 2 || echo 4)}
RUN=${RUN:-runs/diffusion}
STEPS=${STEPS:-1500}
NPROC=${NPROC:-$(($(env -u OMP_NUM_THREADS nproc) > 1 ? 2 : 1))}
SAMPLES=${SAMPLES:-50}
ROUTING=${ROUTING:---moe-dynamic-routing dtop_p --moe-dynamic-target-experts-per-token 2 \
--moe-dynamic-balance-loss-coeff 1e-2}
# shellcheck source=../common.sh
source examples/common.sh

if [ "$IMAGES" != digits ] && [ ! -e "$IMAGES" ]; then
  cat >&2 <<NONE
error: there are no images at $IMAGES. One of these will do:
  sudo apt-get install dataset-fashion-mnist    70,000 images of clothes, 31 MB, on Debian and Ubuntu
  make diffusion IMAGES=FOLDER                  with a folder of PNG or JPEG files for each class
  make diffusion IMAGES=FILE.npz                with images [N, H, W] or [N, H, W, C] and labels [N]
  make diffusion IMAGES=digits                  the 1,797 small digits of scikit-learn
NONE
  exit 2
fi
if [ -e "$RUN" ]; then
  kept="$RUN-$(date -r "$RUN" +%Y%m%d-%H%M%S)"
  mv "$RUN" "$kept"
  echo "the earlier run is kept as $kept"
fi
mkdir -p "$RUN"

say "training: 4 layers of 16 experts on $IMAGES, $STEPS steps on $NPROC processes"
# shellcheck disable=SC2206 # the routing's flags are words
command=(
  torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node "$NPROC" -m examples.diffusion.train
  --run-dir "$RUN" --images "$IMAGES" --patch-size "$PATCH"
  --num-layers 4 --hidden-size 96 --ffn-hidden-size 96 --num-attention-heads 4 --num-experts 16
  $ROUTING
  --normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
  --micro-batch-size $((64 / NPROC)) --global-batch-size 64 --train-iters "$STEPS"
  --lr 2e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters $((STEPS > 100 ? 20 : 1))
  --adam-beta2 0.99 --weight-decay 0.01 --clip-grad 1.0 --average-decay 0.995 --num-workers 0
  --log-interval $((STEPS >= 10 ? 10 : 1)) --eval-iters 8
  --eval-interval $((STEPS > 3 ? STEPS / 3 : 1)) --save-interval $((STEPS > 3 ? STEPS / 3 : 1))
  "$@"
)
train_and_show "${command[@]}"

say "how good the samples are, and where the experts go"
show python -m examples.diffusion.measure "$RUN" --samples "$SAMPLES"
say "next"
cat <<NEXT
  the samples, a class a row      $RUN/samples/step_$STEPS.png
  experts by layer, time, patch   $RUN/samples/experts_$STEPS.png
  the curves                      $RUN/curves.png
  all of it on one page           $RUN/report.html
  other samples of the model      python -m examples.diffusion.measure $RUN --guidance 3
  what all this is                docs/diffusion.md
NEXT
