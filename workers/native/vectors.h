// Vectors of floats, bfloat16, exp, and buffers that grow: what every other file here builds on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include <sys/mman.h>
#include <immintrin.h>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileRows = 12;  // 24 of 32 registers accumulate
#else
constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 12 of 16
#endif
constexpr int kPanel = 2 * kLanes;
constexpr int64_t kRowBlock = 144;  // rows of activations that stay in the second-level cache

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

// Adds the halves onto each other until one lane is left.
template <int kWidth = kLanes>
inline float sum(const float* value) {
  if constexpr (kWidth == 1) {
    return value[0];
  } else {
    typedef float Half __attribute__((vector_size(kWidth * 2)));
    Half low, high;
    std::memcpy(&low, value, sizeof low);
    std::memcpy(&high, value + kWidth / 2, sizeof high);
    low += high;
    return sum<kWidth / 2>(reinterpret_cast<const float*>(&low));
  }
}

inline float sum(Vec value) { return sum<kLanes>(reinterpret_cast<const float*>(&value)); }

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float largest(Vec value) {
  float result = value[0];
  for (int lane = 1; lane < kLanes; ++lane) result = std::max(result, value[lane]);
  return result;
}

// Lanes of two vectors in another order: `source(lane)` counts through the first, then through the second.
template <typename Source>
inline Vec shuffled(Vec a, Vec b, Source source) {
  IntVec mask;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) mask[lane] = source(lane);
  return __builtin_shuffle(a, b, mask);
}

// Four vectors to one: in every four lanes, the sums of the four vectors over those lanes. Each of the shuffles is one
// instruction that stays inside four lanes.
inline Vec sum_quarters(const Vec* values) {
  Vec halves[2];
  for (int i = 0; i < 2; ++i) {
    const Vec a = values[i * 2], b = values[i * 2 + 1];
    halves[i] = shuffled(a, b, [](int lane) { return lane / 4 * 4 + lane % 4 / 2 + lane % 2 * kLanes; }) +
                shuffled(a, b, [](int lane) { return lane / 4 * 4 + lane % 4 / 2 + lane % 2 * kLanes + 2; });
  }
  return shuffled(halves[0], halves[1], [](int lane) { return lane / 4 * 4 + lane % 2 + lane % 4 / 2 * kLanes; }) +
         shuffled(halves[0], halves[1], [](int lane) { return lane / 4 * 4 + lane % 2 + lane % 4 / 2 * kLanes + 2; });
}

// kLanes / 4 results of sum_quarters to one vector: lane i has the whole sum of vector i.
inline Vec sum_lanes(const Vec* quarters) {
  // Even and odd fours of lanes of a, then of b.
  const auto even = [](int lane) { return lane / 4 * 8 + lane % 4; };
  const auto odd = [](int lane) { return lane / 4 * 8 + lane % 4 + 4; };
  Vec a = shuffled(quarters[0], quarters[1], even) + shuffled(quarters[0], quarters[1], odd);
#if defined(__AVX512F__)
  Vec b = shuffled(quarters[2], quarters[3], even) + shuffled(quarters[2], quarters[3], odd);
  a = shuffled(a, b, even) + shuffled(a, b, odd);
#endif
  return a;
}

inline float bfloat16_to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Round to nearest, ties to even; a NaN stays one.
inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Vec load(const uint16_t* from) {
  typedef uint16_t Narrow __attribute__((vector_size(kLanes * 2)));
  typedef uint32_t Wide __attribute__((vector_size(kLanes * 4)));
  Narrow narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  const Wide wide = __builtin_convertvector(narrow, Wide) << 16;
  Vec value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// exp to about 2 units in the last place: 2^n * p(r), with the polynomial of Cephes' expf (Moshier, 1989).
inline Vec exponential(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x;
  x = x > 88.0f ? Vec{} + 88.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IntVec exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent - 0x4B400000 + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
}

// Whether there are instructions that multiply pairs of bfloat16 and add them in float32.
#if defined(__AVX512BF16__)
constexpr bool kHasPairProducts = true;

// 32 numbers as bfloat16, rounded to nearest: `low` in the lower half.
inline __m512i to_bfloat16(Vec low, Vec high) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

inline void copy_query(const float* from, int64_t head, uint16_t* to) {
  for (int64_t i = 0; i < head; i += kLanes)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh((__m512)load(from + i)));
}
#else
constexpr bool kHasPairProducts = false;
#endif

inline void copy_query(const float* from, int64_t head, float* to) { std::memcpy(to, from, head * sizeof(float)); }

// 2^x to 1e-7 of itself, for x <= 0; ends at 2^-126. NaN stays one.
inline Vec power_of_two(Vec x) {
  x = x < -126.0f ? Vec{} - 126.0f : x;
  constexpr float kRound = 12582912.0f + 127;  // 1.5 * 2^23: adding it rounds to an integer; 127: an exponent's bias
  const Vec shifted = x + kRound;
  const Vec r = x - (shifted - kRound);
  Vec p = Vec{} + 1.3276467e-3f;  // least relative error over [-0.5, 0.5]
  p = p * r + 9.6755410e-3f;
  p = p * r + 5.5507135e-2f;
  p = p * r + 2.4022120e-1f;
  p = p * r + 6.9314694e-1f;
  p = p * r + 1.0000001f;
  IntVec exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent <<= 23;
  Vec scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
}

constexpr float kLog2E = 1.44269504f;

// A buffer that only grows.
template <typename T = float>
class Scratch {
 public:
  T* get(int64_t size) {
    if (static_cast<int64_t>(data_.size()) < size) data_.resize(size);
    return data_.data();
  }

 private:
  std::vector<T> data_;
};

}  // namespace
