// What every op's native entry needs: argument errors, dtype dispatch, strides, memory formats.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "number.h"

// Of torch 2.13 and later; weak, so that the library loads with earlier ones, too.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace pgl_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Torch shows std::invalid_argument to Python as ValueError.
template <typename... Parts>
void check_argument(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message.precision(12);
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// A tensor's shape and device, put in words only where a message is written: a call makes a dozen checks.
struct ShapeText {
  const Tensor& tensor;
};
struct DeviceText {
  const Tensor& tensor;
};
inline ShapeText shape_text(const Tensor& tensor) { return {tensor}; }
inline DeviceText device_text(const Tensor& tensor) { return {tensor}; }

inline std::ostream& operator<<(std::ostream& out, const ShapeText& shape) {
  out << "Tensor[";
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) out << (i ? ", " : "") << shape.tensor.size(i);
  return out << "]";
}

inline std::ostream& operator<<(std::ostream& out, const DeviceText& device) {
  if (device.tensor.is_cpu()) return out << "cpu";
  return out << (device.tensor.is_cuda() ? "cuda:" : "device ") << device.tensor.get_device_index();
}

inline bool is_float_type(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& like) {
  check_argument(tensor.device() == like.device(), name, " must be on the other arguments' device ",
                 device_text(like), ", got one on ", device_text(tensor));
}

// Calls function(element) with a value of the element type; integers only where `integers` says so.
template <bool integers, typename Function>
void dispatch_dtype(const char* name, ScalarType type, Function function) {
  switch (type) {
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Half:
      return function(Half{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    default:
      break;
  }
  if constexpr (integers) {
    if (type == ScalarType::Byte) return function(uint8_t{});
    if (type == ScalarType::Short) return function(int16_t{});
  }
  check_argument(false, name, " must be float64, float32, float16",
                 integers ? ", bfloat16, uint8 or int16" : " or bfloat16", ", got ", dtype_name(type));
}

// Whether the channels lie innermost, so that results should too. The Python registrations repeat this rule.
inline bool is_channels_last(const Tensor& tensor) {
  return tensor.size(1) > 1 && tensor.stride(1) == 1 && tensor.stride(4) != 1;
}

// New memory like `like`'s. Where there is none, the error has torch's own words, if this torch tells them:
// the stable ABI's error says no more than where in its headers it was noticed.
inline Tensor empty_tensor(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like,
                           torch::headeronly::MemoryFormat format) {
  try {
    return torch::stable::empty(sizes, type, std::nullopt, like.device(), std::nullopt, format);
  } catch (const std::runtime_error&) {
    std::ostringstream message;
    message << "pgl_ops: no memory for a result of " << dtype_name(type) << "[";
    for (size_t i = 0; i < sizes.size(); ++i) message << (i ? ", " : "") << sizes[i];
    message << "] on " << device_text(like);
    if (torch_exception_get_what_without_backtrace)
      message << ": " << torch_exception_get_what_without_backtrace();
    throw std::runtime_error(message.str());
  }
}

inline Tensor empty_volume(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like,
                           bool channels_last) {
  return empty_tensor(sizes, type, like,
                      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast3d
                                    : torch::headeronly::MemoryFormat::Contiguous);
}

inline Tensor empty_flat(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  return empty_tensor(sizes, type, like, torch::headeronly::MemoryFormat::Contiguous);
}

}  // namespace pgl_ops
