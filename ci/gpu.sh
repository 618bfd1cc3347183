#!/usr/bin/env bash
# Everything that needs a GPU, in one command: ci/gpu.sh [--budget SECONDS] [--out FOLDER] [--rehearse]
#
#   PYTHON   interpreter whose packages are used as they are; without it a virtual environment is made in .venv
#   WHEELS   folder of wheels for what PYTHON lacks (this project's own included), where there is no network
#
# Nothing is installed into PYTHON's own environment: this project, and what it lacks, go to a folder of their own.
# What is run, in which order, and what is written: tools/gpu_job.py, to which the arguments go.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv .venv && .venv/bin/pip install --quiet ".[triton]" || exit 1
    PYTHON=.venv/bin/python
fi

SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
SOURCE=(${WHEELS:+--no-index --find-links "$WHEELS"})
MISSING=$("$PYTHON" - <<'CODE'
from importlib.util import find_spec

packages = {"click": "click", "numpy": "numpy", "packaging": "packaging", "pytest": "pytest", "xdist": "pytest-xdist",
            "execnet": "execnet", "safetensors": "safetensors", "syrupy": "syrupy", "torch": "torch",
            "transformers": "transformers", "triton": "triton"}
print(*(package for module, package in packages.items() if find_spec(module) is None))
CODE
) || exit 1
if [ -n "$MISSING" ]; then
    # One word a package. Without one of them some steps cannot run, which they say: the others can.
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install --quiet --no-deps "${SOURCE[@]}" --target "$SITE" $MISSING \
        || echo "not installed, all or in part: $MISSING" >&2
fi
PROJECT=$(find "${WHEELS:-/nonexistent}" -maxdepth 1 -name 'moe_conformance-*.whl' 2>/dev/null | sort | tail -n 1)
# setuptools would copy what an earlier build left there into the wheel.
rm -rf build
ISOLATION=(${WHEELS:+--no-build-isolation})
"$PYTHON" -m pip install --quiet --no-deps --upgrade "${ISOLATION[@]}" --target "$SITE" "${PROJECT:-.}" || exit 1
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1

# In the background, so that a signal to this shell reaches it: it ends its step, and writes what there is.
"$PYTHON" tools/gpu_job.py "$@" &
JOB=$!
trap 'kill -TERM "$JOB" 2>/dev/null' TERM INT HUP
wait "$JOB"
CODE=$?
while kill -0 "$JOB" 2>/dev/null; do
    wait "$JOB"
    CODE=$?
done
exit "$CODE"
