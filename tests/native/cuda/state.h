// What the two halves of the emulation know of each other.
#pragma once
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulation.h"

namespace emulation {

constexpr int kMostBlocks = 8;  // of a cluster

struct Thread {
  int block = 0;  // its rank in the cluster
  dim3 index;
  Meeting meeting = Meeting::warp;  // what it waits for
  Site site;
  unsigned mask = ~0u;
  uint32_t value = 0;  // what it sends, then what it gets
  int from = 0;
};

struct Block {
  dim3 index;
  int epoch = 0;           // barriers that all threads of the block have passed
  int read_from_afar = -1;  // epoch of the cluster in which another block last read its memory
  bool left = false;
};

struct State {
  Thread* thread = nullptr;  // that runs; null outside of kernels
  std::pair<char*, char*> stack;
  std::vector<Thread> threads;  // of the cluster, block by block
  std::vector<Block> blocks;
  int epoch = 0;  // barriers that all blocks of the cluster have passed
  size_t shared_bytes = 0, shared_at_most = 0;
  std::string failure;
};
extern State now;

std::string describe(const Thread& thread);
void pause();            // back to the scheduler
void leave(int block);   // its threads are gone, and so is its shared memory
void clear_shared();     // of a new cluster: nothing is written
void know(const void* begin, size_t bytes, bool writable);  // memory that kernels may use,
void forget();                                              // until then

}  // namespace emulation
