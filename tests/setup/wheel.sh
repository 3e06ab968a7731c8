#!/usr/bin/env bash
# Builds sdist and wheel, installs the wheel into an empty environment, and walks the quickstart's way
# in small with nothing but the command `dynmoe`, outside of the checkout. Some 7 GB for a few minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
checkout=$PWD
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

say() { echo "-- $*"; }

say "build"
git archive HEAD | tar -x -C "$(mkdir -p "$folder/source" && echo "$folder/source")" # what is committed
"$checkout/.venv/bin/python" -m build --outdir "$folder/dist" "$folder/source" >"$folder/build.log" 2>&1 ||
    { tail -20 "$folder/build.log" && exit 1; }
ls "$folder/dist"

say "install into an empty environment"
"$checkout/.venv/bin/python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --constraint constraints.txt "$folder"/dist/*.whl >"$folder/pip.log" 2>&1 ||
    { tail -5 "$folder/pip.log" && exit 1; }

mkdir -p "$folder/elsewhere/mine"
cd "$folder/elsewhere"
export PATH="$folder/venv/bin:$PATH" OMP_NUM_THREADS=1
unset PYTHONPATH
cp "$checkout/examples/data/book.jsonl.gz" .
python -c "import megatron_dynmoe; assert megatron_dynmoe.__file__.startswith('$folder/venv')"

say "tokenizer, data"
dynmoe tokenizer --input book.jsonl.gz --vocab-size 600 --output mine/tokenizer
dynmoe preprocess --input book.jsonl.gz --output-prefix mine/book --append-eod \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model mine/tokenizer.model
say "a recipe, and training"
dynmoe recipe >recipes.txt && grep -q '^smoke ' recipes.txt
dynmoe recipe --output smoke.flags smoke
sed -i "/--mock-data/d; /--tokenizer-type/d; /--vocab-size/d" smoke.flags # real text instead
dynmoe recipe --write-launch-scripts launch >/dev/null && test -x launch/local.sh
dynmoe plan dtop_p_16e --gpus 16 --gpu h100-80g --tokens 1e9 >plan.txt || test $? -eq 1
dynmoe train @smoke.flags --run-dir runs/mine --train-iters 4 --save-interval 4 \
    --data-path mine/book_text_document --split 90,10,0 --eval-iters 1 \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model mine/tokenizer.model >log.txt 2>errors.txt ||
    { tail -5 errors.txt && exit 1; }
dynmoe report runs/mine >report.json
dynmoe plot runs/mine --output runs.png
say "the model at work"
dynmoe convert to-hf --load runs/mine/checkpoints --output my-model --quiet
dynmoe generate --model my-model --prompt "It is a truth" --max-new-tokens 8
dynmoe calibrate --model my-model --data book.jsonl.gz --target 2 --tokens 2000 --output calibrated
dynmoe doctor --checkpoint runs/mine/checkpoints
dynmoe evaluate --help >/dev/null # lm-eval itself is an extra
dynmoe analyze --model my-model --data book.jsonl.gz --tokens 2000 --output my-report >/dev/null
say "misuse is answered in one line, with exit code 2"
status=0
dynmoe convert to-hf --laod x --output y 2>misuse.txt || status=$?
[[ $status == 2 && $(wc -l <misuse.txt) == 1 ]] && cat misuse.txt
say "the wheel works"
