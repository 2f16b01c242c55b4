// The paged KV cache: where a token's keys and values are, and how they get there.
#pragma once

#include <type_traits>

#include "interface.h"
#include "vectors.h"

namespace {

// Numbers of one byte. A row ends in their scale, a float: what is read is number times scale.
struct Int8 {
  int8_t number;
};
struct Fp8 {
  uint8_t bits;  // e4m3 without infinities: sign, 4 bits of exponent (bias 7), 3 of mantissa
};

template <typename KV>
constexpr bool kScaled = sizeof(KV) == 1;

// A row is what one token has in one head, of the keys or of the values; in numbers.
template <typename KV>
int64_t row_size(const TwinpoolShape& d) {
  return d.head_size + (kScaled<KV> ? sizeof(float) : 0);
}

template <typename KV>
inline float scale_of(const KV* row, int64_t head) {
  float scale = 1;
  if constexpr (kScaled<KV>) std::memcpy(&scale, row + head, sizeof scale);
  return scale;
}

// kLanes bytes, signed or not.
#if defined(__AVX512F__)
template <typename Byte, typename>
inline IntVec load_bytes(const void* from) {
  const __m128i narrow = _mm_loadu_si128(static_cast<const __m128i*>(from));
  return (IntVec)(std::is_signed_v<Byte> ? _mm512_cvtepi8_epi32(narrow) : _mm512_cvtepu8_epi32(narrow));
}
#else
// In two steps: left alone, the compiler widens number by number.
template <typename Byte, typename Short>
inline IntVec load_bytes(const void* from) {
  typedef Byte Narrow __attribute__((vector_size(kLanes)));
  typedef Short Middle __attribute__((vector_size(kLanes * 2)));
  Narrow narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  return __builtin_convertvector(__builtin_convertvector(narrow, Middle), IntVec);
}
#endif

inline Vec load(const Int8* from) { return __builtin_convertvector(load_bytes<int8_t, int16_t>(from), Vec); }

// The bits moved to their places in a float32 are the number, subnormal ones too, but for the exponents' biases.
inline Vec load(const Fp8* from) {
  const IntVec bits = load_bytes<uint8_t, uint16_t>(from);
  const IntVec moved = (bits & 0x80) << 24 | (bits & 0x7f) << 20;
  Vec value;
  std::memcpy(&value, &moved, sizeof value);
  return value * 0x1p120f;
}

// Numbers i ... of a row, with its scale.
template <typename KV>
inline Vec load_scaled(const KV* row, int64_t i, int64_t head) {
  if constexpr (kScaled<KV>) return load(row + i) * scale_of(row, head);
  return load(row + i);
}

// Where block `index` of a sequence keeps the keys (part 0) or values (part 1) of one head: [block_size] rows.
template <typename KV>
inline KV* block_of(const TwinpoolShape& d, KV* cache, const TwinpoolSequence& s, int64_t index, int part, int kv_head) {
  const int64_t head = d.block_size * row_size<KV>(d);
  return cache + ((s.block_table[index] * 2 + part) * d.num_kv_heads + kv_head) * head;
}

// rows[i] = the keys or values of token `first` + i, for `count` tokens; the last one again up to `padded`.
template <typename KV>
void find_rows(const TwinpoolShape& d, KV* cache, const TwinpoolSequence& s, int part, int kv_head, int64_t first,
               int64_t count, int64_t padded, const KV** rows) {
  const int64_t size = row_size<KV>(d);
  for (int64_t i = 0; i < count;) {
    const int64_t index = (first + i) / d.block_size, offset = (first + i) % d.block_size;
    const KV* row = block_of(d, cache, s, index, part, kv_head) + offset * size;
    for (const int64_t end = std::min<int64_t>(count, i + d.block_size - offset); i < end; ++i, row += size)
      rows[i] = row;
  }
  for (int64_t i = count; i < padded; ++i) rows[i] = rows[count - 1];
}

// kVecs * kLanes numbers of the cache, in the order that is cheapest; store_some() puts them back in theirs.
template <int kVecs, typename KV>
inline void load_some(const KV* from, Vec* to) {
#pragma GCC unroll 4
  for (int j = 0; j < kVecs; ++j) to[j] = load(from + j * kLanes);
}

template <int kVecs, typename KV>
inline void store_some(const Vec* from, float* to) {
  for (int j = 0; j < kVecs; ++j) {
    if constexpr (std::is_same_v<KV, uint16_t> && kVecs % 2 == 0) {  // numbers 0, 2, 4, ... and 1, 3, 5, ...
      const Vec even = from[j / 2 * 2], odd = from[j / 2 * 2 + 1];
      const int first = j % 2 * kLanes / 2;
      store(to + j * kLanes, shuffled(even, odd, [first](int i) { return first + i / 2 + i % 2 * kLanes; }));
    } else {
      store(to + j * kLanes, from[j]);
    }
  }
}

// bfloat16 is the upper half of a float32: numbers at even places are shifted up, at odd places they are there.
template <>
inline void load_some<4, uint16_t>(const uint16_t* from, Vec* to) {
#pragma GCC unroll 2
  for (int j = 0; j < 4; j += 2) {
    IntVec both;
    std::memcpy(&both, from + j * kLanes, sizeof both);
    const IntVec even = both << 16, odd = both & static_cast<int32_t>(0xffff0000);
    std::memcpy(&to[j], &even, sizeof even);
    std::memcpy(&to[j + 1], &odd, sizeof odd);
  }
}

inline void write_row(float* to, const float* from, int64_t size) { std::memcpy(to, from, size * sizeof(float)); }

inline void write_row(uint16_t* to, const float* from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = float_to_bfloat16(from[i]);
}

inline void round_number(Int8* to, float scaled) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = scaled + kRound;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  to->number = static_cast<int8_t>(bits - 0x4B400000);
}

inline void round_number(Fp8* to, float scaled) {
  const float moved = scaled * 0x1p-120f;  // as in load()
  uint32_t bits;
  std::memcpy(&bits, &moved, sizeof bits);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t rounded = (magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  to->bits = static_cast<uint8_t>(std::min<uint32_t>(rounded, 0x7e) | (bits >> 24 & 0x80));
}

inline float largest_number(const Int8*) { return 127.0f; }
inline float largest_number(const Fp8*) { return 448.0f; }

// With the scale that fits the largest number; NaN and infinity go on in it. kvcache/rows.py does the same.
template <typename KV>
void write_row(KV* to, const float* from, int64_t size) {
  uint32_t highest_bits = 0;  // of non-negative floats the order is that of their bits, which vectorizes
  for (int64_t i = 0; i < size; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    highest_bits = std::max(highest_bits, bits & 0x7fffffffu);
  }
  float highest;
  std::memcpy(&highest, &highest_bits, sizeof highest);
  float scale = highest / largest_number(to);
  if (scale == 0) scale = 1;
  if (!std::isfinite(highest)) scale = NAN;
  std::memcpy(static_cast<void*>(to + size), &scale, sizeof scale);
  for (int64_t i = 0; i < size; ++i) round_number(to + i, from[i] / scale);
}

// One head's keys and values of tokens first .. first + count - 1 of a sequence's new ones.
template <typename KV>
void write_head(const TwinpoolShape& d, KV* cache, const TwinpoolSequence& s, int kv_head, int64_t first, int64_t count,
                const float* key, const float* value) {
  const int64_t stride = static_cast<int64_t>(d.num_kv_heads) * d.head_size, size = row_size<KV>(d);
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t index = (s.start + i) / d.block_size, offset = (s.start + i) % d.block_size;
    const int64_t from = (s.first_row + i) * stride + kv_head * d.head_size;
    for (int part = 0; part < 2; ++part) {
      KV* block = block_of(d, cache, s, index, part, kv_head);
      // The first token of a block: nothing of an earlier owner stays, here or in a handoff.
      if (offset == 0) std::memset(static_cast<void*>(block), 0, d.block_size * size * sizeof(KV));
      write_row(block + offset * size, (part == 0 ? key : value) + from, d.head_size);
    }
  }
}

}  // namespace
