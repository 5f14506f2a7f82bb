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
step "DD2: where it begins" "$tokar" train diffusion experiment=diffusion_digits "${place[@]}"
step "DD2: train the generator" "$tokar" train dd2 experiment=dd2_digits "${place[@]}"
step "DD2: alignment" "$tokar" train dd2 experiment=dd2_digits name=dd2_aligned "align=$runs/dd2_digits" generator_rests=100 \
    optim.lr=2e-4 fake_optim.lr=5e-4 loop.duration=3000 "${place[@]}"
step "compare" "$tokar" distill compare "$runs/digits_llamagen" "student=$runs/dd1_digits" "dd2=$runs/dd2_aligned" \
    "features.path=$runs/digits_classifier" "${place[@]}"
step "report" "$tokar" report "$runs"/{digits_llamagen,dd1_digits,diffusion_digits,dd2_digits,dd2_aligned} --out "$out/distillation.html"

finish
say "look at $out/distillation.html"
