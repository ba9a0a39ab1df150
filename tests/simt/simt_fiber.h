// Fibers: a stack each, and a switch that saves what the calling convention says a callee keeps.
#pragma once

#include <cstddef>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

constexpr size_t kStackBytes = 128 << 10;

class Fiber {
 public:
  // Makes the next resume() start `entry` on a fresh stack. `entry` never returns: it ends with leave(true).
  void start(void (*entry)());
  // From the scheduler into the fiber, until it leaves.
  void resume();
  // From the fiber back to the scheduler. `for_good`: it is not resumed again.
  void leave(bool for_good = false);
  // First thing in `entry`.
  void arrived();

 private:
  std::unique_ptr<char[]> stack_;
#if defined(__x86_64__)
  void *mine_ = nullptr, *scheduler_ = nullptr;  // stack pointers
#else
  ucontext_t mine_, scheduler_;
#endif
  // AddressSanitizer's view of both stacks.
  void *fake_ = nullptr, *scheduler_fake_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
};

#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.weak simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#endif

inline void Fiber::start(void (*entry)()) {
  if (!stack_) stack_.reset(new char[kStackBytes]);
  fake_ = nullptr;
#if SIMT_ASAN
  __asan_unpoison_memory_region(stack_.get(), kStackBytes);  // what an abandoned fiber left behind
#endif
#if defined(__x86_64__)
  const auto top = (reinterpret_cast<uintptr_t>(stack_.get()) + kStackBytes) & ~uintptr_t{15};
  void** at = reinterpret_cast<void**>(top);
  *--at = nullptr;                           // keeps the stack aligned as after a call
  *--at = reinterpret_cast<void*>(entry);    // where simt_switch returns to
  for (int i = 0; i < 6; ++i) *--at = nullptr;
  mine_ = at;
#else
  getcontext(&mine_);
  mine_.uc_stack.ss_sp = stack_.get(), mine_.uc_stack.ss_size = kStackBytes, mine_.uc_link = nullptr;
  makecontext(&mine_, entry, 0);
#endif
}

inline void Fiber::resume() {
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_, stack_.get(), kStackBytes);
#endif
#if defined(__x86_64__)
  simt_switch(&scheduler_, mine_);
#else
  swapcontext(&scheduler_, &mine_);
#endif
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_, nullptr, nullptr);
#endif
}

inline void Fiber::leave([[maybe_unused]] bool for_good) {
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_, scheduler_bottom_, scheduler_size_);
#endif
#if defined(__x86_64__)
  simt_switch(&mine_, scheduler_);
#else
  swapcontext(&mine_, &scheduler_);
#endif
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(fake_, nullptr, nullptr);
#endif
}

inline void Fiber::arrived() {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom_, &scheduler_size_);
#endif
}

}  // namespace simt
