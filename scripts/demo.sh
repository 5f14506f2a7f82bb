#!/usr/bin/env bash
# From images to samples and a report on this machine: bash scripts/demo.sh [folder for the results]
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup

out="${1:-demo}"
place=("paths.datasets=$out/datasets" "paths.runs=$out/runs")
tokar=.venv/bin/tokar
steps=()
SECONDS=0

# step TITLE COMMAND...: runs it, and keeps how long it took.
step() {
    local title="$1" began=$SECONDS
    shift
    say "[$((${#steps[@]} + 1))] $title: ${*/#$tokar/tokar}"
    "$@"
    steps+=("$(printf '%-28s %5d s' "$title" "$((SECONDS - began))")")
}

step "digits to shards" "$tokar" data prepare "${place[@]}"
step "shards intact" "$tokar" data verify "$out/datasets/digits"
step "classifier" "$tokar" train classifier experiment=digits_classifier "${place[@]}"

say "done in $SECONDS s; everything lies in $out/"
printf '  %s\n' "${steps[@]}"
