#!/usr/bin/env bash
# Tests what needs an environment of its own, as it does not go together with the rest: beam | ray.
#   tests/environments/run.sh beam [FOLDER]
# The environment is made in FOLDER, by default a temporary one, and used again if it is there.
set -euo pipefail
name=${1:?beam or ray}
folder=${2:-$(mktemp -d)}
cd "$(dirname "$0")/../.."
if [ ! -x "$folder/bin/python" ]; then
  python3 -m venv "$folder"
  # Not under requirements/constraints.txt: Beam needs an older protobuf than that has.
  "$folder/bin/pip" install -q -e ".[data,$name]" \
    beartype hypothesis nbmake psutil pytest pytest-timeout pytest-xdist
fi
exec "$folder/bin/python" -m pytest -n 0 -q "tests/data_tests/test_prepare_$name.py"
