#!/usr/bin/env bash
# The exports read by nnU-Net's own functions, in an environment of its own.
#
#   tests/nnunet.sh FOLDER [pytest arguments]
#
# FOLDER holds the environment: it is made at the first call (torch as in constraints.txt, the newest nnunetv2)
# and used again at the next. PYTHON chooses the interpreter it is made with. Nothing of it is installed
# elsewhere, and this project is not installed into it: the tests import it from here.
set -euo pipefail
folder=$(realpath -m "${1:?usage: tests/nnunet.sh FOLDER [pytest arguments]}")
shift
cd "$(dirname "$0")/.."
if [ ! -f "$folder/.ready" ]; then
  "${PYTHON:-python3}" -m venv "$folder"
  # torch first: CPU or CUDA build as the index gives it, and nnunetv2 then keeps it.
  "$folder/bin/python" -m pip install -q -c constraints.txt torch torchvision
  "$folder/bin/python" -m pip install -q -c constraints.txt nnunetv2 pytest pytest-timeout
  "$folder/bin/python" -m pip check
  touch "$folder/.ready"
fi
"$folder/bin/python" - <<'PY'
from importlib.metadata import version
for name in ("nnunetv2", "dynamic_network_architectures", "torch"):
    print(name, version(name))
PY
exec "$folder/bin/python" -m pytest tests/nnunet -p no:cacheprovider "$@"
