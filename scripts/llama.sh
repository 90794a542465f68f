#!/usr/bin/env bash
# Fetches the llama.cpp that tests/gguf/test_llama.py runs: 10.8 MB, into .llama-client/.
# npm is needed to fetch it; Node is not needed to run it.
set -euo pipefail
cd "$(dirname "$0")/.."
package=@node-llama-cpp/linux-x64 version=3.22.1 folder=.llama-client
sha512=e6e0820cda9608d7da026f1a47f533c5ba381c1a4a80d17dd640873dea4a86032057638099ab6879f6ce94c8a1b2a0a21f639ddf913f7941d00856df44126e3a

# Says why there is no llama.cpp, and exits.
none() {
  echo "llama.sh: $1; the tests that need llama.cpp are skipped" >&2
  exit 1
}

[ "$(uname -sm)" = "Linux x86_64" ] || none "the package is for Linux x86_64"
if [ ! -e "$folder/$version" ]; then
  command -v npm > /dev/null || none "npm is not installed"
  mkdir -p "$folder"
  rm -rf "$folder"/*
  # Without a network npm would try for more than a minute.
  archive=$(cd "$folder" && npm pack --silent --fetch-retries=1 --fetch-retry-mintimeout=1000 \
    --fetch-timeout=60000 "$package@$version" | tail -n 1) || none "npm could not fetch $package"
  echo "$sha512  $folder/$archive" | sha512sum --check --status || none "$archive has another checksum"
  tar -xzf "$folder/$archive" -C "$folder"
  rm "$folder/$archive"
  touch "$folder/$version"
fi
echo "$folder/package/bins/linux-x64"
