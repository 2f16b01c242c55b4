// Draws a token from a row of logits: the weights exp(logit / temperature), without those that min_p, top_k and top_p
// drop. workers/model/sampler.py says what these are, and has the same in portable form.
//
// The vocabulary is never sorted. Where few tokens have nearly all of the weight, as mostly, these few are; elsewhere
// the weight at which a running sum over the likeliest reaches a target is found by halving: positive floats are ordered
// as their bits are.
#pragma once

#include "interface.h"
#include "vectors.h"

#include <cfloat>

namespace {

constexpr int64_t kDrawBlock = 256;  // weights whose sum is skipped at once
constexpr float kNarrowing = 1e-3f;  // candidates are looked for among weights of so much of the largest first
constexpr int64_t kFewCandidates = 1024;
constexpr int kHalvings = 24;  // of 30 bits

struct Candidate {
  float weight;
  int32_t token;
};

// A candidate, and the sum of the weights up to and with it, from the likeliest on.
struct Reached {
  Candidate candidate;
  double running;
};

// The order of candidates: ties in order of their tokens.
inline bool is_likelier(const Candidate& a, const Candidate& b) {
  return a.weight > b.weight || (a.weight == b.weight && a.token < b.token);
}

// Bit i: lane i of `values` is at least `least`.
inline uint32_t lanes_from(Vec values, float least) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)values, _mm512_set1_ps(least), _CMP_GE_OQ);
#else
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)values, _mm256_set1_ps(least), _CMP_GE_OQ)));
#endif
}

// Of one row after the other; the memory is the caller's.
class Drawing {
 public:
  // `weights`: a multiple of kLanes floats, `size` at least; `candidates`: `size` of them.
  Drawing(int64_t size, float* weights, Candidate* candidates)
      : size_(size), weights_(weights), candidates_(candidates) {}

  int64_t draw(const TwinpoolDraw& row) {
    weigh(row);
    if (row.top_k <= 0 && row.top_p >= 1.0) return draw_in_order(row.threshold);
    double total = 0;
    if (row.top_k > 0) {
      gather_until([&] { return count_ >= row.top_k; });
      if (count_ > row.top_k) {
        std::nth_element(candidates_, candidates_ + row.top_k - 1, candidates_ + count_, is_likelier);
        count_ = row.top_k;
      }
      total = sum_of_candidates();
    } else {
      total = sum_of_all();
      gather_until([&] { return sum_of_candidates() >= row.top_p * total; });
    }
    const bool are_few = row.top_k > 0 || count_ <= kFewCandidates;
    if (are_few) std::sort(candidates_, candidates_ + count_, is_likelier);
    const Reached last = are_few ? find<false>(0, row.top_p * total) : halve<false>(row.top_p * total);
    const double target = row.threshold * last.running;
    const Reached drawn = are_few ? find<true>(0, target) : halve<true>(target);
    return (is_likelier(last.candidate, drawn.candidate) ? last : drawn).candidate.token;
  }

 private:
  // The largest weight is 1. What is below the smallest normal float is 0.
  void weigh(const TwinpoolDraw& row) {
    const Vec largest = Vec{} + row.logits[row.likeliest], temperature = Vec{} + row.temperature;
    const auto weight = [&](Vec logits) {
      const Vec exponent = (logits - largest) / temperature;
      const Vec result = exponential(exponent);
      return (exponent < -87.0f) | (exponent < row.lowest) ? Vec{} : result;
    };
    int64_t i = 0;
    for (; i + kLanes <= size_; i += kLanes) store(weights_ + i, weight(load(row.logits + i)));
    if (i == size_) return;
    float rest[kLanes];
    std::fill(rest, rest + kLanes, -INFINITY);
    std::copy(row.logits + i, row.logits + size_, rest);
    store(weights_ + i, weight(load(rest)));
  }

  double sum_of_block(int64_t first) const {
    const int64_t end = std::min(first + kDrawBlock, size_);
    Vec sums = {};
    for (int64_t i = first; i < end; i += kLanes) sums += load(weights_ + i);
    return sum(sums);
  }

  double sum_of_all() const {
    double total = 0;
    for (int64_t at = 0; at < size_; at += kDrawBlock) total += sum_of_block(at);
    return total;
  }

  // Where the running sum in the order of the vocabulary exceeds `threshold` of the total: a weight above 0.
  int64_t draw_in_order(double threshold) const {
    double left = threshold * sum_of_all();
    int64_t found = 0;  // the last block that is not all zeros, where rounding leaves something at the end
    for (int64_t at = 0; at < size_; at += kDrawBlock) {
      const double of_block = sum_of_block(at);
      if (of_block > 0) found = at;
      if (of_block > left) break;
      left -= of_block;
    }
    int64_t token = found;
    for (int64_t i = found, end = std::min(found + kDrawBlock, size_); i < end; ++i) {
      if (weights_[i] == 0) continue;
      token = i;
      if (weights_[i] > left) break;
      left -= weights_[i];
    }
    return token;
  }

  // The likeliest tokens, until there are enough; or all that have a weight.
  template <typename Enough>
  void gather_until(Enough&& are_enough) {
    for (float least = kNarrowing; least > FLT_MIN; least *= kNarrowing) {
      gather(least);
      if (are_enough()) return;
    }
    gather(FLT_MIN);
  }

  // The tokens from `least` up to below `most`, in order. 0 < least.
  void gather(float least, float most = INFINITY) {
    count_ = 0;
    for (int64_t i = 0; i < size_; i += kLanes) {
      const Vec weights = load(weights_ + i);
      for (uint32_t lanes = lanes_from(weights, least) & ~lanes_from(weights, most); lanes != 0; lanes &= lanes - 1) {
        const int64_t token = i + __builtin_ctz(lanes);
        candidates_[count_++] = {weights_[token], static_cast<int32_t>(token)};
      }
    }
  }

  double sum_of_candidates() const {
    double total = 0;
    for (int64_t i = 0; i < count_; ++i) total += candidates_[i].weight;
    return total;
  }

  // Of weights of at least `least`.
  double sum_from(float least) const {
    double total = 0;
    const auto counted = [&](int64_t i) {
      const Vec weights = load(weights_ + i);
      return weights >= least ? weights : Vec{};
    };
    int64_t first = 0;
    for (; first + kDrawBlock <= size_; first += kDrawBlock) {
      Vec sums[4] = {};  // additions that do not wait for each other
      for (int64_t i = first; i < first + kDrawBlock; i += 4 * kLanes)
        for (int part = 0; part < 4; ++part) sums[part] += counted(i + part * kLanes);
      total += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    for (; first < size_; first += kLanes) total += sum(counted(first));
    return total;
  }

  template <bool kExceeds>
  static bool is_there(double total, double target) {
    return kExceeds ? total > target : total >= target;
  }

  // Among sorted candidates: where the running sum, which is `running` before them, reaches `target`, or exceeds it.
  template <bool kExceeds>
  Reached find(double running, double target) const {
    int64_t at = 0;
    for (; at < count_; ++at) {
      running += candidates_[at].weight;
      if (is_there<kExceeds>(running, target)) break;
    }
    return {candidates_[std::min(at, count_ - 1)], running};  // the last, where rounding leaves something at the end
  }

  // The same among all tokens.
  template <bool kExceeds>
  Reached halve(double target) {
    float least = FLT_MIN, most = std::nextafter(1.0f, 2.0f);  // above every weight
    double before = 0;  // of `most` or more
    for (int i = 0; i < kHalvings; ++i) {
      uint32_t low, high;
      std::memcpy(&low, &least, sizeof low);
      std::memcpy(&high, &most, sizeof high);
      const uint32_t bits = low + (high - low) / 2;
      float middle;
      std::memcpy(&middle, &bits, sizeof middle);
      const double total = sum_from(middle);
      if (is_there<kExceeds>(total, target))
        least = middle;
      else
        most = middle, before = total;
    }
    gather(least, most);
    if (count_ == 0) before = 0, gather(FLT_MIN);  // by rounding the target lies beyond the total
    std::sort(candidates_, candidates_ + count_, is_likelier);
    return find<kExceeds>(before, target);
  }

  const int64_t size_;
  float* const weights_;
  Candidate* const candidates_;
  int64_t count_ = 0;
};

}  // namespace
