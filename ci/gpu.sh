#!/usr/bin/env bash
# Everything that needs a GPU, in one command: ci/gpu.sh
#
#   OUT      results folder (default results/gpu)
#   PYTHON   interpreter whose packages are used as they are; without it a virtual environment is made in .venv
#   WHEELS   folder of wheels for what PYTHON lacks (this project's own included), where there is no network
#   ENGINES  engines to judge (default "reference triton transformers")
#
# Nothing is installed into PYTHON's own environment: this project, and what it lacks, go to a folder of their own.
# Exits 1 if any step fails; each step's output is in OUT.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=$(mkdir -p "${OUT:-results/gpu}" && cd "${OUT:-results/gpu}" && pwd)
ENGINES=${ENGINES:-reference triton transformers}
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
    # One word a package.
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install --quiet --no-deps "${SOURCE[@]}" --target "$SITE" $MISSING || exit 1
fi
PROJECT=$(find "${WHEELS:-/nonexistent}" -maxdepth 1 -name 'moe_conformance-*.whl' 2>/dev/null | sort | tail -n 1)
# setuptools would copy what an earlier build left there into the wheel.
rm -rf build
ISOLATION=(${WHEELS:+--no-build-isolation})
"$PYTHON" -m pip install --quiet --no-deps --upgrade "${ISOLATION[@]}" --target "$SITE" "${PROJECT:-.}" || exit 1
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 TRITON_DEFAULT_FP_FUSION=1
export NO_COLOR=1

STATUS=0
step() {
    local name=$1 began=$SECONDS
    shift
    if "$@" >"$OUT/$name.txt" 2>&1; then local verdict=ok; else local verdict="failed ($?)"; fi
    [ "$verdict" = ok ] || STATUS=1
    echo "$name: $verdict, $((SECONDS - began)) s" | tee -a "$OUT/steps.txt"
    [ "$verdict" = ok ] || tail -n 40 "$OUT/$name.txt"
}

: >"$OUT/steps.txt"
CHOSEN=()
for engine in $ENGINES; do CHOSEN+=(--engine "$engine"); done
step device "$PYTHON" -c 'import torch, triton, transformers, platform
assert torch.cuda.is_available(), "torch sees no GPU"
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__,
      "transformers", transformers.__version__)'
step kernels "$PYTHON" -m pytest -q tests/test_gpu.py tests/kernel_twins --junitxml "$OUT/kernels.xml"
step interpreted env TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= "$PYTHON" -m pytest -q tests/test_kernels.py \
    tests/kernel_twins --junitxml "$OUT/interpreted.xml"
step conformance "$PYTHON" -m moe_conformance.cli run --tier gpu "${CHOSEN[@]}" --known ci/known_transformers.toml \
    --out "$OUT/conformance"
step benchmarks "$PYTHON" benchmarks/kernels.py --quick --out "$OUT/benchmarks"
step aot "$PYTHON" tools/aot.py
if command -v compute-sanitizer >/dev/null; then
    # Each tensor in an allocation of its own, so that an access beside it is seen.
    step sanitizer env PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 600 \
        compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m pytest -q -n 0 tests/kernel_twins
else
    echo "sanitizer: not run, compute-sanitizer is not on the PATH" | tee -a "$OUT/steps.txt"
fi
exit "$STATUS"
