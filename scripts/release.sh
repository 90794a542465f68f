#!/usr/bin/env bash
# Builds sdist and wheel in dist/, checks them, and installs the wheel with pipx, as a user would.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

make_environment .venv-release "$LOCK" --group release
rm -rf dist
.venv-release/bin/python -m build --outdir dist .
.venv-release/bin/python -m twine check --strict dist/*

wheel=$(echo dist/*.whl)

# pipx gets a temporary home, so that nothing changes for the user.
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
export PIPX_HOME="$home" PIPX_BIN_DIR="$home/bin" PIPX_MAN_DIR="$home/man"
.venv-release/bin/python -m pipx install --quiet "$wheel"
"$home/bin/moescale" --version
_MOESCALE_COMPLETE=source_bash "$home/bin/moescale" | grep -q _MOESCALE_COMPLETE
echo "Shell completion: ready."
