#!/usr/bin/env bash
# The main job: sets up what it needs and judges every engine found. Arguments go to `moe-conformance run`.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec moe-conformance run --out results --known ci/known_transformers.toml "$@"
