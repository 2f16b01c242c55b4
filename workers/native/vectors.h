// Vectors of floats, bfloat16, exp, and buffers that grow: what every other file here builds on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include <omp.h>
#include <sys/mman.h>
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#include <immintrin.h>
#endif

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
constexpr int64_t kQueryBlock = 48;  // queries of one head that share packed keys and values

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

inline float as_float(float value) { return value; }
inline float as_float(uint16_t value) { return bfloat16_to_float(value); }
inline void assign(float* to, float value) { *to = value; }
inline void assign(uint16_t* to, float value) { *to = float_to_bfloat16(value); }

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
