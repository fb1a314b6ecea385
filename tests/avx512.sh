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
. tests/own_kernels.sh
own_kernels "$python" "$copy" -DPGL_OPS_EMULATED_AVX512=ON
cd "$copy/package"
"$python" -c 'import pgl_ops; info = pgl_ops.build_info(); assert info["cpu_instruction_set"] == "avx512, emulated", info'
"$python" -m pytest tests/ops -q -p no:cacheprovider -k "not host_cuda and not cuda" "$@"
