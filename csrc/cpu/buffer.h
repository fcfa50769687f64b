// Uninitialised scratch memory on a cache line boundary.
#pragma once
#include <cstdint>
#include <new>

namespace mpq {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(count ? static_cast<T*>(::operator new(count * sizeof(T), kLine)) : nullptr) {}
  ~Buffer() { ::operator delete(data_, kLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

}  // namespace mpq
