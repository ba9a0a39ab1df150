// A small standing team of threads for work in many short phases: forking and joining once per phase would cost more
// than the phases. All members run the same function and meet at barriers.
//
// Threads are made when first asked for and kept; between runs they sleep. A run by one member makes no thread. A call
// while the team is busy (another thread's run, or a nested one) runs on its caller alone. After fork() the child makes
// a team of its own. Waiting spins for some microseconds, then sleeps: a core that others need is given back.
#pragma once

#include <stdint.h>

#include <atomic>

namespace m3 {

struct TeamState;

class Member {
 public:
  Member(TeamState& team, int index, int count) : index(index), count(count), team_(team) {}

  const int index, count;

  // Everybody's writes before it are seen by everybody after it.
  void barrier() {
    barrier([] { return false; });
  }

  // idle() is called while the others are waited for, until it returns false.
  template <class Idle>
  void barrier(Idle idle) {
    if (count == 1) return;
    const uint32_t phase = arrive();
    if (phase == kLast) return;
    while (!passed(phase) && idle()) {
    }
    wait(phase);
  }

  // What share() deals out to each member: [index * dealt, (index + 1) * dealt).
  int64_t dealt(int64_t n, int64_t unit) const { return n * 3 / (4 * count) / unit * unit; }

  // Cuts [0, n) among the members: work(begin, end) in pieces of a multiple of `unit` (the last may be shorter). Three
  // quarters are dealt out evenly, in long stretches; the rest goes to whoever is free. A barrier must follow.
  template <class Work>
  void share(int64_t n, int64_t unit, const Work& work) {
    if (count == 1) {
      if (n > 0) work(int64_t{0}, n);
      return;
    }
    const int64_t mine = dealt(n, unit);
    if (mine > 0) work(index * mine, (index + 1) * mine);
    const int64_t first = count * mine, piece = ((n - first) / (4 * count) + unit - 1) / unit * unit;
    const int64_t step = piece > unit ? piece : unit;
    for (int64_t at = first + take(step); at < n; at = first + take(step)) work(at, at + step < n ? at + step : n);
  }

 private:
  static constexpr uint32_t kLast = ~uint32_t{0};

  uint32_t arrive();  // kLast: nobody to wait for
  bool passed(uint32_t phase) const;
  void wait(uint32_t phase);
  int64_t take(int64_t step);

  TeamState& team_;
};

typedef void (*TeamBody)(void* context, Member& member);

// Runs body on min(threads, those there are) members and returns when all are through. It must not throw. Results must
// not depend on how many members there are.
void run_on_team(int threads, TeamBody body, void* context);

template <class Body>
void on_team(int threads, const Body& body) {
  run_on_team(
      threads, [](void* context, Member& member) { (*static_cast<const Body*>(context))(member); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace m3
