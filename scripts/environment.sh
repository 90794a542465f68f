# Sourced by the other scripts: finds a Python, makes a virtual environment, installs into it.

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 python; do
    if [ -n "$candidate" ] && command -v "$candidate" > /dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.11 or newer is needed; set PYTHON to it." >&2
  return 1
}

# make_environment FOLDER "WHAT TO INSTALL"; does nothing where it is up to date.
make_environment() {
  local folder=$1 what=$2 python wanted
  python=$(find_python)
  wanted="$what $(cat pyproject.toml)"
  if [ -x "$folder/bin/python" ] && [ "$(cat "$folder/installed" 2> /dev/null)" = "$wanted" ]; then
    return
  fi
  echo "Setting up $folder (a few minutes the first time) ..." >&2
  rm -rf "$folder"
  "$python" -m venv "$folder"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
  # shellcheck disable=SC2086 - the words of $what are separate arguments
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check $what
  printf '%s' "$wanted" > "$folder/installed"
}
