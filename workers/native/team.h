// The threads that compute a step together: how they share work out and wait for each other.
//
// A step has some hundred barriers, a few microseconds of work apart. OpenMP's own spin for milliseconds: when two
// threads of a team come to share a core, or another process takes one, every barrier costs a time slice of the system's.
#pragma once

#include <algorithm>
#include <chrono>
#include <vector>

#include <sched.h>

#include "interface.h"
#include "waiting.h"

namespace {

// Which cores the threads of a team run on. When the system wakes two of them on one core, it takes it some milliseconds,
// the length of a step, to notice that another core is idle.
class Cores {
 public:
  explicit Cores(int num_threads) : of_(num_threads) {
    for (auto& core : of_) core = -1;
  }

  void note(int index) {
#ifdef __linux__
    of_[index].store(sched_getcpu(), std::memory_order_relaxed);
#endif
  }

  // Moves this thread to a core where no other one was seen, if there is one and another one was seen on this thread's.
  // The system may move it again.
  void leave_shared(int index) const {
#ifdef __linux__
    const int own = sched_getcpu();
    cpu_set_t allowed, free;
    if (!is_taken(own, index) || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    free = allowed;
    for (const auto& core : of_)
      if (core.load(std::memory_order_relaxed) >= 0) CPU_CLR(core.load(std::memory_order_relaxed), &free);
    if (CPU_COUNT(&free) > 0 && sched_setaffinity(0, sizeof free, &free) == 0)
      sched_setaffinity(0, sizeof allowed, &allowed);
#endif
  }

 private:
  bool is_taken(int core, int but_by) const {
    for (int index = 0; index < static_cast<int>(of_.size()); ++index)
      if (index != but_by && of_[index].load(std::memory_order_relaxed) == core) return true;
    return false;
  }

  std::vector<std::atomic<int>> of_;  // of each thread, when it last came to a barrier; -1: not yet
};

class Barrier {
 public:
  explicit Barrier(int size) : size_(size), cores_(size) {}

  // Returns when all `size` threads have called it, each with an index of its own.
  void wait(int index) {
    cores_.note(index);
    const uint32_t round = round_.load(std::memory_order_relaxed);  // goes on only after this thread has come
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1);
      if (sleepers_.load() > 0) wake(round_);
      return;
    }
    for (int spin = 0; spin < kBusySpins; ++spin) {
      if (round_.load(std::memory_order_acquire) != round) return;
      relax();
    }
    cores_.leave_shared(index);
    for (int spin = 0; spin < kYields; ++spin) {
      if (round_.load(std::memory_order_acquire) != round) return;
      sched_yield();  // whom we wait for may be waiting for this core
    }
    ++sleepers_;  // an idle core draws a waiting thread from another one's queue
    while (round_.load() == round) nap(round_, round, kLongNapNs);
    --sleepers_;
  }

 private:
  static constexpr int kBusySpins = 1000;  // some 20 us
  static constexpr int kYields = 200;      // some 100 us
  static constexpr int64_t kLongNapNs = 1'000'000'000;

  const int size_;
  Cores cores_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<int> sleepers_{0};
};

struct Team {
  explicit Team(int new_size) : size(new_size), barrier(new_size) {}

  const int size;
  Barrier barrier;
  alignas(64) std::atomic<int64_t> taken{0};  // see Member::take_turns
};

struct Range {
  int64_t first, last;
};

// One thread of a team. What takes a Member is called by every thread of the team, and says whether it waits for them.
class Member {
 public:
  Member(Team& team, int index, TwinpoolParts* parts) : team_(team), index_(index), parts_(index == 0 ? parts : nullptr) {
    if (parts_ != nullptr) began_ = Clock::now();
  }

  int index() const { return index_; }
  bool is_first() const { return index_ == 0; }
  bool is_alone() const { return team_.size == 1; }

  void wait() {
    if (!is_alone()) team_.barrier.wait(index_);
  }

  // This thread's part of `count` pieces of work that take equally long. Does not wait.
  Range share(int64_t count) const { return {count * index_ / team_.size, count * (index_ + 1) / team_.size}; }

  // Each piece goes to the thread that is free first. Waits, unless there is nothing to do.
  template <typename Do>
  void take_turns(int64_t count, Do&& what) {
    if (count == 0) return;
    // Every thread asks once in vain, so that nobody needs to set the counter back.
    for (int64_t turn; (turn = team_.taken.fetch_add(1, std::memory_order_relaxed) - turns_before_) < count;) what(turn);
    turns_before_ += count + team_.size;
    wait();
  }

  // The time since the last call was spent on `part`.
  void finish(TwinpoolPart part) {
    if (parts_ == nullptr) return;
    const Clock::time_point now = Clock::now();
    parts_->nanoseconds[part] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - began_).count();
    began_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;

  Team& team_;
  const int index_;
  TwinpoolParts* const parts_;
  int64_t turns_before_ = 0;
  Clock::time_point began_;
};

}  // namespace
