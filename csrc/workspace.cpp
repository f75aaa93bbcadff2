#include "workspace.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace fastsae {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kKept = 64 << 20;  // bytes that stay reserved while no call uses them

struct Block {
  char* data;
  size_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;
  size_t bytes = 0;
};

Pool& pool() {
  static Pool* pool = new Pool;  // never destroyed: a thread may still return a block at exit
  return *pool;
}

}  // namespace

Workspace::Workspace(size_t bytes) : data_(nullptr), bytes_((bytes + 4095) / 4096 * 4096) {
  Pool& p = pool();
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    size_t best = p.blocks.size();
    for (size_t i = 0; i < p.blocks.size(); ++i) {
      const size_t size = p.blocks[i].bytes;
      if (size >= bytes_ && (best == p.blocks.size() || size < p.blocks[best].bytes)) best = i;
    }
    if (best < p.blocks.size()) {
      data_ = p.blocks[best].data;
      bytes_ = p.blocks[best].bytes;
      p.bytes -= bytes_;
      p.blocks.erase(p.blocks.begin() + (ptrdiff_t)best);
      return;
    }
  }
  // Lists and rows are met in no order: on small pages, translating addresses would take over.
  const size_t page = bytes_ >= kHugePage ? kHugePage : 4096;
  bytes_ = (bytes_ + page - 1) / page * page;
  data_ = (char*)std::aligned_alloc(page, bytes_);
  if (!data_) throw std::bad_alloc();
#if defined(__linux__)
  if (page == kHugePage) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
}

Workspace::~Workspace() {
  Pool& p = pool();
  std::vector<Block> dropped;
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    p.blocks.push_back({data_, bytes_});
    p.bytes += bytes_;
    while (p.bytes > kKept) {  // the oldest goes first
      dropped.push_back(p.blocks.front());
      p.bytes -= p.blocks.front().bytes;
      p.blocks.erase(p.blocks.begin());
    }
  }
  for (const Block& block : dropped) std::free(block.data);
}

size_t release_workspaces() {
  Pool& p = pool();
  std::vector<Block> dropped;
  size_t bytes;
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    dropped.swap(p.blocks);
    bytes = p.bytes;
    p.bytes = 0;
  }
  for (const Block& block : dropped) std::free(block.data);
  return bytes;
}

}  // namespace fastsae
