#!/usr/bin/env bash
# The documentation as pages that need no network, in site/. A broken link or anchor, or any other warning, is an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source ci/setup.sh
rm -rf site
sphinx-build --fresh-env --fail-on-warning --keep-going --nitpicky --quiet -c docs . site
echo "site/index.html"
