# Sourced by main.sh and test.sh: makes .venv from constraints.txt, once for each state of the two files that define it.
# PYTHON chooses the interpreter, 3.11 or newer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted=$(cat pyproject.toml ci/constraints.txt | sha256sum)
if [ "$(cat .venv/made-from 2>/dev/null)" != "$wanted" ]; then
    "${PYTHON:-$(command -v python3.11 || echo python3)}" -m venv .venv
    # torch first: the pinned build satisfies every range that follows, so nothing pulls another one.
    .venv/bin/python -m pip install --quiet -c ci/constraints.txt torch
    .venv/bin/python -m pip install --quiet -c ci/constraints.txt -e '.[dev]'
    echo "$wanted" > .venv/made-from
fi
export PATH="$PWD/.venv/bin:$PATH"
