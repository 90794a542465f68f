# Sourced by the other scripts: finds a Python, makes a virtual environment, installs into it.

LOCK=constraints.txt

# Prints the Python to use: $PYTHON if it is set, else the first one that is new enough.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
    if command -v "$candidate" > /dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.11 or newer is needed${PYTHON:+, and \"$PYTHON\" is not}; set PYTHON to one." >&2
  return 1
}

# make_environment FOLDER LOCK WHAT...
# Installs WHAT (arguments of pip) in the versions of LOCK, or in the newest ones if LOCK is "".
# Does nothing if the same was installed before; without a lock, if that was on the same day.
make_environment() {
  local folder=$1 lock=$2 python wanted
  shift 2
  python=$(find_python)
  wanted="$("$python" -VV), $PWD, $*, $(cat pyproject.toml "${lock:-/dev/null}")"
  [ -n "$lock" ] || wanted="$(date +%F), $wanted"
  if [ -x "$folder/bin/python" ] && [ "$(cat "$folder/installed" 2> /dev/null)" = "$wanted" ]; then
    return
  fi
  echo "Setting up $folder (a few minutes the first time) ..." >&2
  rm -f "$folder/installed" # first, so that a partial environment never counts
  rm -rf "$folder"
  "$python" -m venv "$folder"
  install_into "$folder" --upgrade ${lock:+--constraint "$lock"} pip
  install_into "$folder" ${lock:+--constraint "$lock" --build-constraint "$lock"} "$@"
  printf '%s' "$wanted" > "$folder/installed"
}

install_into() {
  local folder=$1
  shift
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}
