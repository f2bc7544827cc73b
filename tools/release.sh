#!/usr/bin/env bash
# The checklist of a release: checks what can be checked, builds the sdist and the wheel, and tries them in a bare venv.
#
#   bash tools/release.sh [--skip-tests]
#
#   --skip-tests   do not run tests/run.sh --full
#
# It tags and uploads nothing: the commands for that are printed at the end. Needs Linux, a clean checkout and the registry
# from which pip installs. Writes dist/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup_env.sh

tests=1
for argument in "$@"; do
    case $argument in
    --skip-tests) tests=0 ;;
    -h | --help)
        sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p;}' tools/release.sh
        exit 0
        ;;
    *) die "unknown option $argument; the only one is --skip-tests" ;;
    esac
done

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' bigdssm/__init__.py)
[ -n "$version" ] || die "bigdssm/__init__.py has no __version__"
[ -z "$(git status --porcelain)" ] || die "the checkout has changes; commit them, so that the tag names what is released"
[ -z "$(git tag --list "v$version")" ] || die "the tag v$version exists; raise __version__ in bigdssm/__init__.py"
grep -q "^## $version, [0-9-]*$" CHANGELOG.md || die "CHANGELOG.md has no line '## $version, YYYY-MM-DD'"

setup_env test
say "the generated files are current"
python -m bigdssm.commands config --schema | diff - configs/config.schema.json >&2 || die "configs/config.schema.json is old"
PYTHONPATH=. python tools/site/config_keys.py >/dev/null
git diff --exit-code --stat docs/config_keys.md >&2 || die "docs/config_keys.md was old; commit it"
python tools/checks/mutations.py --find
[ $tests = 0 ] || bash tests/run.sh --full

say "the sdist, and the wheel that is built from it"
rm -rf dist
bare=$(mktemp -d)
trap 'rm -rf "$bare"' EXIT
python -m venv "$bare/build"
"$bare/build/bin/pip" install --quiet build twine
"$bare/build/bin/python" -m build --outdir dist . >/dev/null
"$bare/build/bin/twine" check --strict dist/*

say "the wheel in a bare venv"
python -m venv "$bare/venv"
"$bare/venv/bin/pip" install --quiet dist/*.whl
cd "$bare"
"$bare/venv/bin/bigdssm" --help >/dev/null
"$bare/venv/bin/python" -c "import bigdssm; assert bigdssm.__version__ == '$version'; bigdssm.fps_loss"
cd - >/dev/null
ls -l dist

say "not checked here, some hours: python tools/checks/pages.py --steps 8 README.md \$(find docs -name '*.md')"
say "to release: git tag v$version && git push origin v$version && twine upload dist/*"
