#!/usr/bin/env bash
# The tests: sets up what they need and runs them. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m pytest -n auto "$@"
