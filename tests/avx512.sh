#!/usr/bin/env bash
# The op tests on the AVX-512 kernels, emulated in plain loops, for processors that have none.
#
#   tests/avx512.sh PYTHON [pytest arguments]
set -euo pipefail
python=${1:?usage: tests/avx512.sh PYTHON [pytest arguments]}
shift
cd "$(dirname "$0")/.."
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
export PATH="$(dirname "$python"):$PATH"
copy=build/emulated_avx512
rm -rf "$copy/package" && mkdir -p "$copy/package"
cp -r pgl_ops tests pyproject.toml "$copy/package"
rm -f "$copy"/package/pgl_ops/*.so  # else they would pass for what is built here
cmake -S . -B "$copy/cpu" -G Ninja -DPython_EXECUTABLE="$python" -DPGL_OPS_EMULATED_AVX512=ON -DPGL_OPS_CUDA=OFF \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DPGL_OPS_OUTPUT="$PWD/$copy/package/pgl_ops" > /dev/null
cmake --build "$copy/cpu" | tail -1
cd "$copy/package"
"$python" -c 'import pgl_ops; info = pgl_ops.build_info(); assert info["cpu_instruction_set"] == "avx512, emulated", info'
"$python" -m pytest tests/ops -q -p no:cacheprovider -k "not host_cuda and not cuda" "$@"
