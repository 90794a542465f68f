#!/usr/bin/env bash
# Sets up an environment and runs every check and every test.
#   --latest    with the newest versions, instead of those of the lock
#   --no-torch  without torch and the tests that need it
#   --fast      in a minute or two: no torch, no Hub, no GGUF, no Dask, no crashes
#   --coverage  with a report of the lines and branches that ran; takes twice as long
# Other arguments go to pytest: ./scripts/test.sh tests/checkpoint/test_header.py
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

FAST="tests/checkpoint tests/factors tests/families tests/routers tests/planning tests/conversion"
FAST="$FAST tests/storage tests/report tests/project --ignore tests/planning/test_growth.py"
FAST="$FAST --ignore tests/conversion/test_crashes.py --ignore tests/conversion/test_dask.py"

folder=.venv-test lock=$LOCK groups="--group test --group oracle" without= cover= only=
while [ "$#" -gt 0 ]; do
  case $1 in
    --latest) folder=.venv-latest lock= ;;
    --no-torch) groups="--group test" without=$1 ;;
    --fast) groups="--group test" without=--no-torch only=$FAST ;;
    --coverage) cover="--cov --cov-report term" ;;
    *) break ;;
  esac
  shift
done
folder=$folder${without#-}

# shellcheck disable=SC2086 - the words of $groups are separate arguments
make_environment "$folder" "$lock" $groups --editable .
if [ -z "$only" ]; then
  scripts/llama.sh > /dev/null || true # says why not; the tests that need it are skipped then
fi

if [ "$#" -eq 0 ]; then
  "$folder/bin/ruff" check .
  "$folder/bin/ruff" format --check .
  [ -n "$without" ] || "$folder/bin/mypy" # reads the types of torch
  # shellcheck disable=SC2086 - likewise
  set -- --numprocesses auto --dist worksteal $cover $only
fi
exec "$folder/bin/python" -m pytest ${without:+"$without"} "$@"
