#!/usr/bin/env bash
# Build one of the two supported environments in .venv-k2 or .venv-modern, beside this repository's Makefile.
#
#     scripts/setup.sh k2|modern          (or: make setup ENV=k2|modern)
#     PYTHON=/path/to/python3.11 scripts/setup.sh k2
#
# Needs no root. Every version is locked in requirements/, and every file by its hash, except torch's in `modern`, which differs from
# machine to machine (with CUDA or without). Running it again repairs what is there.
set -eu -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

env=${1:-k2}
venv=.venv-$env

say() { echo "setup ($env): $*"; }
fail() {
    echo "error: $1" >&2
    exit 1
}
# `-qq` keeps pip's errors and drops its progress and warnings.
pip() { "$venv/bin/python" -m pip "$@" -qq --disable-pip-version-check --no-input; }

case $env in
    k2) # newer pip refuses the name of k2's wheel
        wanted="3.11" pip_version=23.3.2
        pip_hash=5052d7889c1f9d05224cd41741acb7c5d6fa735ab34e339624a614eaaa7e7d76
        ;;
    modern)
        wanted="3.11 or newer" pip_version=26.3
        pip_hash=f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13
        ;;
    *) fail "ENV=$env is no environment; use ENV=k2 or ENV=modern" ;;
esac

# 1. The interpreter: PYTHON if given, else the first of the usual names that fits.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
fits() {
    case $env:$(version_of "$1" || true) in
        k2:3.11 | modern:3.1[1-9]) return 0 ;;
        *) return 1 ;;
    esac
}
python=
for candidate in ${PYTHON:-python3.11 python3 python}; do
    if fits "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    found=
    for candidate in ${PYTHON:-python3.11 python3 python}; do
        found="$found, $candidate is $(version_of "$candidate" || echo absent)"
    done
    hint="install it or name one: make setup ENV=$env PYTHON=/path/to/python3.11"
    [ "$env" = modern ] || hint="$hint; or use newer Python and no k2: make setup ENV=modern"
    fail "the environment '$env' needs Python $wanted (${found#, }); $hint"
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments; install its venv module (Debian: python$(version_of "$python")-venv) or set PYTHON to another"

# 2. The virtual environment; one left by another Python is made anew.
version=$(version_of "$python")
say "Python $version, from $(command -v "$python")"
if [ "$(version_of "$venv/bin/python" || true)" != "$version" ]; then
    say "creating $venv"
    "$python" -m venv --clear "$venv"
fi
rm -f "$venv/.stamp"
pip install --no-deps --require-hashes -r <(echo "pip==$pip_version --hash=sha256:$pip_hash")

# 3. The locked packages.
say "installing the files of requirements/$env.hashes.txt (a first run downloads up to a few GB, nearly all of it torch)"
# Python compiles what is used, at its first use: setup takes 40 s less, the first command 8 s more.
pip install --no-compile --no-deps --require-hashes -r "requirements/$env.hashes.txt"
if [ "$env" = modern ]; then
    pip install "$(grep '^torch==' requirements/modern.txt)" # and the CUDA packages of a CUDA build
fi
if [ "$env" = k2 ]; then
    say "installing k2 by hash, requirements/k2-wheel.txt"
    pip install --no-deps --require-hashes -r requirements/k2-wheel.txt
fi

# 4. asrkit itself, as it lies here.
say "installing asrkit from this directory"
pip install --no-deps --no-build-isolation --editable .
"$venv/bin/python" -m pip check >"$venv/pip-check.txt" || fail "the installed packages do not fit together: $(head -n 3 "$venv/pip-check.txt")"

touch "$venv/.stamp"
say "ready: $venv/bin/asrkit ('$venv/bin/asrkit doctor' shows what it can use)"
