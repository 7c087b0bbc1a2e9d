#!/usr/bin/env bash
# Tests what needs an environment of its own, as it does not go together with the rest:
#   tests/environments/run.sh beam|ray|xpk|sky [FOLDER]
# The environment is made in FOLDER, by default a temporary one, and used again if it is there.
set -euo pipefail
name=${1:?beam, ray, xpk or sky}
folder=${2:-$(mktemp -d)}
cd "$(dirname "$0")/../.."
bin=$(realpath -m "$folder")/bin

install() {
  if [ ! -x "$bin/python" ]; then
    python3 -m venv "$folder"
    "$bin/pip" install -q "$@"
  fi
}

case $name in
  beam | ray)
    # Not under requirements/constraints.txt: Beam needs an older protobuf than that has.
    install -e ".[data,$name]" beartype hypothesis nbmake psutil pytest pytest-timeout pytest-xdist
    exec "$bin/python" -m pytest -n 0 -q "tests/data_tests/test_prepare_$name.py"
    ;;
  xpk) install xpk==1.16.0 pytest pytest-timeout && tests=tests/launch_tests/test_xpk.py ;;
  sky) install skypilot==0.14.1 pytest pytest-timeout && tests=tests/launch_tests/test_skypilot.py ;;
  *) sed -n '2,4p' "$0" >&2 && exit 2 ;;
esac
# Launchers come without l32jax, and without what the other tests are set up with.
PATH=$bin:$PATH exec "$bin/python" -m pytest --noconftest -o addopts= -q "$tests"
