// Normalization and rotary embedding of single rows.
#pragma once

#include "vectors.h"

namespace {

inline void rms_norm(const float* x, const std::vector<float>& weight, float epsilon, int64_t size, float* out) {
  Vec squares = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < size; ++i) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(size) + epsilon);
  for (i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

// Turns pairs (i, i + size/2) by the position's angle (Su et al.: RoFormer, 2021), in the half-split layout.
inline void rotate(float* x, const float* cosine, const float* sine, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cosine[i] - second * sine[i];
    x[i + half] = second * cosine[i + half] + first * sine[i + half];
  }
}

}  // namespace
