#!/usr/bin/env bash
# Everything that needs a GPU, in one command: ci/gpu.sh [--wheels FOLDER] [--budget SECONDS] [--out FOLDER] [--rehearse]
#
# With wheels, those of FOLDER or of wheels/, no network is needed: PYTHON (default: python3) is used with the packages
# that it has, and the wheels, which tools/wheels.py makes, go to a folder of their own. Without, a virtual environment
# is made in .venv.
# What is run, in which order, and what is written: tools/gpu_job.py, to which the other arguments go.
set -uo pipefail
WHEELS='' ARGUMENTS=()
while [ $# -gt 0 ]; do
    case "$1" in
        --wheels) WHEELS=$(realpath "${2:-}") || exit 2; shift ;;
        *) ARGUMENTS+=("$1") ;;
    esac
    shift
done
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
if compgen -G "${WHEELS:=wheels}/moe_conformance-*.whl" > /dev/null; then
    SITE=$(mktemp -d)
    trap 'rm -rf "$SITE"' EXIT
    export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
    "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$SITE" "$WHEELS"/*.whl || exit 1
elif [ "$WHEELS" != wheels ]; then
    echo "--wheels: got $WHEELS, want a folder that tools/wheels.py has filled" >&2
    exit 2
else
    "$PYTHON" -m venv .venv && .venv/bin/pip install --quiet ".[triton]" click || exit 1
    PYTHON=.venv/bin/python
fi
export PYTHONSAFEPATH=1

# In the background, so that a signal to this shell reaches it: it ends its step, and writes what there is.
"$PYTHON" tools/gpu_job.py ${ARGUMENTS[@]+"${ARGUMENTS[@]}"} &
JOB=$!
trap 'kill -TERM "$JOB" 2>/dev/null' TERM INT HUP
wait "$JOB"
CODE=$?
while kill -0 "$JOB" 2>/dev/null; do
    wait "$JOB"
    CODE=$?
done
exit "$CODE"
