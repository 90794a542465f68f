#!/usr/bin/env bash
# Sets up an environment of its own and runs every check and every test.
# Arguments go to pytest: ./scripts/test.sh tests/test_header.py
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

make_environment .venv-test "--group test --group oracle -e ."

if [ "$#" -eq 0 ]; then
  .venv-test/bin/ruff check .
  .venv-test/bin/ruff format --check .
  .venv-test/bin/mypy
  .venv-test/bin/python -m pytest --numprocesses auto --dist worksteal --cov --cov-report term
else
  .venv-test/bin/python -m pytest "$@"
fi
