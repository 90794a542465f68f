#!/usr/bin/env bash
# Renews the lock: the newest versions of all dependencies in pyproject.toml, for every system and
# Python. Then checks that there are wheels for each of them.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

PYTHONS="3.11 3.12 3.13 3.14"
PLATFORMS="x86_64-manylinux_2_28 aarch64-manylinux_2_28 aarch64-apple-darwin x86_64-pc-windows-msvc"
export MACOSX_DEPLOYMENT_TARGET=14.0 # the oldest macOS that torch has wheels for

make_environment .venv-lock "" uv

# asked EXPRESSION: prints its items; `project` is pyproject.toml.
asked() {
  .venv-lock/bin/python -c "
import tomllib
project = tomllib.load(open('pyproject.toml', 'rb'))
print(*$1, sep='\n')"
}

# compile GROUPS ARGUMENT...: locks the package, its extras, these groups, and what installs it.
compile() {
  local group groups=()
  for group in $1; do groups+=(--group "$group"); done
  shift
  { echo "pip>=25.3"; asked "project['build-system']['requires']"; } |
    .venv-lock/bin/uv pip compile --quiet pyproject.toml - --all-extras "${groups[@]}" "$@"
}

all=$(asked "project['dependency-groups']")
compile "$all" --universal --python-version "${PYTHONS%% *}" --upgrade \
  --annotation-style line --custom-compile-command ./scripts/lock.sh --output-file "$LOCK"

for platform in $PLATFORMS; do
  for python in $PYTHONS; do
    # The fuzzer is for Linux only.
    compile "${all//fuzz/}" --constraint "$LOCK" --only-binary :all: \
      --python-platform "$platform" --python-version "$python" > /dev/null
    echo "$LOCK installs on $platform, Python $python."
  done
done
