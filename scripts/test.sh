#!/usr/bin/env bash
# Runs the tests, after making the environment: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
make_venv
browser=""
if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && ! command -v google-chrome >/dev/null; then
    say "installing chromium"
    apt_install chromium &  # beside pip, which uses one core and the network
    browser=$!
fi
setup
[ -z "$browser" ] || wait "$browser" || say "no chromium: the test that opens the report in a browser is skipped"

# One thread for each worker: more only wait for one another. nproc would take that number for the number of cores.
workers="$(env -u OMP_NUM_THREADS nproc)"
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE  # many processes start, and each would compile the package anew
# In the order of the folders: the long files of integration first, so that the small ones of unit fill the end on all workers.
exec .venv/bin/python -m pytest -n "$workers" --dist=loadfile --no-loadscope-reorder "$@"
