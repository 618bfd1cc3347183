#!/usr/bin/env bash
# The sdist and the wheel of a release, in dist/, as twine wants them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install --quiet -r ci/release.txt
# From a copy: setuptools leaves folders beside what it builds.
git archive HEAD | tar -x -C "$work" --one-top-level=source
rm -rf dist
"$work/tools/bin/python" -m build --outdir dist "$work/source"
"$work/tools/bin/twine" check --strict dist/*
