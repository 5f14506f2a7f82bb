#!/usr/bin/env bash
# The demo's generator distilled to one step, two ways, and all of it compared: bash scripts/distill.sh [folder of the demo]
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup

out="${1:-demo}"
runs="$out/runs"
place=("paths.datasets=$out/datasets" "paths.runs=$runs")
tokar=.venv/bin/tokar
[ -e "$runs/digits_llamagen" ] || die "no generator in $runs; first: bash scripts/demo.sh $out"
source scripts/steps.sh

step "pairs of noise and codes" "$tokar" distill pairs "$runs/digits_llamagen" "out=$out/datasets/digits-pairs" \
    count=100000 batch_size=512 sampling.guidance=2 "${place[@]}"
step "DD1: train the student" "$tokar" train distill experiment=dd1_digits "${place[@]}"
step "DD2: the diffusion model" "$tokar" train diffusion experiment=diffusion_digits "${place[@]}"
step "DD2: where the generator begins" "$tokar" train dd2 experiment=dd2_digits_start "${place[@]}"
step "DD2: train the generator" "$tokar" train dd2 experiment=dd2_digits "${place[@]}"
step "compare" "$tokar" distill compare "$runs/digits_llamagen" "student=$runs/dd1_digits" "dd2=$runs/dd2_digits" \
    "features.path=$runs/digits_classifier" "${place[@]}"
step "report" "$tokar" report "$runs"/{digits_llamagen,dd1_digits,diffusion_digits,dd2_digits_start,dd2_digits} --out "$out/distillation.html"

finish
say "look at $out/distillation.html"
