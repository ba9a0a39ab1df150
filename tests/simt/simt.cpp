// The scheduler of simt.h.
#include "simt.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "simt_fiber.h"

namespace simt {
namespace {

enum class State { kReady, kAtBarrier, kAtCollective, kDone };

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
  bool present;
};

struct Thread {
  Fiber fiber;
  State state = State::kDone;
  Collective waits_for{};
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> open;
};

// The block that is running.
struct Block {
  std::vector<Thread> threads;
  unsigned count = 0, current = 0, index = 0, grid = 0;
  std::unique_ptr<char[]> shared;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
};

Block block;
Order order = Order::kForward;
unsigned order_seed = 0;
simt_hook hook = nullptr;
std::vector<simt_memory> memory;

Thread& self() { return block.threads[block.current]; }

std::string place(unsigned thread) {
  return "block " + std::to_string(block.index) + ", thread " + std::to_string(thread);
}

void thread_main() {
  self().fiber.arrived();
  try {
    (*block.body)();
  } catch (...) {
    if (!block.error) block.error = std::current_exception();
  }
  self().state = State::kDone;
  self().fiber.leave(true);
}

void wait_as(State state) {
  self().state = state;
  self().fiber.leave();
}

void begin_block(const Launch& launch) {
  block.shared.reset(new char[launch.shared]);
  std::memset(block.shared.get(), 0xFF, launch.shared);  // NaN in every element type
  for (unsigned i = 0; i < block.count; ++i) {
    Thread& thread = block.threads[i];
    thread.state = State::kReady;
    thread.committed.clear(), thread.open.clear();
    thread.fiber.start(thread_main);
  }
}

void run_thread(unsigned i) {
  block.current = i;
  block.threads[i].fiber.resume();
  if (block.error) std::rethrow_exception(std::exchange(block.error, nullptr));
}

// Carries out the collectives of one warp whose lanes are all there. Returns whether there were any.
bool complete_collectives(unsigned first, unsigned lanes) {
  bool any = false;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    const Thread& asking = block.threads[first + lane];
    if (asking.state != State::kAtCollective) continue;
    const Collective what = asking.waits_for;
    if (!(what.mask >> lane & 1))
      throw Fault(std::string(what.name) + ": the calling lane is not in the mask, " + place(first + lane));
    void* operands[kWarp] = {};
    bool all = true;
    for (unsigned other = 0; other < kWarp; ++other) {
      if (!(what.mask >> other & 1)) continue;
      if (other >= lanes || block.threads[first + other].state == State::kDone)
        throw Fault(std::string(what.name) + ": waits for lane " + std::to_string(other) + ", which has ended, " +
                    place(first + lane));
      const Thread& there = block.threads[first + other];
      const bool same = there.state == State::kAtCollective && there.waits_for.mask == what.mask;
      if (same && there.waits_for.run != what.run)
        throw Fault(std::string("lanes meet at different instructions: ") + what.name + " and " +
                    there.waits_for.name + ", " + place(first + lane));
      all = all && same;
      operands[other] = there.waits_for.operand;
    }
    if (!all) continue;
    if (what.run) what.run(operands, what.mask);
    for (unsigned other = 0; other < lanes; ++other)
      if (what.mask >> other & 1) block.threads[first + other].state = State::kReady;
    any = true;
  }
  return any;
}

// Runs one block to its end.
void run_block(std::mt19937& random) {
  const bool backward = order == Order::kReverse || order == Order::kWarpLast;
  const bool far = order == Order::kWarpFirst || order == Order::kWarpLast;
  std::vector<unsigned> warps((block.count + kWarp - 1) / kWarp);
  std::iota(warps.begin(), warps.end(), 0u);
  if (backward) std::reverse(warps.begin(), warps.end());
  unsigned done = 0;
  while (done < block.count) {
    bool moved = false;
    if (order == Order::kRandom) std::shuffle(warps.begin(), warps.end(), random);
    for (unsigned warp : warps) {
      const unsigned first = warp * kWarp, lanes = std::min(kWarp, block.count - first);
      unsigned lane_order[kWarp];
      std::iota(lane_order, lane_order + lanes, 0u);
      if (backward) std::reverse(lane_order, lane_order + lanes);
      bool again;
      do {
        if (order == Order::kRandom) std::shuffle(lane_order, lane_order + lanes, random);
        for (unsigned i = 0; i < lanes; ++i) {
          const unsigned thread = first + lane_order[i];
          if (block.threads[thread].state != State::kReady) continue;
          run_thread(thread);
          moved = true;
          done += block.threads[thread].state == State::kDone;
        }
        again = complete_collectives(first, lanes);
        moved = moved || again;
      } while (again && (far || (order == Order::kRandom && random() % 4 != 0)));
    }
    if (moved) continue;
    unsigned waiting = 0;
    for (unsigned i = 0; i < block.count; ++i) waiting += block.threads[i].state == State::kAtBarrier;
    if (waiting != block.count)
      throw Fault(waiting > 0 ? "a block barrier is reached by only part of the block, block " +
                                    std::to_string(block.index)
                              : "no thread can go on, block " + std::to_string(block.index));
    for (unsigned i = 0; i < block.count; ++i) block.threads[i].state = State::kReady;
  }
}

}  // namespace

unsigned thread_index() { return block.current; }
unsigned block_index() { return block.index; }
unsigned grid_size() { return block.grid; }
char* shared_memory() { return block.shared.get(); }

void sync_block() { wait_as(State::kAtBarrier); }

void meet(const Collective& collective) {
  self().waits_for = collective;
  wait_as(State::kAtCollective);
}

void copy_async(void* to, const void* from, size_t bytes, bool present) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || (present && reinterpret_cast<uintptr_t>(from) % bytes))
    throw Fault("cp.async of " + std::to_string(bytes) + " bytes: misaligned, " + place(block.current));
  if (present) {  // AddressSanitizer should complain here, where the address was made
    const volatile char *first = static_cast<const char*>(from), *last = first + bytes - 1;
    (void)*first, (void)*last;
  }
  std::memset(to, 0xFF, bytes);
  self().open.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, present});
}

void commit_copies() { self().committed.push_back(std::exchange(self().open, {})); }

void wait_copies(size_t groups_left) {
  auto& groups = self().committed;
  while (groups.size() > groups_left) {
    for (const Copy& copy : groups.front()) {
      if (copy.present)
        std::memcpy(copy.to, copy.from, copy.bytes);
      else
        std::memset(copy.to, 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

std::string launch(const Launch& launch, const std::function<void()>& body) {
  if (hook != nullptr) {
    Dl_info info{};
    const bool found = dladdr(launch.kernel, &info) != 0 && info.dli_sname != nullptr;
    return hook(&launch, found ? info.dli_sname : "") == 0 ? "" : "the hook could not run the launch";
  }
  if (launch.block == 0 || launch.block > kMostThreads) return "block size " + std::to_string(launch.block);
  if (launch.shared > kMostShared) return "shared memory of " + std::to_string(launch.shared) + " bytes";
  block.count = launch.block, block.grid = launch.grid, block.body = &body;
  if (block.threads.size() < launch.block) block.threads.resize(launch.block);
  std::mt19937 random(order_seed);
  std::vector<unsigned> blocks(launch.grid);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (order == Order::kRandom) std::shuffle(blocks.begin(), blocks.end(), random);
  if (order == Order::kReverse) std::reverse(blocks.begin(), blocks.end());
  try {
    for (unsigned index : blocks) {
      block.index = index;
      begin_block(launch);
      run_block(random);
    }
  } catch (const std::exception& error) {
    block.error = nullptr;
    return error.what();
  }
  return "";
}

}  // namespace simt

extern "C" {
void simt_set_order(int order, unsigned seed) {
  simt::order = static_cast<simt::Order>(order);
  simt::order_seed = seed;
}
void simt_set_hook(simt_hook hook) { simt::hook = hook; }

void simt_note_memory(const void* data, size_t bytes, int fresh) {
  if (simt::hook != nullptr && bytes > 0) simt::memory.push_back({data, bytes, fresh});
}
size_t simt_known_memory(const simt_memory** list) {
  *list = simt::memory.data();
  return simt::memory.size();
}
void simt_forget_memory() { simt::memory.clear(); }
}
