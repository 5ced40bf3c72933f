// Memory for kept logits, passed from one step to the next.
#pragma once

#include <ATen/ATen.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fasterase {

// Keeps the block of the last finished call. Fresh memory costs a page fault per page at its first
// touch, a tenth of a step in all (N = 4096, D = 512, with the KL; more in virtual machines).
class Workspace {
 public:
  static Workspace& instance() {
    static Workspace* const only = new Workspace;  // never destroyed: tensors may outlive statics
    return *only;
  }

  // A tensor of uninitialised elements. Its memory returns here when the tensor is freed.
  template <typename T>
  at::Tensor take(int64_t elements) {
    const size_t bytes = elements * sizeof(T);
    const auto type = c10::CppTypeToScalarType<T>::value;
    if (bytes < page) return at::empty({elements}, type);
    const Block block = reuse_or_allocate(bytes);
    return at::from_blob(
        block.first, {elements}, [block](void*) { instance().give_back(block); }, type);
  }

 private:
  using Block = std::pair<void*, size_t>;
  static constexpr size_t page = size_t(1) << 21;  // a huge page

  Block reuse_or_allocate(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      // A small call leaves a large block to the large call of the same step.
      if (spare_.second >= bytes && spare_.second / 4 <= bytes) {
        return std::exchange(spare_, Block());
      }
    }
    const size_t rounded = (bytes + page - 1) / page * page;
    void* data = nullptr;
    if (posix_memalign(&data, page, rounded) != 0) throw std::bad_alloc();
#ifdef __linux__
    madvise(data, rounded, MADV_HUGEPAGE);
#endif
    return {data, rounded};
  }

  void give_back(Block block) {
#ifdef __linux__
    // The system may reclaim the pages when memory is short; otherwise reusing them is free.
    madvise(block.first, block.second, MADV_FREE);
#endif
    const std::lock_guard<std::mutex> lock(mutex_);
    if (spare_.second < block.second) std::swap(spare_, block);
    std::free(block.first);
  }

  std::mutex mutex_;
  Block spare_;
};

}  // namespace fasterase
