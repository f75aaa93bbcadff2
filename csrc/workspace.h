// Memory that one op needs for a moment, kept for the next call: fresh pages cost more than the
// kernels that fill them.
#pragma once
#include <cstddef>
#include <cstdlib>

namespace fastsae {

class Workspace {
 public:
  explicit Workspace(size_t bytes);  // 64-byte aligned, contents undefined; throws std::bad_alloc
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // The next `count` values of T, 64-byte aligned.
  template <class T>
  T* take(size_t count) {
    T* part = (T*)(data_ + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    if (used_ > bytes_) std::abort();  // whoever asked for `bytes` cannot count
    return part;
  }

 private:
  char* data_;
  size_t bytes_, used_ = 0;
};

size_t release_workspaces();  // frees what no call uses now; returns its bytes

}  // namespace fastsae
