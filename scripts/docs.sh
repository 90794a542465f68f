#!/usr/bin/env bash
# Builds a site from docs/ into site/: ./scripts/docs.sh, or ./scripts/docs.sh serve to look at it.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

make_environment .venv-docs "$LOCK" --group docs
exec .venv-docs/bin/python -m mkdocs "${1:-build}" --strict --config-file scripts/mkdocs.yml
