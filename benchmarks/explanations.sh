#!/usr/bin/env bash
# The README's figures on explanations, from nothing: an SAE and a lens at three depths of
# Gemma 3 270M, then one evaluation of all of them. Every fourth text of the demo's corpus is held
# out of everything. usage: benchmarks/explanations.sh [FOLDER]  (default: explanations/)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${1:-explanations}
fastsae() { "$PYTHON" -P -m fastsae.cli "$@"; }
mkdir -p "$OUT"
for part in 'NR % 4 != 0 fit' 'NR % 4 == 0 held-out'; do
    gzip -dc fastsae/demo/corpus.jsonl.gz | awk "${part% *}" | gzip -n > "$OUT/${part##* }.jsonl.gz"
done
for layer in 4 9 14; do
    fastsae train --layer $layer --text "$OUT/fit.jsonl.gz" --output "$OUT/sae-$layer" \
        --d-sae 4096 --k 32 --epochs 5 --batch-tokens 2048 --lr 1.5e-3 --ctx-len 128 --no-pack \
        --dtype bfloat16
    fastsae train-lens --layer $layer --text "$OUT/fit.jsonl.gz" --tokens 100000 \
        --output "$OUT/lens-$layer.safetensors"
done
fastsae eval explanations "$OUT"/sae-{4,9,14} --lens "$OUT"/lens-{4,9,14}.safetensors \
    --text "$OUT/fit.jsonl.gz" --held-out-text "$OUT/held-out.jsonl.gz" \
    --ngrams 5 --output benchmarks/results/explanations.json --plot docs/explanations.svg \
    --markdown "$OUT/explanations.md"
