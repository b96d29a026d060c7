// Scratch memory that a thread keeps between calls.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace topt {

// Grow-only scratch memory of one thread.
class Arena {
 public:
  ~Arena() { std::free(data_); }
  // Makes room for `bytes`; false when out of memory.
  bool reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return true;
    std::free(data_);
    size_ = (bytes + 4095) & ~size_t{4095};
    data_ = static_cast<char*>(std::aligned_alloc(4096, size_));
    if (!data_) size_ = 0;
    return data_ != nullptr;
  }
  template <class U>
  U* take(size_t n) {
    U* p = reinterpret_cast<U*>(data_ + used_);
    used_ += bytes_for<U>(n);
    return p;
  }
  template <class U>
  static size_t bytes_for(size_t n) {
    return (n * sizeof(U) + 63) & ~size_t{63};
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

}  // namespace topt
