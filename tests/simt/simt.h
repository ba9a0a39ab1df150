// Runs CUDA kernels on a CPU, to find mistakes: every thread of a block is a fiber, one block runs at a time.
//
// What the hardware leaves open is played through by schedules (Order): which lane and which warp goes first, and how
// far ahead of the others. Shared memory starts as NaN in every block, is exactly as large as the launch asked for (so
// that AddressSanitizer sees its ends), and asynchronous copies poison their destination until the thread that issued
// them waits. Not modelled: memory ordering between blocks, bank conflicts, time.
//
// simt.cpp holds the scheduler; simt_device.h is what kernels see in place of the PTX in csrc/common/cuda/device.cuh.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace simt {

// The first two run all lanes up to their next meeting point, the last two one whole warp up to a block barrier.
enum class Order { kForward, kReverse, kRandom, kWarpFirst, kWarpLast };

// A kernel did something that hangs, or is undefined, on a device.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kMostShared = 227 * 1024;

// Where the calling thread is.
unsigned thread_index();
unsigned block_index();
unsigned grid_size();

// The block's dynamic shared memory.
char* shared_memory();

// All threads of the block meet. A fault if some never come.
void sync_block();

// An instruction that lanes execute together. `run` is called once, when all lanes of `mask` have come to the same one.
struct Collective {
  const char* name;
  uint32_t mask;
  void (*run)(void* const* operands, uint32_t mask);  // operands[lane] for lanes of the mask; null: just meet
  void* operand;                                      // of the calling lane
};
void meet(const Collective& collective);

// cp.async: the destination is poisoned now, the bytes (zeros if not `present`) arrive at the wait that covers them.
void copy_async(void* to, const void* from, size_t bytes, bool present);
void commit_copies();
void wait_copies(size_t groups_left);

// One launch, for whoever runs it in the host's place: the kernel's address, and its arguments as bytes.
struct Launch {
  const void* kernel;
  unsigned grid, block;
  size_t shared;
  int count;  // of arguments
  const void* const* arguments;
  const size_t* sizes;
};

// Runs `body` once per thread of the grid. Returns an empty text, or what went wrong.
std::string launch(const Launch& launch, const std::function<void()>& body);

}  // namespace simt

extern "C" {
// The schedule of later launches; `seed` is for Order::kRandom.
void simt_set_order(int order, unsigned seed);
// Launches are handed to `hook` instead (null: run here). It returns 0, or anything else for a failed launch.
typedef int (*simt_hook)(const simt::Launch* launch, const char* kernel_symbol);
void simt_set_hook(simt_hook hook);

// Memory that kernels were given since the last simt_forget_memory, as bindings tell; `fresh`: nobody has written it.
void simt_note_memory(const void* data, size_t bytes, int fresh);
struct simt_memory {
  const void* data;
  size_t bytes;
  int fresh;
};
size_t simt_known_memory(const simt_memory** list);
void simt_forget_memory();
}
