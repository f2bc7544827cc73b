# Sourced by launch/quickstart.sh and tests/run.sh: creates or updates .venv and adds it to PATH.
# shellcheck shell=bash
#
#   setup_env base    the package and its dependencies
#   setup_env test    also the [test] extra, or several: test,spark
#
# BIGDSSM_PYTHON=/path/to/python   interpreter for .venv (default: the first suitable one on PATH)
# BIGDSSM_MIN_FREE_GB=N            required free disk space before .venv is created (default 4)

say() { printf '\033[1m== %s\033[0m\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Prints the problem of the interpreter $1 as a phrase, or nothing if it is suitable.
python_problem() {
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || {
        echo "does not run"
        return
    }
    if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "is Python $version"
    elif ! "$1" -c 'import venv, ensurepip' 2>/dev/null; then
        echo "is Python $version without the venv module"
    fi
}

# Sets PYTHON to an interpreter that can create .venv.
find_python() {
    local name path problem seen="" no_venv=""
    if [ -n "${BIGDSSM_PYTHON:-}" ]; then
        problem=$(python_problem "$BIGDSSM_PYTHON")
        [ -z "$problem" ] || die "BIGDSSM_PYTHON=$BIGDSSM_PYTHON $problem; Python 3.10 or newer with its venv module is needed"
        PYTHON=$BIGDSSM_PYTHON
        return
    fi
    for name in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do
        path=$(command -v "$name" 2>/dev/null) || continue
        problem=$(python_problem "$path")
        if [ -z "$problem" ]; then
            PYTHON=$path
            return
        fi
        seen="$seen${seen:+, }$path $problem"
        case $problem in *venv*) no_venv=1 ;; esac
    done
    [ -n "$seen" ] || die "no python3 on PATH; install Python 3.10 or newer, or name one with BIGDSSM_PYTHON=/path/to/python"
    if [ -n "$no_venv" ]; then
        die "$seen; install the venv module (Debian, Ubuntu: apt install python3-venv) or name another Python with BIGDSSM_PYTHON=/path/to/python"
    fi
    die "Python 3.10 or newer is needed, but $seen; install one, or set BIGDSSM_PYTHON=/path/to/python"
}

# Identifies a valid .venv: package metadata, interpreter and path (a moved .venv does not work).
env_fingerprint() {
    "$1" -c 'import hashlib, pathlib, sys
print(hashlib.sha256(pathlib.Path("pyproject.toml").read_bytes() + repr((sys.version, sys.argv[1])).encode()).hexdigest())' "$PWD"
}

# Prints the path for which the environment $1 was made.
env_path() {
    sed -n 's/.*VIRTUAL_ENV=//p' "$1/bin/activate" 2>/dev/null | tr -d "\"'"
}

setup_env() {
    local kind=$1 target="." free_kb need_gb=${BIGDSSM_MIN_FREE_GB:-4} venv=.venv log=.venv/pip.log quiet=() stamp
    [ "$kind" = base ] || target=".[$kind]"

    if [ -x "$venv/bin/python" ] && stamp=$(env_fingerprint "$venv/bin/python" 2>/dev/null); then
        if [ "$(cat "$venv/.bigdssm-$kind" 2>/dev/null)" = "$stamp" ]; then
            say "environment: .venv is up to date"
            activate
            return
        fi
    fi

    find_python
    free_kb=$(df -Pk . | awk 'NR == 2 {print $4}')
    if [ ! -e "$venv/.bigdssm-base" ] && [ "$free_kb" -lt $((need_gb * 1024 * 1024)) ]; then
        die "$PWD has $((free_kb / 1024)) MB of free disk and .venv needs about $need_gb GB; free some, or clone to a larger disk"
    fi

    # An environment that works here is updated in place; one that these scripts have made and that was moved, or does
    # not run, is made again.
    if ! env_path "$venv" | grep -qxF "$(pwd -P)/$venv" || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        mkdir -p "$venv" 2>/dev/null || die "cannot make $PWD/.venv; clone the repository into a folder that you can write to"
        if [ -L "$venv" ] || { [ -n "$(ls -A "$venv")" ] && [ ! -e "$venv/.bigdssm-base" ]; }; then
            die "$PWD/.venv is a link, was moved or has no pip, and is not from this script; remove it"
        fi
        say "environment: making .venv with $PYTHON ($("$PYTHON" --version 2>&1))"
        "$PYTHON" -m venv --clear "$venv" >"${TMPDIR:-/tmp}/bigdssm-venv.$$" 2>&1 || {
            tail -n 3 "${TMPDIR:-/tmp}/bigdssm-venv.$$" >&2
            rm -f "${TMPDIR:-/tmp}/bigdssm-venv.$$"
            die "$PYTHON could not make .venv (its last lines are above); name another Python with BIGDSSM_PYTHON=/path/to/python"
        }
        rm -f "${TMPDIR:-/tmp}/bigdssm-venv.$$"
    fi

    say "environment: installing $target and what it needs into .venv (some minutes; log: $log)"
    rm -f "$venv/.bigdssm-base" "$venv/.bigdssm-test" "$log"
    [ -t 1 ] || quiet=(--quiet --progress-bar off)
    "$venv/bin/python" -m pip install --disable-pip-version-check --retries 2 ${quiet[@]+"${quiet[@]}"} --log "$log" \
        --editable "$target" || pip_failed "$log"

    stamp=$(env_fingerprint "$venv/bin/python")
    echo "$stamp" >"$venv/.bigdssm-base"
    [ "$kind" = base ] || echo "$stamp" >"$venv/.bigdssm-$kind"
    activate
}

pip_failed() {
    local log=$PWD/$1
    if grep -qi 'no space left' "$log" 2>/dev/null; then
        die "the disk filled up while pip installed packages (pip's log: $log); free some space and start again"
    elif grep -qiE 'connection|resolve|timed out|unreachable|proxy|no matching distribution' "$log" 2>/dev/null; then
        die "pip could not get a package from its registry (pip's log: $log); check the network and pip's configuration, then start again"
    fi
    die "pip could not install the packages (pip's log: $log)"
}

activate() {
    VIRTUAL_ENV=$PWD/.venv
    PATH=$VIRTUAL_ENV/bin:$PATH
    export VIRTUAL_ENV PATH
    unset PYTHONHOME
}
