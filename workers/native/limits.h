// What a processor can do at most, for whoever measures something else against it: loops that only multiply, or only
// read.
#pragma once

#include "packed.h"

namespace {

constexpr int kIndependent = kTileRows;  // sums that do not wait for each other
constexpr int kReadVectors = 8;              // likewise

// A compiler that does not know what is in `value` computes it.
template <typename Value>
[[gnu::always_inline]]
inline void keep(Value& value) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(value));
#else
  asm volatile("" : "+x"(value));
#endif
}

// add(sum) is one multiply-add of whole vectors.
template <typename Sum, typename Add>
void repeat(int64_t rounds, Add&& add) {
  Sum sums[kIndependent] = {};
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int chain = 0; chain < kIndependent; ++chain) {
      add(sums[chain]);
      keep(sums[chain]);
    }
}

// `rounds` times kIndependent products of vectors, as the linear layers of a format multiply. Returns how many numbers
// were multiplied.
inline int64_t multiply(Format format, int64_t rounds) {
#if defined(__AVX512BF16__)
  if (format == kBfloat16) {
    const __m512bh pairs = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    repeat<__m512>(rounds, [=](__m512& sum) { sum = _mm512_dpbf16_ps(sum, pairs, pairs); });
    return rounds * kIndependent * 2 * kLanes;
  }
#endif
#if defined(__AVX512VNNI__)
  if (format == kInt8 || format == kInt4) {
    const __m512i fours = _mm512_set1_epi8(1);
    repeat<__m512i>(rounds, [=](__m512i& sum) { sum = _mm512_dpbusd_epi32(sum, fours, fours); });
    return rounds * kIndependent * 4 * kLanes;
  }
#endif
  (void)format;
  Vec one = Vec{} + 1.0f;
  keep(one);
  repeat<Vec>(rounds, [=](Vec& sum) { sum += one * one; });
  return rounds * kIndependent * kLanes;
}

inline float sum_of(const float* values, int64_t count) {
  Vec sums[kReadVectors] = {};
  int64_t i = 0;
  for (; i + kReadVectors * kLanes <= count; i += kReadVectors * kLanes)
    for (int j = 0; j < kReadVectors; ++j) sums[j] += load(values + i + j * kLanes);
  float total = 0.0f;
  for (const Vec& part : sums) total += sum(part);
  for (; i < count; ++i) total += values[i];
  return total;
}

}  // namespace
