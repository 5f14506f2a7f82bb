# Runs commands one after the other and says how long each took. Sourced by demo.sh and distill.sh after setup.sh.
steps=()
SECONDS=0

# step TITLE COMMAND...: runs it, and keeps how long it took.
step() {
    local title="$1" began=$SECONDS
    shift
    say "[$((${#steps[@]} + 1))] $title: ${*/#.venv\/bin\/}"
    "$@"
    steps+=("$(printf '%-28s %5d s' "$title" "$((SECONDS - began))")")
}

# finish: how long all of them took.
finish() {
    say "done in $SECONDS s"
    printf '  %s\n' "${steps[@]}"
}
