// Chooses, once, the instruction set whose kernels this processor runs.
#include <cstdlib>
#include <cstring>

#include "cpu_kernels.h"

#ifdef PGL_OPS_X86_KERNELS
#include <cpuid.h>
#endif

namespace pgl_ops {
namespace {

enum class InstructionSet { baseline, avx2, avx512 };

InstructionSet detect() {
#ifdef PGL_OPS_X86_KERNELS
  __builtin_cpu_init();
  // Lets tests run the kernels that this processor would not choose.
  const char* most = std::getenv("PGL_OPS_CPU_INSTRUCTIONS");
  if (most != nullptr && std::strcmp(most, "baseline") == 0) return InstructionSet::baseline;
  const bool may_avx512 = most == nullptr || std::strcmp(most, "avx2") != 0;
  // f16c by hand: older compilers do not know its name.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c;
#ifdef PGL_OPS_EMULATED_AVX512
  const bool has_avx512 = has_avx2;
#else
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
#endif
  if (may_avx512 && has_avx512) return InstructionSet::avx512;
  if (has_avx2) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

InstructionSet chosen() {
  static const InstructionSet set = detect();
  return set;
}

}  // namespace

template <typename T>
const CpuKernels<T>& cpu_kernels() {
#ifdef PGL_OPS_X86_KERNELS
  if (chosen() == InstructionSet::avx512) return avx512::kernels<T>();
  if (chosen() == InstructionSet::avx2) return avx2::kernels<T>();
#endif
  return baseline::kernels<T>();
}

template const CpuKernels<double>& cpu_kernels();
template const CpuKernels<float>& cpu_kernels();
template const CpuKernels<Half>& cpu_kernels();
template const CpuKernels<BFloat16>& cpu_kernels();
template const CpuKernels<uint8_t>& cpu_kernels();
template const CpuKernels<int16_t>& cpu_kernels();

const char* cpu_instruction_set() {
  switch (chosen()) {
    case InstructionSet::avx512:
#ifdef PGL_OPS_EMULATED_AVX512
      return "avx512, emulated";
#else
      return "avx512";
#endif
    case InstructionSet::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace pgl_ops
