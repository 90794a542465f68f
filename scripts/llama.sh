#!/usr/bin/env bash
# Fetches the llama.cpp that tests/test_llama.py runs: 10.8 MB, into .llama-client/.
# npm is needed to fetch it; Node is not needed to run it.
set -euo pipefail
cd "$(dirname "$0")/.."
package=@node-llama-cpp/linux-x64 version=3.22.1 folder=.llama-client

if [ "$(uname -sm)" != "Linux x86_64" ]; then
  echo "llama.sh: the package is for Linux x86_64" >&2
  exit 1
fi
mkdir -p "$folder"
if [ ! -e "$folder/$version" ]; then
  rm -rf "$folder/package"
  archive=$(cd "$folder" && npm pack --silent "$package@$version" | tail -n 1)
  tar -xzf "$folder/$archive" -C "$folder"
  rm "$folder/$archive"
  touch "$folder/$version"
fi
echo "$folder/package/bins/linux-x64"
