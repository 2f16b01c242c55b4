// The likeliest token of a row of logits, in one pass that also sees whether the row is usable.
#pragma once

#include "vectors.h"

#include <limits>

namespace {

constexpr int64_t kLikeliestBlock = 16 * kLanes;

// Every lane's larger number, or NaN once one of the two was.
inline Vec larger_or_nan(Vec a, Vec b) { return (a > b) | (a != a) ? a : b; }

inline float largest_or_nan(const float* values, int64_t count) {
  float result = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i)
    if (!(values[i] <= result)) {
      result = values[i];
      if (result != result) break;
    }
  return result;
}

// The largest of kLikeliestBlock numbers, or NaN.
inline float largest_of_block(const float* values) {
  Vec maxima[4];
  for (int i = 0; i < 4; ++i) maxima[i] = load(values + i * kLanes);
  for (int64_t i = 4 * kLanes; i < kLikeliestBlock; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) maxima[j] = larger_or_nan(maxima[j], load(values + i + j * kLanes));
  const Vec all = larger_or_nan(larger_or_nan(maxima[0], maxima[1]), larger_or_nan(maxima[2], maxima[3]));
  return largest_or_nan(reinterpret_cast<const float*>(&all), kLanes);
}

// The first index of the maximum; -1 where there is a NaN or an infinity, or -inf alone.
inline int64_t likeliest(const float* logits, int64_t size) {
  float best = -std::numeric_limits<float>::infinity();
  int64_t first = 0, end = 0;  // of the block that has it
  for (int64_t block = 0; block < size; block += kLikeliestBlock) {
    const int64_t block_end = std::min(block + kLikeliestBlock, size);
    const bool is_whole = block_end - block == kLikeliestBlock;
    const float found = is_whole ? largest_of_block(logits + block) : largest_or_nan(logits + block, block_end - block);
    if (found != found) return -1;
    if (found > best) best = found, first = block, end = block_end;
  }
  if (!std::isfinite(best)) return -1;
  return std::find(logits + first, logits + end, best) - logits;
}

}  // namespace
