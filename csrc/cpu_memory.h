// Large results in huge pages: the first touch of a fresh page costs as much as writing it several times.
#pragma once

#include <cstdint>

#include "tensors.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pgl_ops {

// Asks for huge pages where a tensor about to be written has room for some. A hint: where the system has none
// to give, nothing changes.
inline Tensor in_huge_pages(Tensor tensor) {
#ifdef __linux__
  constexpr uintptr_t page = 4096, least = uintptr_t{1} << 22;
  const auto element = static_cast<uintptr_t>(tensor.element_size());
  const uintptr_t bytes = static_cast<uintptr_t>(tensor.numel()) * element;
  if (bytes >= least) {
    const auto from = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t begin = (from + page - 1) / page * page, end = (from + bytes) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

}  // namespace pgl_ops
