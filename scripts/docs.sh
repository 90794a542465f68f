#!/usr/bin/env bash
# Builds a site from docs/ in site/. With "serve" it shows the site instead: ./scripts/docs.sh serve
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

make_environment .venv-docs "$LOCK" --group docs
exec .venv-docs/bin/python -m mkdocs "${1:-build}" --strict --config-file scripts/mkdocs.yml
