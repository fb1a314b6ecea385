#!/usr/bin/env bash
# The built library under another torch, without a rebuild (it uses torch's stable ABI only).
#
#   tests/other_torch.sh OTHER_PYTHON [pytest arguments]
#
# OTHER_PYTHON is of the same Python version, with another torch (2.10 or newer, CPU or CUDA build), numpy,
# pytest, pytest-timeout and hypothesis. Run `make install` first. The op tests then run there on the very
# files that were built here: the CPU kernels, and the CUDA sources compiled for the host. BUILDER (default:
# .venv/bin/python) is the Python that they were built with.
set -euo pipefail
other=${1:?usage: tests/other_torch.sh OTHER_PYTHON [pytest arguments]}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
own=$(realpath -s "${BUILDER:-$root/.venv/bin/python}")
host_cuda=$(cd "$root" && "$own" -c "
import torch
from tests.ops import host_cuda
print(host_cuda.build(host_cuda.ROOT / 'build' / f'host_cuda-torch{torch.__version__}'))")
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$root/pgl_ops" "$root/tests" "$root/pyproject.toml" "$copy"
mkdir -p "$copy/tests"
echo "built with: $(cd "$root" && "$own" -c "import torch, pgl_ops; print(\"torch\", torch.__version__, pgl_ops.build_info()[\"cuda\"])")"
cd "$copy"
export PGL_OPS_HOST_CUDA_LIBRARY=$host_cuda
"$other" -m pgl_ops
# The stream function is weak, as CPU-only torch lacks it; where torch has CUDA it must be found.
"$other" - <<'PY'
import ctypes, glob, torch, pgl_ops
library = ctypes.CDLL(glob.glob("pgl_ops/libpgl_ops.so")[0])
found = hasattr(library, "aoti_torch_get_current_cuda_stream")
print("torch built for CUDA:", torch.version.cuda, "| its stream function is found:", found)
assert found == (torch.version.cuda is not None)
PY
"$other" -m pytest tests/ops -p no:cacheprovider -q "$@"
