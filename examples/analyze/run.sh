#!/usr/bin/env bash
# From the quickstart's checkpoint to a page that shows where its experts go.
#
#   RUN      folder of the run             (runs/quickstart)
#   TOKENS   read of each kind of text     (100000)
#
# Further arguments are passed on to dynmoe analyze.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# shellcheck source=examples/common.sh
source examples/common.sh
RUN=${RUN:-runs/quickstart}
TOKENS=${TOKENS:-100000}
if [ ! -d "$RUN/checkpoints" ]; then
  echo "$RUN/checkpoints does not exist: run 'make quickstart' first, or name a run by RUN" >&2
  exit 1
fi

show dynmoe analyze --model "$RUN/checkpoints" \
  --data examples/data/{book,code,dictionary,reference}.jsonl.gz --tokens "$TOKENS" \
  --output "$RUN/report" --overwrite "$@"
