#!/usr/bin/env bash
# The op tests on kernels compiled with AddressSanitizer and UndefinedBehaviorSanitizer: the CPU kernels, and
# the CUDA sources compiled for the host.
#
#   tests/sanitize.sh PYTHON [pytest arguments]
set -euo pipefail
python=${1:?usage: tests/sanitize.sh PYTHON [pytest arguments]}
shift
cd "$(dirname "$0")/.."
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
copy=build/sanitized
mkdir -p "$copy"
rm -rf "$copy/package" && mkdir -p "$copy/package"
cp -r pgl_ops tests pyproject.toml "$copy/package"
common=(-G Ninja -DPython_EXECUTABLE="$python" -DPGL_OPS_SANITIZE=ON)
cmake -S . -B "$copy/cpu" "${common[@]}" -DPGL_OPS_CUDA=OFF \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DPGL_OPS_OUTPUT="$PWD/$copy/package/pgl_ops" > /dev/null
cmake --build "$copy/cpu" | tail -1
cmake -S . -B "$copy/host_cuda" "${common[@]}" -DPGL_OPS_HOST_CUDA=ON > /dev/null
cmake --build "$copy/host_cuda" | tail -1
export PGL_OPS_HOST_CUDA_LIBRARY=$PWD/$copy/host_cuda/libpgl_ops_host_cuda.so
# Python itself was not built with the sanitizers: they are loaded first. It leaks by design.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
cd "$copy/package"
"$python" -m pytest tests/ops -q -p no:cacheprovider --timeout 1200 -k "not compile and not compiled" "$@"
