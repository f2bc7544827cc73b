#!/usr/bin/env bash
# Lint, types and tests. Makes .venv if it is missing.
#
#   bash tests/run.sh            everything that takes seconds (about 9 minutes on 2 cores)
#   bash tests/run.sh --full     the slow tests too (about 45 minutes); needs Java 17 and pgvector
#
# Real data for some tests is looked for in $BIGDSSM_SHARED, then in ../shared; without it they are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # compiled once: every worker, rank and command of the tests imports 2,000 modules
. launch/setup_env.sh

full=0
for argument in "$@"; do
    case $argument in
    --full) full=1 ;;
    -h | --help)
        sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p;}' tests/run.sh
        exit 0
        ;;
    *) die "unknown option $argument; the only one is --full" ;;
    esac
done

extras="test"
if [ $full = 1 ]; then
    extras="test,spark,docs" # 500 MB
    export BIGDSSM_FULL=1
fi
setup_env "$extras"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

summary=()
failed=0
section() {
    local name=$1 start=$SECONDS status=ok
    shift
    say "$name: $*"
    "$@" || status=FAILED
    [ "$status" = ok ] || failed=1
    summary+=("$(printf '%-14s %-6s %4d s' "$name" "$status" $((SECONDS - start)))")
}

selection="not slow"
timeout_s=300
if [ $full = 1 ]; then
    selection="slow or not slow"
    timeout_s=900
fi

section lint ruff check bigdssm launch tools tests
section format ruff format --check bigdssm launch tools tests
mypy & # uses one core: beside the first tests
mypy=$!
tests() { # name, selection, pytest's further arguments
    local name=$1 selected=$2
    shift 2
    section "$name" pytest -q -rfEs --timeout "$timeout_s" --durations 5 -m "($selection) and $selected" "$@"
}
# One call, so that workers start, import and wait for the last test once.
tests tests "not alone" -n auto --dist worksteal tests
section types wait "$mypy"
tests "tests, alone" alone tests/e2e

say "summary"
printf '%s\n' "${summary[@]}" "$(printf '%-14s %-6s %4d s' total "" $SECONDS)"
exit $failed
