#!/usr/bin/env bash
# From images to samples and a report on this machine: bash scripts/demo.sh [folder for the results]
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup

out="${1:-demo}"
place=("paths.datasets=$out/datasets" "paths.runs=$out/runs")
tokar=.venv/bin/tokar
source scripts/steps.sh

runs="$out/runs"
step "digits to shards" "$tokar" data prepare "${place[@]}"
step "shards intact" "$tokar" data verify "$out/datasets/digits"
step "train the classifier" "$tokar" train classifier experiment=digits_classifier "${place[@]}"
step "train the tokenizer" "$tokar" train tokenizer experiment=digits_vqgan "${place[@]}"
step "images to codes" "$tokar" encode "$runs/digits_vqgan" "out=$out/datasets/digits-codes" "${place[@]}"
step "train the generator" "$tokar" train generator experiment=digits_llamagen "${place[@]}"
step "samples" "$tokar" sample "$runs/digits_llamagen" count=100 save=[grid,npz] scale=3 "${place[@]}"
for run in digits_classifier digits_vqgan digits_llamagen; do
    step "evaluate $run" "$tokar" evaluate "$runs/$run" "features.path=$runs/digits_classifier" "${place[@]}"
done
step "report" "$tokar" report "$runs"/digits_{classifier,vqgan,llamagen} --out "$out/report.html"

finish
say "what came out"
.venv/bin/python scripts/results.py "$runs"
say "look at $out/report.html and $runs/digits_llamagen/samples/samples.png"
