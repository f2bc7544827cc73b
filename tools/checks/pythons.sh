#!/usr/bin/env bash
# Run both commands of the README with each Python: the quickstart and the quick tests, with what pip installs today.
#
#   bash tools/checks/pythons.sh [--newest] [--quickstart] [--install-within S] [--into FOLDER] [VERSION ...]
#
#   VERSION ...          such as 3.12 (default: the versions in pyproject.toml's classifiers)
#   --newest             only the newest of them that is found
#   --quickstart         without the tests
#   --install-within S   skip a Python whose packages are not installed after S seconds (default 1800)
#   --into FOLDER        copies of the tree with their environments (default: bigdssm-pythons in $TMPDIR or /tmp)
#
# Interpreters are looked for on PATH and among pyenv's. A later call updates the copies and their environments. Exits
# with 1 if a command fails. A Python that is not found or not installed in time is reported and does not fail.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. launch/setup_env.sh

newest=0 tests=1 install_s=1800 into=${TMPDIR:-/tmp}/bigdssm-pythons
versions=()
while [ $# -gt 0 ]; do
    case $1 in
    --newest) newest=1 ;;
    --quickstart) tests=0 ;;
    --install-within | --into)
        [ $# -ge 2 ] || die "$1 needs a value"
        if [ "$1" = --into ]; then into=$2; else install_s=$2; fi
        shift
        ;;
    -h | --help)
        sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p;}' tools/checks/pythons.sh
        exit 0
        ;;
    3.*) versions+=("$1") ;;
    *) die "unknown option $1; see bash tools/checks/pythons.sh --help" ;;
    esac
    shift
done
case $install_s in '' | 0* | *[!0-9]*) die "--install-within $install_s: needs a number of seconds from 1 up" ;; esac
[ ${#versions[@]} -gt 0 ] ||
    mapfile -t versions < <(sed -n 's/.*Programming Language :: Python :: \(3\.[0-9]*\)".*/\1/p' pyproject.toml | sort -V)

# Prints the interpreter of a version, or nothing.
interpreter() {
    local path
    for path in "$(command -v "python$1" || true)" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python3; do
        if [ -x "$path" ] && [ -z "$(python_problem "$path")" ]; then
            echo "$path"
            return
        fi
    done
}

summary=()
failed=0
report() { # version, what, status, seconds
    summary+=("$(printf '%-6s %-12s %-24s %5d s' "$@")")
}

attempt() { # version, what, command ...
    local version=$1 what=$2 start=$SECONDS status=ok
    shift 2
    say "Python $version: $what"
    "$@" || status=FAILED
    [ $status = ok ] || failed=1
    report "$version" "$what" "$status" $((SECONDS - start))
}

root=$PWD
export BIGDSSM_SHARED=${BIGDSSM_SHARED:-$root/../shared}
unset PYTHONPATH VIRTUAL_ENV
extras=base
[ $tests = 0 ] || extras="test"
options=()
[ ! -e datasets/source/ml-100k ] || options=(--movielens "$root/datasets/source/ml-100k")
for ((number = ${#versions[@]} - 1; number >= 0; number--)); do
    version=${versions[number]}
    python=$(interpreter "$version")
    if [ -z "$python" ]; then
        report "$version" interpreter "not found" 0
        continue
    fi
    copy=$into/$version
    mkdir -p "$copy"
    git ls-files -z --cached --others --exclude-standard | tar --null -T - -c --ignore-failed-read | tar -x -C "$copy"
    cd "$copy"
    export BIGDSSM_PYTHON=$python
    say "Python $version: the environment in $copy"
    start=$SECONDS
    status=0
    timeout "$install_s" bash -c ". launch/setup_env.sh; setup_env $extras" || status=$?
    if [ $status = 0 ]; then
        report "$version" environment ok $((SECONDS - start))
        attempt "$version" quickstart bash launch/quickstart.sh ${options[@]+"${options[@]}"}
        [ $tests = 0 ] || attempt "$version" tests bash tests/run.sh
    elif [ $status = 124 ]; then
        report "$version" environment "not within $install_s s" $((SECONDS - start))
    else
        failed=1
        report "$version" environment FAILED $((SECONDS - start))
    fi
    cd "$root"
    [ $newest = 0 ] || break
done

say "summary"
printf '%s\n' "${summary[@]}"
exit $failed
