#include "common/team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>

#include <new>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace m3 {
namespace {

constexpr int kMostMembers = 256;
constexpr int64_t kSpin = 30000;       // nanoseconds that a wait holds its core
constexpr int64_t kSpinIdle = 500000;  // the same between runs: the next token is near, and waking takes long

typedef std::atomic<uint32_t> Word;
static_assert(sizeof(Word) == 4 && Word::is_always_lock_free);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1000000000 + t.tv_nsec;
}

void sleep_while(Word& word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  (void)word, (void)value;
  sched_yield();
#endif
}

void wake_all(Word& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, kMostMembers, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

// A word that some change and others wait to see changed.
struct Signal {
  alignas(64) Word word{0};
  Word sleepers{0};

  void set(uint32_t value) {
    word.store(value);  // sequentially consistent, as is the count of sleepers: one of both sides sees the other
    if (sleepers.load() != 0) wake_all(word);
  }

  uint32_t wait_change(uint32_t old, int64_t spin) {
    uint32_t value = word.load(std::memory_order_acquire);
    if (value != old) return value;
    const int64_t end = now() + spin;
    do {
      for (int i = 0; i < 32; ++i) {
        value = word.load(std::memory_order_acquire);
        if (value != old) return value;
        pause();
      }
    } while (now() < end);
    sleepers.fetch_add(1);
    while ((value = word.load()) == old) sleep_while(word, old);
    sleepers.fetch_sub(1);
    return value;
  }
};

}  // namespace

struct TeamState {
  Signal start;   // generation << 16 | members: a thread sees in one load whether a run is its own
  Signal barrier; // phases passed
  alignas(64) Word arrived{0};
  alignas(64) std::atomic<int64_t> next{0};  // of the pieces of work to be taken in this phase
  alignas(64) std::atomic<bool> busy{false};
  int threads = 1;  // made so far, the caller included
  TeamBody body = nullptr;
  void* context = nullptr;
};

uint32_t Member::arrive() {
  const uint32_t phase = team_.barrier.word.load(std::memory_order_relaxed);
  if (team_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < static_cast<uint32_t>(count)) return phase;
  team_.arrived.store(0, std::memory_order_relaxed);
  team_.next.store(0, std::memory_order_relaxed);
  team_.barrier.set(phase + 1 == kLast ? 0 : phase + 1);
  return kLast;
}

bool Member::passed(uint32_t phase) const { return team_.barrier.word.load(std::memory_order_acquire) != phase; }

void Member::wait(uint32_t phase) { team_.barrier.wait_change(phase, kSpin); }

int64_t Member::take(int64_t step) { return team_.next.fetch_add(step, std::memory_order_relaxed); }

namespace {

std::atomic<TeamState*> the_team{nullptr};  // never freed: its threads sleep on it until the process ends

struct Recruit {
  TeamState* team;
  int index;
  uint32_t seen;
};

void* serve(void* argument) {
  Recruit* const recruit = static_cast<Recruit*>(argument);
  TeamState& team = *recruit->team;
  const int index = recruit->index;
  uint32_t seen = recruit->seen;
  delete recruit;
  for (;;) {
    seen = team.start.wait_change(seen, kSpinIdle);
    const int members = static_cast<int>(seen & 0xffff);
    if (index >= members) continue;
    Member member(team, index, members);
    team.body(team.context, member);
    member.barrier();
  }
  return nullptr;
}

// Signals go to the program's own threads.
bool start_thread(TeamState& team, int index) {
  Recruit* const recruit = new (std::nothrow) Recruit{&team, index, team.start.word.load()};
  if (recruit == nullptr) return false;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_t thread;
  const bool started = pthread_create(&thread, nullptr, serve, recruit) == 0;
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (started)
    pthread_detach(thread);
  else
    delete recruit;
  return started;
}

// The threads of the parent do not exist in the child, and whoever held the team there is gone.
void forget_team() { the_team.store(nullptr); }

TeamState* find_team() {
  TeamState* team = the_team.load(std::memory_order_acquire);
  if (team != nullptr) return team;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_team);
  (void)registered;
  TeamState* const made = new (std::nothrow) TeamState;
  if (made == nullptr || the_team.compare_exchange_strong(team, made)) return made;
  delete made;
  return team;
}

void run_alone(TeamBody body, void* context) {
  TeamState alone;
  Member member(alone, 0, 1);
  body(context, member);
}

}  // namespace

void run_on_team(int threads, TeamBody body, void* context) {
  TeamState* const team = threads > 1 ? find_team() : nullptr;
  if (team == nullptr || team->busy.exchange(true)) return run_alone(body, context);
  if (threads > kMostMembers) threads = kMostMembers;
  while (team->threads < threads && start_thread(*team, team->threads)) ++team->threads;
  const int members = threads < team->threads ? threads : team->threads;
  team->body = body, team->context = context;
  const uint32_t generation = (team->start.word.load() >> 16) + 1;
  team->start.set(generation << 16 | static_cast<uint32_t>(members));
  Member member(*team, 0, members);
  body(context, member);
  member.barrier();
  team->busy.store(false);
}

}  // namespace m3
