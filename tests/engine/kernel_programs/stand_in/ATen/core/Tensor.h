// Stands in for torch's tensors, as far as the kernels use them: so they run where there is no torch to link with.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <vector>

#undef TORCH_CHECK
#define TORCH_CHECK(condition, ...) \
  do {                              \
    if (!(condition)) {             \
      std::puts(#condition);        \
      std::abort();                 \
    }                               \
  } while (false)

namespace at {
using namespace c10;

struct TensorOptions {
  ScalarType type = kFloat;
  TensorOptions dtype(ScalarType other) const { return {other}; }
};

struct Sizes : std::vector<int64_t> {
  using std::vector<int64_t>::vector;
  std::vector<int64_t> vec() const { return *this; }
};

class Tensor {
 public:
  Tensor() = default;
  Tensor(Sizes sizes, ScalarType type)
      : sizes_(std::move(sizes)), type_(type), memory_(std::make_shared<std::vector<char>>(numel() * (type == kLong ? 8 : type == kFloat || type == kInt ? 4 : 2))) {}

  int64_t dim() const { return sizes_.size(); }
  int64_t numel() const { return std::accumulate(sizes_.begin(), sizes_.end(), int64_t{1}, std::multiplies<>()); }
  int64_t size(int64_t i) const { return sizes_[i < 0 ? i + dim() : i]; }
  int64_t stride(int64_t i) const {
    return std::accumulate(sizes_.begin() + i + 1, sizes_.end(), int64_t{1}, std::multiplies<>());
  }
  bool is_contiguous() const { return true; }
  ScalarType scalar_type() const { return type_; }
  TensorOptions options() const { return {type_}; }
  const Sizes& sizes() const { return sizes_; }
  const void* const_data_ptr() const { return memory_->data(); }
  template <typename T>
  const T* const_data_ptr() const {
    return reinterpret_cast<const T*>(memory_->data());
  }
  template <typename T>
  T* mutable_data_ptr() const {
    return reinterpret_cast<T*>(memory_->data());
  }

 private:
  Sizes sizes_;
  ScalarType type_ = kFloat;
  std::shared_ptr<std::vector<char>> memory_;
};

inline Tensor empty(const Sizes& sizes, TensorOptions options) { return Tensor(sizes, options.type); }
inline Tensor zeros(const Sizes& sizes, TensorOptions options) { return Tensor(sizes, options.type); }
}  // namespace at
