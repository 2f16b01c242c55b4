// Sums over the ranks of a tensor-parallel group, through memory that their processes share.
//
//     memory:  │ is_lost │ arrived[rank 0] │ arrived[rank 1] │ …      one cache line each
//              │ parity 0: piece of rank 0 │ piece of rank 1 │ …
//              │ parity 1: …
//
// A rank writes its piece, counts up its `arrived`, waits for the others' and adds all pieces in the order of the
// ranks, so that every rank gets the same sum to the last bit. Two parities take turns: who writes round n + 2 has seen
// everybody arrive in round n + 1, and so leave round n.
#pragma once

#include <cstring>

#include "interface.h"
#include "vectors.h"
#include "waiting.h"

namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kPieceFloats = 64 * 1024;
constexpr int kSpins = 2000;  // some 50 us: ranks on cores of their own arrive closer together than that
constexpr int64_t kNapNs = 20'000'000;

static_assert(std::atomic<uint32_t>::is_always_lock_free, "the counters are shared between processes");

int64_t group_bytes(int64_t size) { return kLine * (1 + size) + 2 * size * kPieceFloats * sizeof(float); }

class AllReduce {
 public:
  explicit AllReduce(TwinpoolGroup& group) : group_(group), memory_(static_cast<char*>(group.memory)) {}

  // x += the sum of every rank's `partial`. False when a rank is lost; `x` is of no use then.
  bool add(const float* partial, int64_t count, float* x) {
    for (int64_t first = 0; first < count; first += kPieceFloats)
      if (!add_piece(partial + first, std::min(kPieceFloats, count - first), x + first)) return false;
    return true;
  }

 private:
  bool add_piece(const float* partial, int64_t count, float* x) {
    const uint32_t round = ++group_.round;
    std::memcpy(piece(round, group_.rank), partial, count * sizeof(float));
    arrived(group_.rank).store(round, std::memory_order_release);
    wake(arrived(group_.rank));
    for (int32_t rank = 0; rank < group_.size; ++rank)
      if (!wait(arrived(rank), round)) return false;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      Vec total = load(piece(round, 0) + i);
      for (int32_t rank = 1; rank < group_.size; ++rank) total += load(piece(round, rank) + i);
      store(x + i, load(x + i) + total);
    }
    for (; i < count; ++i) {
      float total = piece(round, 0)[i];
      for (int32_t rank = 1; rank < group_.size; ++rank) total += piece(round, rank)[i];
      x[i] += total;
    }
    return true;
  }

  bool wait(std::atomic<uint32_t>& counter, uint32_t round) {
    int64_t naps_left = static_cast<int64_t>(group_.timeout_ms) * 1'000'000 / kNapNs;
    for (int spin = 0;; ++spin) {
      const uint32_t seen = counter.load(std::memory_order_acquire);
      if (static_cast<int32_t>(seen - round) >= 0) return true;  // the counter wraps around
      if (spin < kSpins) {
        relax();
        continue;
      }
      if (is_lost().load(std::memory_order_relaxed) != 0 || naps_left-- <= 0) return false;
      nap(counter, seen, kNapNs);
    }
  }

  std::atomic<uint32_t>& is_lost() { return *reinterpret_cast<std::atomic<uint32_t>*>(memory_); }
  std::atomic<uint32_t>& arrived(int32_t rank) {
    return *reinterpret_cast<std::atomic<uint32_t>*>(memory_ + kLine * (1 + rank));
  }
  float* piece(uint32_t round, int32_t rank) {
    char* pieces = memory_ + kLine * (1 + group_.size);
    return reinterpret_cast<float*>(pieces) + ((round & 1) * group_.size + rank) * kPieceFloats;
  }

  TwinpoolGroup& group_;
  char* memory_;
};

}  // namespace
