// The inner kernels: some rows of activations times one panel of weights.
#pragma once

#include "activations.h"

namespace {

// Fetches into the second-level cache what a kernel's caller reads next, a step of it with every step of the kernel,
// so that reading and arithmetic overlap. Fetches nothing new where there is no `next`, and nothing at all for few rows:
// there reading takes all of the time, and the processor's own prefetching, which such requests displace, is half as
// fast again.
constexpr int kUnfetchedRows = 5;

template <int kRows>
class Ahead {
 public:
  Ahead(const void* next, const void* present) : at_(static_cast<const char*>(next)), step_(next != nullptr ? 1 : 0) {
    if (next == nullptr) at_ = static_cast<const char*>(present);
  }

  void fetch(int num_bytes) {
    if constexpr (kRows <= kUnfetchedRows) return;
    for (int line = 0; line < num_bytes; line += 64) __builtin_prefetch(at_ + line, 0, 2);
    at_ += step_ * num_bytes;
  }

 private:
  const char* at_;
  int64_t step_;
};

// The same number one row on. The compiler must not know how it comes about: it would keep a pointer for each row of a
// tile, which are more than there are registers, and moving them about cost a tenth of float32's rate.
template <typename T>
inline const T* next_row(const T* at, int64_t stride) {
  asm("" : "+r"(stride));
  return at + stride;
}

// The kernels are not inlined: among their callers' variables the compiler spills accumulators, at half the speed.

// c[rows][kPanel] (+)= a[rows][depth] * panel[depth][kPanel]
template <int kRows, bool kAccumulate>
[[gnu::noinline]]
void tile(const float* a, int64_t a_stride, const float* panel, int64_t depth, float* c, int64_t c_stride,
          const float* next) {
  Vec left[kRows] = {}, right[kRows] = {};
  Ahead<kRows> ahead(next, panel);
  for (int64_t k = 0; k < depth; ++k, ++a) {
    const Vec b0 = load(panel + k * kPanel), b1 = load(panel + k * kPanel + kLanes);
    ahead.fetch(kPanel * sizeof(float));
    const float* at = a;
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row, at = next_row(at, a_stride)) {
      const float value = *at;
      left[row] += value * b0;
      right[row] += value * b1;
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
    float* out = c + row * c_stride;
    if (kAccumulate) {
      left[row] += load(out);
      right[row] += load(out + kLanes);
    }
    store(out, left[row]);
    store(out + kLanes, right[row]);
  }
}

template <bool kAccumulate, int kRows = kTileRows>
void tile_of(int64_t rows, const float* a, int64_t a_stride, const float* panel, int64_t depth, float* c,
             int64_t c_stride, const float* next = nullptr) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<kAccumulate, kRows - 1>(rows, a, a_stride, panel, depth, c, c_stride, next);
  }
  tile<kRows, kAccumulate>(a, a_stride, panel, depth, c, c_stride, next);
}

// A tile of int8 activations, as Activations lays them out.
struct Tile8 {
  const Rounded* rows;
  const float* scales;
  const int32_t* starts;
  const float* sums;
};

// Half a panel of int8 or int4 weights.
struct Half8 {
  const uint8_t* weights;
  const uint16_t* scales;
  int64_t num_groups;
  const uint8_t* next;
};

inline IntVec load_integers(const void* from) {
  IntVec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline IntVec broadcast_pair(const void* from) {
  int32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return IntVec{} + pair;
}

#if defined(__AVX512BF16__)

// In assembler because the compiler, given the intrinsics, copies every accumulator once per product and spills.
inline void add_products(__m512& sums, __m512i pairs, __m512i weights) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(pairs), "v"(weights));
}

// out[kRows][kPanel] = a * panel, with the products of pairs of the instruction set. Attention uses it too.
template <int kRows>
[[gnu::noinline]]
void tile16(const uint16_t* a, int64_t a_stride, const uint16_t* panel, int64_t depth, float* out,
            int64_t out_stride, const uint16_t* next = nullptr) {
  __m512 left[kRows], right[kRows];
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) left[row] = right[row] = _mm512_setzero_ps();
  Ahead<kRows> ahead(next, panel);
  for (int64_t k = 0; k < depth; k += 2) {
    const __m512i b0 = _mm512_loadu_si512(panel + k * kPanel), b1 = _mm512_loadu_si512(panel + k * kPanel + 32);
    ahead.fetch(128);
    const uint16_t* at = a + k;
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row, at = next_row(at, a_stride)) {
      int32_t pair;
      std::memcpy(&pair, at, sizeof pair);
      const __m512i value = _mm512_set1_epi32(pair);
      add_products(left[row], value, b0);
      add_products(right[row], value, b1);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
    _mm512_storeu_ps(out + row * out_stride, left[row]);
    _mm512_storeu_ps(out + row * out_stride + 16, right[row]);
  }
}

#else

// The same without them: a bfloat16 is the upper half of a float32.
inline Vec widened(IntVec pairs, int which) {
  pairs = which == 0 ? pairs << 16 : pairs & static_cast<int32_t>(0xffff0000);
  Vec value;
  std::memcpy(&value, &pairs, sizeof value);
  return value;
}

template <int kRows>
[[gnu::noinline]]
void tile16(const uint16_t* a, int64_t a_stride, const uint16_t* panel, int64_t depth, float* out,
            int64_t out_stride, const uint16_t* next = nullptr) {
  Vec left[kRows] = {}, right[kRows] = {};
  Ahead<kRows> ahead(next, panel);
  for (int64_t k = 0; k < depth; k += 2) {
    ahead.fetch(2 * kPanel * sizeof(uint16_t));
#pragma GCC unroll 2
    for (int which = 0; which < 2; ++which) {
      const Vec b0 = widened(load_integers(panel + k * kPanel), which);
      const Vec b1 = widened(load_integers(panel + (k + 1) * kPanel), which);
#pragma GCC unroll 12
      for (int row = 0; row < kRows; ++row) {
        const Vec value = widened(broadcast_pair(a + row * a_stride + k), which);
        left[row] += value * b0;
        right[row] += value * b1;
      }
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
    store(out + row * out_stride, left[row]);
    store(out + row * out_stride + kLanes, right[row]);
  }
}

#endif

#if defined(__AVX512VNNI__)

inline void add_products(__m512i& sums, __m512i weights, const int32_t& four) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(weights), "m"(four));
}

// Products of few rows go to several sums in turn, for each waits for the one before it; of integers the order does not
// matter.
template <int kRows>
constexpr int kChains = kRows <= 2 ? 4 : 1;

// out[kRows][.] of half a panel. One vector wide and many rows high: sums of integers and of floats share registers.
template <int kRows>
[[gnu::noinline]]
void tile8(const Tile8& a, const Half8& b, float* out) {
  constexpr int kSums = kChains<kRows>;
  const int32_t* fours = reinterpret_cast<const int32_t*>(a.rows);
  const uint8_t* weights = b.weights;
  __m512 totals[kRows];
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) totals[row] = _mm512_setzero_ps();
  Ahead<kRows> ahead(b.next, b.weights);
  for (int64_t group = 0; group < b.num_groups; ++group) {
    __m512i sums[kRows][kSums];
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      sums[row][0] = _mm512_set1_epi32(a.starts[group * kRows + row]);
#pragma GCC unroll 4
      for (int chain = 1; chain < kSums; ++chain) sums[row][chain] = _mm512_setzero_si512();
    }
#pragma GCC unroll 2
    for (int four = 0; four < kFours; four += kSums) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kSums; ++chain, weights += 64, fours += kRows) {
        const __m512i values = _mm512_loadu_si512(weights);
        ahead.fetch(64);
#pragma GCC unroll 12
        for (int row = 0; row < kRows; ++row) add_products(sums[row][chain], values, fours[row]);
      }
    }
    const __m512 scale = (__m512)load(b.scales + group * 16);
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int chain = 1; chain < kSums; ++chain) sums[row][0] = _mm512_add_epi32(sums[row][0], sums[row][chain]);
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(a.scales[group * kRows + row]));
      totals[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[row][0]), both, totals[row]);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) _mm512_storeu_ps(out + row * kPanel, totals[row]);
}

// The same of int4: a weight is minimum + scale * value, so a group adds the minimum times the sum of the activations.
template <int kRows>
[[gnu::noinline]]
void tile4(const Tile8& a, const Half8& b, float* out) {
  const int32_t* fours = reinterpret_cast<const int32_t*>(a.rows);
  const uint8_t* weights = b.weights;
  const __m512i low = _mm512_set1_epi8(15);
  __m512 totals[kRows];
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) totals[row] = _mm512_setzero_ps();
  Ahead<kRows> ahead(b.next, b.weights);
  for (int64_t part = 0; part < 2 * b.num_groups; ++part) {
    __m512i sums[kRows];
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) sums[row] = _mm512_setzero_si512();
    for (int pair = 0; pair < kFours / 4; ++pair, weights += 64, fours += 2 * kRows) {
      const __m512i both = _mm512_loadu_si512(weights);
      const __m512i first = _mm512_and_si512(both, low), second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      ahead.fetch(64);
#pragma GCC unroll 12
      for (int row = 0; row < kRows; ++row) add_products(sums[row], first, fours[row]);
#pragma GCC unroll 12
      for (int row = 0; row < kRows; ++row) add_products(sums[row], second, fours[kRows + row]);
    }
    const __m512 scale = (__m512)load(b.scales + part * 32), minimum = (__m512)load(b.scales + part * 32 + 16);
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(a.scales[part / 2 * kRows + row]));
      totals[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[row]), both, totals[row]);
      totals[row] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(a.sums[part * kRows + row]), totals[row]);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) _mm512_storeu_ps(out + row * kPanel, totals[row]);
}

#else

// The same sums without products of bytes: values are widened to 16 bits, whose products of pairs are added in 32.
inline IntVec products_of_pairs(IntVec a, IntVec b) {
#if defined(__AVX512BW__)
  return (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

// The 16-bit numbers of `bytes`, shifted right, and of them the bits of `mask`.
inline IntVec shifted(IntVec bytes, int shift, int mask) {
  typedef uint16_t Shorts __attribute__((vector_size(kLanes * 4)));
  return (IntVec)((Shorts)bytes >> shift & static_cast<uint16_t>(mask));
}

// Adds to each row's sums one pair of a four of it.
template <int kRows>
[[gnu::always_inline]]
inline void add_pairs(IntVec (&sums)[kRows], IntVec weights, const Rounded* pair) {
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) sums[row] += products_of_pairs(weights, broadcast_pair(pair + row * 4));
}

template <int kRows>
[[gnu::noinline]]
void tile8(const Tile8& a, const Half8& b, float* out) {
  const Rounded* fours = a.rows;
  const uint8_t* weights = b.weights;
  Vec totals[kRows] = {};
  Ahead<kRows> ahead(b.next, b.weights);
  for (int64_t group = 0; group < b.num_groups; ++group) {
    IntVec sums[kRows];
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) sums[row] = IntVec{} + a.starts[group * kRows + row];
    for (int four = 0; four < kFours; ++four, weights += kLanes * 4, fours += kRows * 4) {
      const IntVec values = load_integers(weights);
      ahead.fetch(kLanes * 4);
      add_pairs(sums, shifted(values, 0, 255), fours);
      add_pairs(sums, shifted(values, 8, 255), fours + 2);
    }
    const Vec scale = load(b.scales + group * kLanes);
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row)
      totals[row] += __builtin_convertvector(sums[row], Vec) * (scale * a.scales[group * kRows + row]);
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) store(out + row * kPanel, totals[row]);
}

template <int kRows>
[[gnu::noinline]]
void tile4(const Tile8& a, const Half8& b, float* out) {
  const Rounded* fours = a.rows;
  const uint8_t* weights = b.weights;
  Vec totals[kRows] = {};
  Ahead<kRows> ahead(b.next, b.weights);
  for (int64_t part = 0; part < 2 * b.num_groups; ++part) {
    IntVec sums[kRows] = {};
    for (int pair = 0; pair < kFours / 4; ++pair, weights += kLanes * 4, fours += 2 * kRows * 4) {
      const IntVec both = load_integers(weights);
      ahead.fetch(kLanes * 4);
      add_pairs(sums, shifted(both, 0, 15), fours);
      add_pairs(sums, shifted(both, 8, 15), fours + 2);
      add_pairs(sums, shifted(both, 4, 15), fours + kRows * 4);
      add_pairs(sums, shifted(both, 12, 15), fours + kRows * 4 + 2);
    }
    const Vec scale = load(b.scales + part * 2 * kLanes), minimum = load(b.scales + part * 2 * kLanes + kLanes);
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      totals[row] += __builtin_convertvector(sums[row], Vec) * (scale * a.scales[part / 2 * kRows + row]);
      totals[row] += minimum * a.sums[part * kRows + row];
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) store(out + row * kPanel, totals[row]);
}

#endif

template <int kRows = kTileRows>
void tile16_of(int64_t rows, const uint16_t* a, int64_t a_stride, const uint16_t* panel, int64_t depth, float* out,
               const uint16_t* next) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile16_of<kRows - 1>(rows, a, a_stride, panel, depth, out, next);
  }
  tile16<kRows>(a, a_stride, panel, depth, out, kPanel, next);
}

template <Format kFormat, int kRows = kTileRows>
void tile8_of(int64_t rows, const Tile8& a, const Half8& b, float* out) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile8_of<kFormat, kRows - 1>(rows, a, b, out);
  }
  kFormat == kInt8 ? tile8<kRows>(a, b, out) : tile4<kRows>(a, b, out);
}

template <Format kFormat>
void product8(const Linear& layer, const Activations& x, int64_t first, int64_t rows, int64_t p, bool fetches,
              float* out) {
  const int64_t groups = layer.num_groups(), at = first * groups;
  const Tile8 a = {x.rows8 + first * x.stride, x.scales8 + at, x.starts8 + at, x.sums4 + 2 * at};
  for (int64_t half = 2 * p; half < 2 * p + 2; ++half) {
    const Half8 b = {layer.half8(half), layer.half_scales(half), groups, fetches ? layer.half8(half + 1) : nullptr};
    tile8_of<kFormat>(rows, a, b, out + half % 2 * kLanes);
  }
}

// out[rows][kPanel] = rows `first` ... of x, one tile of them, times panel p of W, bias not added. `fetches`: whether
// panel p + 1 is read next.
inline void product(const Linear& layer, const Activations& x, int64_t first, int64_t rows, int64_t p, bool fetches,
                    float* out) {
  const int64_t depth = layer.padded_depth();
  switch (layer.format) {
    case kFloat32:
      tile_of<false>(rows, x.rows32 + first * x.stride, x.stride, layer.panel(p), depth, out, kPanel,
                     fetches ? layer.panel(p + 1) : nullptr);
      return;
    case kBfloat16:
      tile16_of(rows, x.rows16 + first * x.stride, x.stride, layer.panel16(p), depth, out,
                fetches ? layer.panel16(p + 1) : nullptr);
      return;
    case kInt8:
      product8<kInt8>(layer, x, first, rows, p, fetches, out);
      return;
    case kInt4:
      product8<kInt4>(layer, x, first, rows, p, fetches, out);
  }
}

}  // namespace
