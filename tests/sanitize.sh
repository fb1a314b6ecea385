#!/usr/bin/env bash
# The op tests on kernels compiled with AddressSanitizer and UndefinedBehaviorSanitizer: the CPU kernels, and
# the CUDA sources compiled for the host.
#
#   tests/sanitize.sh PYTHON [pytest arguments]
#   tests/sanitize.sh PYTHON --fuzz CASES      the fuzzer instead: so many cases on all sets of kernels together
set -euo pipefail
python=${1:?usage: tests/sanitize.sh PYTHON [pytest arguments]}
shift
cd "$(dirname "$0")/.."
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
copy=build/sanitized
. tests/own_kernels.sh
own_kernels "$python" "$copy" -DPGL_OPS_SANITIZE=ON
nm -D "$copy/package/pgl_ops/libpgl_ops.so" | grep __asan_init > /dev/null
cmake -S . -B "$copy/host_cuda" -G Ninja -DPython_EXECUTABLE="$python" -DPGL_OPS_SANITIZE=ON \
  -DPGL_OPS_HOST_CUDA=ON > /dev/null
cmake --build "$copy/host_cuda" | tail -1
export PGL_OPS_HOST_CUDA_LIBRARY=$PWD/$copy/host_cuda/libpgl_ops_host_cuda.so
# Python itself was not built with the sanitizers: they are loaded first. It leaks by design.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so)"
# Fresh memory is all NaN, so that what is read before it is written shows in a result.
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1
ASAN_OPTIONS+=:max_malloc_fill_size=16777216:malloc_fill_byte=255
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
cd "$copy/package"
if [ "${1:-}" = --fuzz ]; then
  cases=${2:?usage: tests/sanitize.sh PYTHON --fuzz CASES}
  fuzz() { # instruction set, backend, percent of the cases
    PGL_OPS_CPU_INSTRUCTIONS=$1 "$python" -W ignore -m tests.ops.fuzz --backend "$2" --cases $((cases * $3 / 100)) \
      --last "last-$1-$2.txt"
  }
  fuzz best cpu 40
  fuzz avx2 cpu 20
  fuzz baseline cpu 20
  fuzz best host_cuda 20
  exit
fi
# Without the CUDA kernels, also where nvcc is.
"$python" -m pytest tests/ops -q -p no:cacheprovider --timeout 1200 -k "not compile and not compiled" \
  --deselect tests/ops/test_build.py::test_cuda_kernels_are_built_wherever_nvcc_is "$@"
