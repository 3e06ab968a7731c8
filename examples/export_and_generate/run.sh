#!/usr/bin/env bash
# From the quickstart's checkpoint to text: export, look at the threshold, generate.
#
#   RUN      folder of the run             (runs/quickstart)
#   PROMPT   what the text begins with
#
# Further arguments are passed on to the generation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# shellcheck source=examples/common.sh
source examples/common.sh
RUN=${RUN:-runs/quickstart}
PROMPT=${PROMPT:-It is a truth universally acknowledged, that}
if [ ! -d "$RUN/checkpoints" ]; then
  echo "$RUN/checkpoints does not exist: run 'make quickstart' first, or name a run by RUN" >&2
  exit 1
fi

say "1/3  the checkpoint as a Hugging Face folder"
show dynmoe convert to-hf --load "$RUN/checkpoints" \
  --output "$RUN/huggingface" --overwrite

say "2/3  which threshold gives how many experts, and what it costs"
show dynmoe calibrate --model "$RUN/huggingface" \
  --data examples/data/book.jsonl.gz --target 2 --tokens 8192

say "3/3  text, with the experts that each token used"
show dynmoe generate --model "$RUN/huggingface" --prompt "$PROMPT" \
  --max-new-tokens 60 --temperature 0.8 "$@"
