#!/usr/bin/env bash
# Makes a virtual environment with this checkout installed in it, or leaves it alone when nothing changed:
#
#     scripts/environment.sh VENV CONSTRAINTS EXTRAS PYTHON-VERSION...
#
# The first usable interpreter of the given versions is taken, or $PYTHON when it is set. What the environment was made
# from is noted in VENV/made-from; a later call with the same pyproject.toml, constraints and extras does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 constraints=$2 extras=$3
shift 3

made_from="$(cat pyproject.toml "$constraints" | cksum) $extras"
stamp=$venv/made-from
# A checkout that was moved or copied brings an environment that still points to the old place.
is_ours() { grep -qF "$PWD/$venv" "$venv/bin/activate" 2>/dev/null && "$venv/bin/python" -c 'import pip' 2>/dev/null; }

if is_ours; then
    case "$(cat "$stamp" 2>/dev/null)" in
    "$made_from" | "$made_from",*) exit 0 ;; # the latter has further extras
    esac
fi

usable() { # INTERPRETER VERSION: does it run, is it that version, can it make environments?
    "$1" -c 'import sys, venv, ensurepip; sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1])' "$2" 2>/dev/null
}

find_python() { # VERSION...: the first usable interpreter, also among those of pyenv and uv
    local version python
    for version in "$@"; do
        for python in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python \
            "$(uv python find --no-project "$version" 2>/dev/null)" python3 python; do
            if [ -n "$python" ] && usable "$python" "$version"; then
                echo "$python"
                return
            fi
        done
    done
    return 1
}

if ! is_ours; then
    if [ -n "${PYTHON:-}" ]; then
        python=$PYTHON
    elif ! python=$(find_python "$@"); then
        {
            echo "$venv needs Python ${*// /, } with the venv module, and none was found on PATH, in pyenv or in uv."
            echo "Install one, for example with 'pyenv install $1', 'uv python install $1' or"
            echo "'apt install python$1 python$1-venv', or name an interpreter: make PYTHON=/path/to/python$1 ..."
        } >&2
        exit 1
    fi
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

rm -f "$stamp"
echo "Installing into $venv ($("$venv/bin/python" --version)) what $constraints pins; this takes a few minutes, once." >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" -e ".[$extras]"
echo "$made_from" >"$stamp"
