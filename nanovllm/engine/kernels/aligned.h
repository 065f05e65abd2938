// Memory of a kernel's own, on whole cache lines: a vector that lies across two of them is read twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

template <typename T>
struct AlignedAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  AlignedAllocator() = default;
  template <typename Other>
  AlignedAllocator(const AlignedAllocator<Other>&) {}

  T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* memory, std::size_t) { ::operator delete(memory, kLine); }
  bool operator==(const AlignedAllocator&) const { return true; }
  bool operator!=(const AlignedAllocator&) const { return false; }
};

using AlignedFloats = std::vector<float, AlignedAllocator<float>>;

// So many floats of the calling thread, which keeps them: fresh memory would cost a page fault for every few lines.
inline float* floats_of_thread(int64_t count) {
  thread_local AlignedFloats kept;
  if (static_cast<int64_t>(kept.size()) < count) kept.resize(count);
  return kept.data();
}
