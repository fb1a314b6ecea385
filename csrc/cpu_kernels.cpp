// The CPU inner loops, compiled once for each instruction set (PGL_OPS_ISA names it; see CMakeLists.txt).
//
// Vectors lie along W in contiguous volumes, along the channels in channels_last_3d ones. No header of torch
// is included, since an inline function shared between instruction sets would run where its instructions do
// not exist.
#include "cpu_kernels.h"

// clang-format off: each uses those before it
#include "cpu_vectors.inl"
#include "cpu_avx512.inl"
#include "cpu_rows.inl"
#include "cpu_contract.inl"
#include "cpu_roi_align.inl"
#include "cpu_cosine.inl"
// clang-format on

namespace pgl_ops {
namespace PGL_OPS_ISA {

template <typename T>
const CpuKernels<T>& kernels() {
  if constexpr (sizeof(Sampled<T>) == sizeof(T)) {
    static constexpr CpuKernels<T> table{kMasked<Accumulate<T>>,
                                         {forward<false, T>, forward<true, T>},
                                         {backward<false, T>, backward<true, T>},
                                         cosine_forward<T>,
                                         cosine_backward<T>,
                                         {aligned_forward<false, T>, aligned_forward<true, T>},
                                         {aligned_backward<false, T>, aligned_backward<true, T>}};
    return table;
  } else {
    static constexpr CpuKernels<T> table{
        kMasked<Accumulate<T>>, {forward<false, T>, forward<true, T>}, {}, nullptr, nullptr, {}, {}};
    return table;
  }
}

template const CpuKernels<double>& kernels();
template const CpuKernels<float>& kernels();
template const CpuKernels<Half>& kernels();
template const CpuKernels<BFloat16>& kernels();
template const CpuKernels<uint8_t>& kernels();
template const CpuKernels<int16_t>& kernels();

}  // namespace PGL_OPS_ISA
}  // namespace pgl_ops
