# Makes or reuses the Python environment in .venv. Sourced from the repository root by demo.sh and test.sh.
# TOKAR_PYTHON=/path/to/python3.12 chooses the interpreter.

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"
    elif sudo -n true 2>/dev/null; then sudo "$@"
    else return 1; fi
}

apt_install() {
    command -v apt-get >/dev/null || return 1
    as_root apt-get update -qq >/dev/null && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${TOKAR_PYTHON:+"$TOKAR_PYTHON"} python3 python3.13 python3.12 python3.11 python3.14; do
        if is_recent "$candidate"; then command -v "$candidate"; return; fi
    done
    die "no Python >= 3.11 found; install one, or name it with TOKAR_PYTHON=..."
}

# A copied or moved environment still runs, but its scripts call the old place.
is_usable() {
    is_recent .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1 && grep -qsF "$PWD/.venv/" .venv/bin/pip
}

make_venv() {
    local python version
    if is_usable; then return; fi
    python="$(find_python)"
    if [ -e .venv ]; then say "replacing .venv: it is broken, or was made in another folder"; rm -rf .venv; fi
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        say "installing python$version-venv"
        apt_install "python$version-venv" || apt_install python3-venv || die "$python cannot make environments; as root: apt-get install python$version-venv"
    fi
    say "making .venv with Python $version"
    "$python" -m venv "$PWD/.venv" || die "could not make .venv with $python"
}

# PyPI's torch for Linux brings gigabytes of CUDA; without a GPU the CPU build is enough.
# "2.13.0+cpu" satisfies "==2.13.0" and is preferred to it where an index offers both.
install_torch() {
    local pin index=https://download.pytorch.org/whl/cpu extra=()
    pin="$(grep '^torch==' constraints.txt)"
    if ! nvidia-smi -L >/dev/null 2>&1 && reachable "$index/torch/"; then extra=(--extra-index-url "$index"); fi
    .venv/bin/python -m pip install -q --disable-pip-version-check ${extra[@]+"${extra[@]}"} "$pin"
}

reachable() { .venv/bin/python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=10)' "$1" 2>/dev/null; }

setup() {
    local stamp
    make_venv
    stamp="$(cat setup.cfg pyproject.toml constraints.txt scripts/setup.sh | sha256sum)"
    if [ "$(cat .venv/tokar-installed 2>/dev/null)" = "$stamp" ]; then return; fi
    say "installing tokar into .venv"
    install_torch || die "torch could not be installed; see above"
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]' || die "the packages could not be installed; see above"
    printf '%s\n' "$stamp" >.venv/tokar-installed
}
