#!/usr/bin/env bash
# Installs moescale into an environment of its own, makes a small Mixtral checkpoint and rescales
# it from 2 to 3 experts per token. Needs Python 3.11 or newer; nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

make_environment .venv-demo "$LOCK" . safetensors
exec .venv-demo/bin/python scripts/demo.py "${1:-demo-output}"
