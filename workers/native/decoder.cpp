// One step of a decoder-only transformer on a CPU, in one call: embedding, every layer, final norm, logits.
//
// Built several times from this file, once per instruction set (see setup.py); workers/native/library.py chooses at
// run time. Vectors are GCC vector extensions, so the same source gives AVX2, AVX-512 or NEON code.
//
// A linear layer's weights are packed into panels of kPanel output columns, k-major:
//
//     panel p:  [k = 0: w[p*kPanel + 0 .. kPanel-1][0]]  [k = 1: ...]  ...  [k = K-1: ...]
//
// so that a small batch streams them from memory once, in order, and a large one reuses a panel from the cache
// (Goto, van de Geijn: Anatomy of High-Performance Matrix Multiplication, TOMS 2008). Attention packs keys and
// values of a prompt into the same panels and runs on the same inner kernel.

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

// c[rows][kPanel] (+)= a[rows][depth] * panel[depth][kPanel]
template <int kRows, bool kAccumulate>
void tile(const float* a, int64_t a_stride, const float* panel, int64_t depth, float* c, int64_t c_stride) {
  Vec left[kRows] = {}, right[kRows] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = load(panel + k * kPanel), b1 = load(panel + k * kPanel + kLanes);
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      const float value = a[row * a_stride + k];
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
             int64_t c_stride) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<kAccumulate, kRows - 1>(rows, a, a_stride, panel, depth, c, c_stride);
  }
  tile<kRows, kAccumulate>(a, a_stride, panel, depth, c, c_stride);
}

int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Weights in large pages where the system gives them: a step reads all of them, and small pages cost a look-up each.
template <typename T>
struct LargePages {
  using value_type = T;
  LargePages() = default;
  template <typename U>
  LargePages(const LargePages<U>&) {}

  T* allocate(size_t count) {
    constexpr size_t kPage = 2 << 20;
    const size_t size = (count * sizeof(T) + kPage - 1) / kPage * kPage;
    void* memory = std::aligned_alloc(kPage, size);
    if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(memory, size, MADV_HUGEPAGE);
#endif
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { std::free(memory); }
  bool operator==(const LargePages&) const { return true; }
  bool operator!=(const LargePages&) const { return false; }
};

template <typename T>
using Weights = std::vector<T, LargePages<T>>;

enum Format { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

// How many values of one column lie side by side, so that one instruction multiplies and adds them.
constexpr int kInterleave[] = {1, 2, 4};
// int8: so many values along the depth share a scale. Activations have outliers: with one scale per row the default
// model's perplexity rises by 4 %, with one per 64 values by less than 1 %.
constexpr int kScaleGroup = 64;
constexpr int kDepthMultiple[] = {1, 2, kScaleGroup};

// A linear layer y = x W^T + b with W of [columns][depth], in one of three formats:
//   float32   panels as above
//   bfloat16  panels of pairs:  [k/2][column][2]; products of bfloat16, sums in float32
//   int8      panels of fours:  [k/4][column][4], a scale per column and 64 values; activations are rounded to 8 bits
//             with a scale per row and 64 values (dynamic quantization), sums of 64 in int32, of those in float32
struct Linear {
  int64_t columns = 0, depth = 0;
  Format format = kFloat32;
  Weights<float> packed;
  Weights<uint16_t> packed16;
  Weights<int8_t> packed8;
  std::vector<float> scales;     // int8: [panel][group][kPanel]
  std::vector<int32_t> offsets;  // int8: the same; minus 128 times the sum of the group, which unsigned activations add
  std::vector<float> bias;  // empty, or padded to whole panels

  int64_t padded_depth() const {
    return (depth + kDepthMultiple[format] - 1) / kDepthMultiple[format] * kDepthMultiple[format];
  }

  int64_t num_groups() const { return padded_depth() / kScaleGroup; }

  void pack(const float* weight, int64_t new_columns, int64_t new_depth, Format new_format) {
    columns = new_columns;
    depth = new_depth;
    format = new_format;
    const int64_t num_panels = panels_of(columns);
    if (format == kFloat32) packed.assign(num_panels * kPanel * depth, 0.0f);
    if (format == kBfloat16) packed16.assign(num_panels * kPanel * padded_depth(), 0);
    if (format == kInt8) {
      packed8.assign(num_panels * kPanel * padded_depth(), 0);
      scales.assign(num_panels * num_groups() * kPanel, 1.0f);
      offsets.assign(num_panels * num_groups() * kPanel, 0);
    }
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < num_panels; ++p) {
      const int64_t width = std::min<int64_t>(kPanel, columns - p * kPanel);
      if (format == kInt8) {
        pack8(p, width, weight);
        continue;
      }
      const int64_t group = kInterleave[format], base = p * kPanel * padded_depth();
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t row = base + k / group * kPanel * group + k % group;
        for (int64_t column = 0; column < width; ++column) {
          const float value = weight[(p * kPanel + column) * depth + k];
          if (format == kFloat32) packed[row + column] = value;
          if (format == kBfloat16) packed16[row + column * 2] = float_to_bfloat16(value);
        }
      }
    }
  }

  void pack8(int64_t p, int64_t width, const float* weight) {
    int8_t* panel = packed8.data() + p * kPanel * padded_depth();
    for (int64_t group = 0; group < num_groups(); ++group) {
      const int64_t first = group * kScaleGroup, last = std::min<int64_t>(depth, first + kScaleGroup);
      for (int64_t column = 0; column < width; ++column) {
        const float* from = weight + (p * kPanel + column) * depth;
        float highest = 0;
        for (int64_t k = first; k < last; ++k) highest = std::max(highest, std::fabs(from[k]));
        const float scale = highest > 0 ? highest / 127.0f : 1.0f;
        int32_t total = 0;
        for (int64_t k = first; k < last; ++k) {
          const int8_t value = static_cast<int8_t>(std::nearbyint(from[k] / scale));
          panel[(k / 4 * kPanel + column) * 4 + k % 4] = value;
          total += value;
        }
        scales[(p * num_groups() + group) * kPanel + column] = scale;
        offsets[(p * num_groups() + group) * kPanel + column] = -128 * total;
      }
    }
  }

  const float* panel(int64_t index) const { return packed.data() + index * kPanel * depth; }

  // Row `column` of W: how tied embeddings are read without a second copy.
  void row(int64_t column, float* to) const {
    const float* from = panel(column / kPanel) + column % kPanel;
    for (int64_t k = 0; k < depth; ++k) to[k] = from[k * kPanel];
  }
};

// The rows of x as a linear layer's format wants them.
struct Activations {
  const float* rows32 = nullptr;
  const uint16_t* rows16 = nullptr;
  const uint8_t* rows8 = nullptr;
  const float* scales8 = nullptr;  // [row][group]
  int64_t stride = 0;
};

class Converter {
 public:
  Activations convert(const float* x, int64_t rows, int64_t depth, Format format, int num_threads) {
    const int64_t multiple = kDepthMultiple[format], stride = (depth + multiple - 1) / multiple * multiple;
    const int64_t num_groups = stride / kScaleGroup;
    Activations out;
    out.stride = stride;
    if (format == kFloat32) {
      out.rows32 = x;
      return out;
    }
    uint16_t* rows16 = rows16_.get(format == kBfloat16 ? rows * stride : 0);
    uint8_t* rows8 = rows8_.get(format == kInt8 ? rows * stride : 0);
    float* scales = scales_.get(format == kInt8 ? rows * num_groups : 0);
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = x + row * depth;
      if (format == kBfloat16) {
        uint16_t* to = rows16 + row * stride;
        for (int64_t k = 0; k < depth; ++k) to[k] = float_to_bfloat16(from[k]);
        std::fill(to + depth, to + stride, uint16_t{0});
      } else {
        for (int64_t group = 0; group < num_groups; ++group)
          quantize(from + group * kScaleGroup, std::min<int64_t>(kScaleGroup, depth - group * kScaleGroup),
                   rows8 + row * stride + group * kScaleGroup, scales + row * num_groups + group);
      }
    }
    out.rows16 = rows16;
    out.rows8 = rows8;
    out.scales8 = scales;
    return out;
  }

 private:
  // Symmetric, 128 added: the instruction wants unsigned activations.
  static void quantize(const float* from, int64_t size, uint8_t* to, float* scale) {
    uint32_t highest_bits = 0;  // of non-negative floats the order is that of their bits, which vectorizes
    for (int64_t k = 0; k < size; ++k) {
      uint32_t bits;
      std::memcpy(&bits, from + k, sizeof bits);
      highest_bits = std::max(highest_bits, bits & 0x7fffffffu);
    }
    float highest;
    std::memcpy(&highest, &highest_bits, sizeof highest);
    *scale = highest > 0 ? highest / 127.0f : 1.0f;
    if (!(highest <= 3.0e38f)) {  // NaN and infinity go on in the scale, and so into the result
      *scale = NAN;
      std::fill(to, to + kScaleGroup, uint8_t{128});
      return;
    }
    const float inverse = 1.0f / *scale;
    constexpr float kRound = 12582912.0f;
    for (int64_t k = 0; k < size; ++k) {
      const float shifted = from[k] * inverse + kRound;
      int32_t bits;
      std::memcpy(&bits, &shifted, sizeof bits);
      to[k] = static_cast<uint8_t>(bits - 0x4B400000 + 128);
    }
    std::fill(to + size, to + kScaleGroup, uint8_t{128});
  }

  Scratch<uint16_t> rows16_;
  Scratch<uint8_t> rows8_;
  Scratch<float> scales_;
};

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)

// In assembler because the compiler, given the intrinsics, copies every accumulator once per product and spills.
inline void add_products(__m512& sums, __m512i pairs, __m512i weights) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(pairs), "v"(weights));
}

inline void add_products(__m512i& sums, __m512i fours, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(fours), "v"(weights));
}

// out[kRows][kPanel] = a * panel, with the pair and four-fold products of the instruction set.
template <int kRows>
void tile16(const uint16_t* a, int64_t a_stride, const uint16_t* panel, int64_t depth, float* out, int64_t out_stride) {
  __m512 left[kRows], right[kRows];
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) left[row] = right[row] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2) {
    const __m512i b0 = _mm512_loadu_si512(panel + k * kPanel), b1 = _mm512_loadu_si512(panel + k * kPanel + 32);
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      int32_t pair;
      std::memcpy(&pair, a + row * a_stride + k, sizeof pair);
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

template <int kRows>
void tile8(const uint8_t* a, int64_t a_stride, const float* a_scales, const Linear& layer, int64_t p, float* out) {
  const int64_t num_groups = layer.num_groups();
  const int8_t* panel = layer.packed8.data() + p * kPanel * layer.padded_depth();
  __m512 left[kRows], right[kRows];
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) left[row] = right[row] = _mm512_setzero_ps();
  for (int64_t group = 0; group < num_groups; ++group) {
    const int64_t at = (p * num_groups + group) * kPanel;
    const __m512i offset0 = _mm512_loadu_si512(layer.offsets.data() + at);
    const __m512i offset1 = _mm512_loadu_si512(layer.offsets.data() + at + 16);
    __m512i left_sums[kRows], right_sums[kRows];
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      left_sums[row] = offset0;
      right_sums[row] = offset1;
    }
    for (int64_t k = group * kScaleGroup; k < (group + 1) * kScaleGroup; k += 4) {
      const __m512i b0 = _mm512_loadu_si512(panel + k * kPanel), b1 = _mm512_loadu_si512(panel + k * kPanel + 64);
#pragma GCC unroll 6
      for (int row = 0; row < kRows; ++row) {
        int32_t four;
        std::memcpy(&four, a + row * a_stride + k, sizeof four);
        const __m512i value = _mm512_set1_epi32(four);
        add_products(left_sums[row], value, b0);
        add_products(right_sums[row], value, b1);
      }
    }
    const __m512 scale0 = _mm512_loadu_ps(layer.scales.data() + at);
    const __m512 scale1 = _mm512_loadu_ps(layer.scales.data() + at + 16);
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      const __m512 scale = _mm512_set1_ps(a_scales[row * num_groups + group]);
      left[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(left_sums[row]), _mm512_mul_ps(scale0, scale), left[row]);
      right[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(right_sums[row]), _mm512_mul_ps(scale1, scale), right[row]);
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
    _mm512_storeu_ps(out + row * kPanel, left[row]);
    _mm512_storeu_ps(out + row * kPanel + 16, right[row]);
  }
}

#else

// The same sums without the instructions: right, and slower than float32.
template <int kRows>
void tile16(const uint16_t* a, int64_t a_stride, const uint16_t* panel, int64_t depth, float* out, int64_t out_stride) {
  for (int row = 0; row < kRows; ++row) {
    float sums[kPanel] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const float value = bfloat16_to_float(a[row * a_stride + k]);
      const uint16_t* b = panel + k / 2 * kPanel * 2 + k % 2;
      for (int column = 0; column < kPanel; ++column) sums[column] += value * bfloat16_to_float(b[column * 2]);
    }
    std::memcpy(out + row * out_stride, sums, sizeof sums);
  }
}

template <int kRows>
void tile8(const uint8_t* a, int64_t a_stride, const float* a_scales, const Linear& layer, int64_t p, float* out) {
  const int64_t num_groups = layer.num_groups();
  const int8_t* panel = layer.packed8.data() + p * kPanel * layer.padded_depth();
  for (int row = 0; row < kRows; ++row) {
    float totals[kPanel] = {};
    for (int64_t group = 0; group < num_groups; ++group) {
      const int64_t at = (p * num_groups + group) * kPanel;
      int32_t sums[kPanel];
      std::memcpy(sums, layer.offsets.data() + at, sizeof sums);
      for (int64_t k = group * kScaleGroup; k < (group + 1) * kScaleGroup; ++k) {
        const int32_t value = a[row * a_stride + k];
        const int8_t* b = panel + k / 4 * kPanel * 4 + k % 4;
        for (int column = 0; column < kPanel; ++column) sums[column] += value * b[column * 4];
      }
      for (int column = 0; column < kPanel; ++column)
        totals[column] +=
            static_cast<float>(sums[column]) * (layer.scales[at + column] * a_scales[row * num_groups + group]);
    }
    std::memcpy(out + row * kPanel, totals, sizeof totals);
  }
}

#endif

template <int kRows = kTileRows>
void tile16_of(int64_t rows, const uint16_t* a, int64_t a_stride, const uint16_t* panel, int64_t depth, float* out) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile16_of<kRows - 1>(rows, a, a_stride, panel, depth, out);
  }
  tile16<kRows>(a, a_stride, panel, depth, out, kPanel);
}

// Half as many rows as elsewhere: sums of integers and of floats take registers both.
constexpr int kTileRows8 = 6;

template <int kRows = kTileRows8>
void tile8_of(int64_t rows, const uint8_t* a, int64_t a_stride, const float* a_scales, const Linear& layer, int64_t p,
              float* out) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile8_of<kRows - 1>(rows, a, a_stride, a_scales, layer, p, out);
  }
  tile8<kRows>(a, a_stride, a_scales, layer, p, out);
}

// out[rows][kPanel] = rows `first` ... of x times panel p of W, bias not added.
inline void product(const Linear& layer, const Activations& x, int64_t first, int64_t rows, int64_t p, float* out) {
  const int64_t depth = layer.padded_depth();
  switch (layer.format) {
    case kFloat32:
      tile_of<false>(rows, x.rows32 + first * x.stride, x.stride, layer.panel(p), depth, out, kPanel);
      return;
    case kBfloat16:
      tile16_of(rows, x.rows16 + first * x.stride, x.stride, layer.packed16.data() + p * kPanel * depth, depth, out);
      return;
    case kInt8:
      for (int64_t row = 0; row < rows; row += kTileRows8)
        tile8_of(std::min<int64_t>(kTileRows8, rows - row), x.rows8 + (first + row) * x.stride, x.stride,
                 x.scales8 + (first + row) * layer.num_groups(), layer, p, out + row * kPanel);
  }
}

// y (+)= x W^T (+ b), row-major, rows of `columns` floats.
template <bool kAccumulate>
void linear(const Linear& layer, const Activations& x, int64_t rows, float* y, int num_threads) {
  const int64_t num_panels = panels_of(layer.columns);
#pragma omp parallel num_threads(num_threads)
  for (int64_t block = 0; block < rows; block += kRowBlock) {
    const int64_t block_rows = std::min(kRowBlock, rows - block);
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < num_panels; ++p) {
      const int64_t width = std::min<int64_t>(kPanel, layer.columns - p * kPanel);
      for (int64_t row = 0; row < block_rows; row += kTileRows) {
        const int64_t tile_rows = std::min<int64_t>(kTileRows, block_rows - row);
        float* c = y + (block + row) * layer.columns + p * kPanel;
        if (layer.format == kFloat32 && width == kPanel && layer.bias.empty()) {
          tile_of<kAccumulate>(tile_rows, x.rows32 + (block + row) * x.stride, x.stride, layer.panel(p), layer.depth, c,
                               layer.columns);
          continue;
        }
        float part[kTileRows * kPanel];
        product(layer, x, block + row, tile_rows, p, part);
        for (int64_t i = 0; i < tile_rows; ++i)
          for (int64_t j = 0; j < width; ++j) {
            float value = part[i * kPanel + j];
            if (!layer.bias.empty()) value += layer.bias[p * kPanel + j];
            c[i * layer.columns + j] = kAccumulate ? c[i * layer.columns + j] + value : value;
          }
      }
    }
  }
}

// out = silu(x G^T) * (x U^T): gate and up side by side, so that neither is ever written.
void gated(const Linear& gate, const Linear& up, const Activations& x, int64_t rows, float* out, int num_threads) {
  const int64_t num_panels = panels_of(gate.columns);
#pragma omp parallel num_threads(num_threads)
  for (int64_t block = 0; block < rows; block += kRowBlock) {
    const int64_t block_rows = std::min(kRowBlock, rows - block);
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < num_panels; ++p) {
      const int64_t width = std::min<int64_t>(kPanel, gate.columns - p * kPanel);
      float g[kTileRows * kPanel], u[kTileRows * kPanel];
      for (int64_t row = 0; row < block_rows; row += kTileRows) {
        const int64_t tile_rows = std::min<int64_t>(kTileRows, block_rows - row);
        product(gate, x, block + row, tile_rows, p, g);
        product(up, x, block + row, tile_rows, p, u);
        for (int64_t i = 0; i < tile_rows; ++i) {
          for (int half = 0; half < kPanel; half += kLanes) {
            const Vec value = load(g + i * kPanel + half);
            store(g + i * kPanel + half, value / (1.0f + exponential(-value)) * load(u + i * kPanel + half));
          }
          std::memcpy(out + (block + row + i) * gate.columns + p * kPanel, g + i * kPanel, width * sizeof(float));
        }
      }
    }
  }
}

void rms_norm(const float* x, const std::vector<float>& weight, float epsilon, int64_t size, float* out) {
  Vec squares = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < size; ++i) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(size) + epsilon);
  for (i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

// Turns pairs (i, i + size/2) by the position's angle (Su et al.: RoFormer, 2021), in the half-split layout.
void rotate(float* x, const float* cosine, const float* sine, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cosine[i] - second * sine[i];
    x[i + half] = second * cosine[i + half] + first * sine[i + half];
  }
}

// Scores of one query become weights that sum to one; whatever lies beyond `count` up to `padded` becomes 0.
void softmax(float* scores, int64_t count, int64_t padded, float scale) {
  for (int64_t i = count; i < padded; ++i) scores[i] = -INFINITY;
  Vec maxima = load(scores);
  for (int64_t i = kLanes; i < padded; i += kLanes) {
    const Vec value = load(scores + i);
    maxima = value > maxima ? value : maxima;
  }
  float highest = maxima[0];
  for (int lane = 1; lane < kLanes; ++lane) highest = std::max(highest, maxima[lane]);
  Vec total = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec value = exponential((load(scores + i) - highest) * scale);
    store(scores + i, value);
    total += value;
  }
  float surplus = 0;  // exponential() ends at e^-87, which is not quite 0
  for (int64_t i = count; i < padded; ++i) {
    surplus += scores[i];
    scores[i] = 0;
  }
  const float inverse = 1.0f / (sum(total) - surplus);
  for (int64_t i = 0; i < count; ++i) scores[i] *= inverse;
}

}  // namespace

extern "C" {

struct TwinpoolShape {
  int32_t num_layers, hidden_size, num_heads, num_kv_heads, head_size, intermediate_size, vocab_size, block_size;
  float norm_epsilon, attention_scale;
  int32_t weight_format;  // Format of every linear layer
  int32_t cache_format;   // kFloat32 or kBfloat16
};

// One sequence of a step. Its tokens are rows first_row .. first_row + num_rows - 1, at positions start ...
struct TwinpoolSequence {
  int32_t first_row, num_rows, start, reserved;
  const int64_t* block_table;
};

struct TwinpoolStep {
  int64_t num_rows, num_sequences, num_sampled;
  const int64_t* token_ids;          // [num_rows]
  const float* cosine;               // [num_rows][head_size]
  const float* sine;                 // [num_rows][head_size]
  const TwinpoolSequence* sequences;
  const int64_t* sampled_rows;       // [num_sampled]
  void* const* cache_layers;         // per layer: [num_blocks][2][num_kv_heads][block_size][head_size]
  float* logits;                     // [num_sampled][vocab_size]
};

enum TwinpoolLinear { kQuery = 0, kKey, kValue, kOutput, kGate, kUp, kDown, kHead, kEmbedding };
enum TwinpoolVector { kInputNorm = 0, kPostNorm, kQueryNorm, kKeyNorm, kFinalNorm };
}

namespace {

struct Layer {
  Linear linears[kDown + 1];
  std::vector<float> norms[kKeyNorm + 1];
};

struct Decoder {
  TwinpoolShape shape;
  std::vector<Layer> layers;
  Linear head;
  std::vector<float> embedding;  // empty when tied to the head
  std::vector<float> final_norm;
  Scratch<> hidden, normed, query, key, value, attended, gated_rows;
  Converter converter;
  std::vector<Scratch<>> per_thread;
};

struct Work {
  int32_t sequence, kv_head, first_query, num_queries;
};

// Where block `index` of a sequence keeps the keys (part 0) or values (part 1) of one head: [block_size][head_size].
template <typename KV>
inline KV* block_of(const Decoder& m, KV* cache, const TwinpoolSequence& s, int64_t index, int part, int kv_head) {
  const TwinpoolShape& d = m.shape;
  const int64_t head = static_cast<int64_t>(d.block_size) * d.head_size;
  return cache + ((s.block_table[index] * 2 + part) * d.num_kv_heads + kv_head) * head;
}

template <typename KV>
void write_cache(const Decoder& m, KV* cache, const TwinpoolSequence& s, const float* key, const float* value) {
  const TwinpoolShape& d = m.shape;
  const int64_t stride = static_cast<int64_t>(d.num_kv_heads) * d.head_size;
  for (int32_t i = 0; i < s.num_rows; ++i) {
    const int64_t position = s.start + i, offset = position % d.block_size * d.head_size;
    for (int kv_head = 0; kv_head < d.num_kv_heads; ++kv_head) {
      const int64_t from = (s.first_row + i) * stride + kv_head * d.head_size;
      if (offset == 0) {  // the first token of a block: nothing of an earlier owner stays, here or in a handoff
        const int64_t block_size = static_cast<int64_t>(d.block_size) * d.head_size * sizeof(KV);
        std::memset(block_of(m, cache, s, position / d.block_size, 0, kv_head), 0, block_size);
        std::memset(block_of(m, cache, s, position / d.block_size, 1, kv_head), 0, block_size);
      }
      KV* k = block_of(m, cache, s, position / d.block_size, 0, kv_head) + offset;
      KV* v = block_of(m, cache, s, position / d.block_size, 1, kv_head) + offset;
      for (int64_t j = 0; j < d.head_size; ++j) {
        assign(k + j, key[from + j]);
        assign(v + j, value[from + j]);
      }
    }
  }
}

// One new token: every query head of the group against each block, straight from the cache.
template <typename KV>
void attend_one(Decoder& m, KV* cache, const TwinpoolSequence& s, int kv_head, const float* query, float* out,
                Scratch<>& scratch) {
  const TwinpoolShape& d = m.shape;
  const int64_t count = s.start + 1, padded = (count + kLanes - 1) / kLanes * kLanes;
  const int group = d.num_heads / d.num_kv_heads;
  const int64_t head = d.head_size, row = static_cast<int64_t>(s.first_row) * d.num_heads * head;
  float* scores = scratch.get(group * padded);
  for (int64_t index = 0; index * d.block_size < count; ++index) {
    const KV* keys = block_of(m, cache, s, index, 0, kv_head);
    const int64_t tokens = std::min<int64_t>(d.block_size, count - index * d.block_size);
    for (int g = 0; g < group; ++g) {
      const float* q = query + row + (kv_head * group + g) * head;
      for (int64_t t = 0; t < tokens; ++t) {
        Vec products = {};
        for (int64_t i = 0; i < head; i += kLanes) products += load(q + i) * load(keys + t * head + i);
        scores[g * padded + index * d.block_size + t] = sum(products);
      }
    }
  }
  for (int g = 0; g < group; ++g) {
    softmax(scores + g * padded, count, padded, d.attention_scale);
    std::memset(out + row + (kv_head * group + g) * head, 0, head * sizeof(float));
  }
  for (int64_t index = 0; index * d.block_size < count; ++index) {
    const KV* values = block_of(m, cache, s, index, 1, kv_head);
    const int64_t tokens = std::min<int64_t>(d.block_size, count - index * d.block_size);
    for (int g = 0; g < group; ++g) {
      const float* weights = scores + g * padded + index * d.block_size;
      float* o = out + row + (kv_head * group + g) * head;
      for (int64_t i = 0; i < head; i += kLanes) {
        Vec total = load(o + i);
        for (int64_t t = 0; t < tokens; ++t) total += weights[t] * load(values + t * head + i);
        store(o + i, total);
      }
    }
  }
}

// Some queries of a prompt chunk: keys and values are packed into panels, then it is two matrix products.
template <typename KV>
void attend_many(Decoder& m, KV* cache, const TwinpoolSequence& s, const Work& work, const float* query, float* out,
                 Scratch<>& scratch) {
  const TwinpoolShape& d = m.shape;
  const int group = d.num_heads / d.num_kv_heads;
  const int64_t head = d.head_size, stride = static_cast<int64_t>(d.num_heads) * head;
  const int64_t last = s.start + work.first_query + work.num_queries;  // keys that any of the queries sees
  const int64_t padded = panels_of(last) * kPanel, value_panels = panels_of(head);
  float* keys = scratch.get(padded * head + value_panels * kPanel * padded + kTileRows * (padded + value_panels * kPanel));
  float* values = keys + padded * head;
  float* scores = values + value_panels * kPanel * padded;
  float* result = scores + kTileRows * padded;
  std::memset(keys + (padded - kPanel) * head, 0, kPanel * head * sizeof(float));
  std::memset(values, 0, value_panels * kPanel * padded * sizeof(float));
  for (int64_t t = 0; t < last; ++t) {
    const int64_t offset = t % d.block_size * head;
    const KV* k = block_of(m, cache, s, t / d.block_size, 0, work.kv_head) + offset;
    const KV* v = block_of(m, cache, s, t / d.block_size, 1, work.kv_head) + offset;
    float* key_panel = keys + t / kPanel * kPanel * head + t % kPanel;
    for (int64_t i = 0; i < head; ++i) key_panel[i * kPanel] = as_float(k[i]);
    for (int64_t i = 0; i < head; ++i) values[(i / kPanel * padded + t) * kPanel + i % kPanel] = as_float(v[i]);
  }
  for (int g = 0; g < group; ++g) {
    for (int64_t first = work.first_query; first < work.first_query + work.num_queries; first += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, work.first_query + work.num_queries - first);
      const int64_t at = (s.first_row + first) * stride + (work.kv_head * group + g) * head;
      const int64_t seen = s.start + first + rows, panels = panels_of(seen);
      for (int64_t p = 0; p < panels; ++p)
        tile_of<false>(rows, query + at, stride, keys + p * kPanel * head, head, scores + p * kPanel, padded);
      for (int64_t i = 0; i < rows; ++i)
        softmax(scores + i * padded, s.start + first + i + 1, panels * kPanel, d.attention_scale);
      for (int64_t p = 0; p < value_panels; ++p)
        tile_of<false>(rows, scores, padded, values + p * padded * kPanel, seen, result + p * kPanel,
                       value_panels * kPanel);
      for (int64_t i = 0; i < rows; ++i)
        std::memcpy(out + at + i * stride, result + i * value_panels * kPanel, head * sizeof(float));
    }
  }
}

std::vector<Work> split_attention(const Decoder& m, const TwinpoolStep& step) {
  std::vector<Work> items;
  for (int32_t index = 0; index < step.num_sequences; ++index)
    for (int32_t kv_head = 0; kv_head < m.shape.num_kv_heads; ++kv_head)
      for (int32_t first = 0; first < step.sequences[index].num_rows; first += kQueryBlock)
        items.push_back({index, kv_head, first,
                         static_cast<int32_t>(std::min<int64_t>(kQueryBlock, step.sequences[index].num_rows - first))});
  // Later queries see more keys: the longest first, so that the threads end together.
  std::stable_sort(items.begin(), items.end(), [&](const Work& a, const Work& b) {
    const TwinpoolSequence &s = step.sequences[a.sequence], &t = step.sequences[b.sequence];
    return static_cast<int64_t>(s.start + a.first_query) * a.num_queries >
           static_cast<int64_t>(t.start + b.first_query) * b.num_queries;
  });
  return items;
}

template <typename KV>
void attend(Decoder& m, const TwinpoolStep& step, const std::vector<Work>& items, KV* cache, const float* query,
            float* out, int num_threads) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (size_t i = 0; i < items.size(); ++i) {
    const TwinpoolSequence& s = step.sequences[items[i].sequence];
    Scratch<>& scratch = m.per_thread[omp_get_thread_num()];
    if (s.num_rows == 1)
      attend_one(m, cache, s, items[i].kv_head, query, out, scratch);
    else
      attend_many(m, cache, s, items[i], query, out, scratch);
  }
}

void norm_rows(const float* x, const std::vector<float>& weight, float epsilon, int64_t rows, int64_t size, float* out,
               int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t row = 0; row < rows; ++row) rms_norm(x + row * size, weight, epsilon, size, out + row * size);
}

void prepare_heads(const Layer& layer, const TwinpoolShape& d, const TwinpoolStep& step, float* query, float* key,
                   int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t row = 0; row < step.num_rows; ++row) {
    const float *cosine = step.cosine + row * d.head_size, *sine = step.sine + row * d.head_size;
    for (int which = 0; which < 2; ++which) {
      const int num_heads = which == 0 ? d.num_heads : d.num_kv_heads;
      const std::vector<float>& norm = layer.norms[which == 0 ? kQueryNorm : kKeyNorm];
      float* x = (which == 0 ? query : key) + row * num_heads * d.head_size;
      for (int head = 0; head < num_heads; ++head, x += d.head_size) {
        if (!norm.empty()) rms_norm(x, norm, d.norm_epsilon, d.head_size, x);
        rotate(x, cosine, sine, d.head_size);
      }
    }
  }
}

template <typename KV>
void run(Decoder& m, const TwinpoolStep& step, int num_threads) {
  const TwinpoolShape& d = m.shape;
  const int64_t rows = step.num_rows, size = d.hidden_size;
  const int64_t query_size = static_cast<int64_t>(d.num_heads) * d.head_size;
  const int64_t kv_size = static_cast<int64_t>(d.num_kv_heads) * d.head_size;
  float *x = m.hidden.get(rows * size), *normed = m.normed.get(std::max(rows, step.num_sampled) * size);
  float *query = m.query.get(rows * query_size), *attended = m.attended.get(rows * query_size);
  float *key = m.key.get(rows * kv_size), *value = m.value.get(rows * kv_size);
  float* gated_rows = m.gated_rows.get(rows * d.intermediate_size);
  if (static_cast<int>(m.per_thread.size()) < num_threads) m.per_thread.resize(num_threads);
  const std::vector<Work> items = split_attention(m, step);
  const Format format = static_cast<Format>(d.weight_format);

  for (int64_t row = 0; row < rows; ++row) {
    if (m.embedding.empty())
      m.head.row(step.token_ids[row], x + row * size);
    else
      std::memcpy(x + row * size, m.embedding.data() + step.token_ids[row] * size, size * sizeof(float));
  }
  for (int32_t index = 0; index < d.num_layers; ++index) {
    const Layer& layer = m.layers[index];
    KV* cache = static_cast<KV*>(step.cache_layers[index]);
    norm_rows(x, layer.norms[kInputNorm], d.norm_epsilon, rows, size, normed, num_threads);
    Activations input = m.converter.convert(normed, rows, size, format, num_threads);
    linear<false>(layer.linears[kQuery], input, rows, query, num_threads);
    linear<false>(layer.linears[kKey], input, rows, key, num_threads);
    linear<false>(layer.linears[kValue], input, rows, value, num_threads);
    prepare_heads(layer, d, step, query, key, num_threads);
    for (int64_t i = 0; i < step.num_sequences; ++i) write_cache(m, cache, step.sequences[i], key, value);
    attend(m, step, items, cache, query, attended, num_threads);
    input = m.converter.convert(attended, rows, query_size, format, num_threads);
    linear<true>(layer.linears[kOutput], input, rows, x, num_threads);
    norm_rows(x, layer.norms[kPostNorm], d.norm_epsilon, rows, size, normed, num_threads);
    input = m.converter.convert(normed, rows, size, format, num_threads);
    gated(layer.linears[kGate], layer.linears[kUp], input, rows, gated_rows, num_threads);
    input = m.converter.convert(gated_rows, rows, d.intermediate_size, format, num_threads);
    linear<true>(layer.linears[kDown], input, rows, x, num_threads);
  }
  for (int64_t i = 0; i < step.num_sampled; ++i)
    rms_norm(x + step.sampled_rows[i] * size, m.final_norm, d.norm_epsilon, size, normed + i * size);
  linear<false>(m.head, m.converter.convert(normed, step.num_sampled, size, format, num_threads), step.num_sampled,
                step.logits, num_threads);
}

}  // namespace

extern "C" {

// Compared with library.py's number: another one means that the library was built from another version of this file.
int twinpool_interface() { return 2; }

void* twinpool_create(const TwinpoolShape* shape) {
  Decoder* m = new (std::nothrow) Decoder;
  if (m != nullptr) {
    m->shape = *shape;
    m->layers.resize(shape->num_layers);
  }
  return m;
}

void twinpool_destroy(void* decoder) { delete static_cast<Decoder*>(decoder); }

// weight: [columns][depth]; bias: [columns] or null. The caller's memory is not kept. Returns 0, or 1 without memory.
int twinpool_set_linear(void* decoder, int layer, int which, const float* weight, const float* bias, int64_t columns,
                        int64_t depth) {
  Decoder* m = static_cast<Decoder*>(decoder);
  try {
    if (which == kEmbedding) {
      m->embedding.assign(weight, weight + columns * depth);
      return 0;
    }
    Linear& linear = which == kHead ? m->head : m->layers[layer].linears[which];
    linear.pack(weight, columns, depth, static_cast<Format>(m->shape.weight_format));
    if (bias != nullptr) {
      linear.bias.assign(panels_of(columns) * kPanel, 0.0f);
      std::copy(bias, bias + columns, linear.bias.begin());
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

void twinpool_set_vector(void* decoder, int layer, int which, const float* values, int64_t size) {
  Decoder* m = static_cast<Decoder*>(decoder);
  (which == kFinalNorm ? m->final_norm : m->layers[layer].norms[which]).assign(values, values + size);
}

// Returns 0, or 1 without memory for the step.
int twinpool_step(void* decoder, const TwinpoolStep* step, int num_threads) {
  try {
    Decoder& m = *static_cast<Decoder*>(decoder);
    if (m.shape.cache_format == kBfloat16)
      run<uint16_t>(m, *step, num_threads);
    else
      run<float>(m, *step, num_threads);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
}
