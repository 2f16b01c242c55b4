// Linear layers: weights packed once, in three formats, and their products with few or many rows.
//
// Weights are packed into panels of kPanel output columns, k-major:
//
//     panel p:  [k = 0: w[p*kPanel + 0 .. kPanel-1][0]]  [k = 1: ...]  ...  [k = K-1: ...]
//
// so that a small batch streams them from memory once, in order, and a large one reuses a panel from the cache
// (Goto, van de Geijn: Anatomy of High-Performance Matrix Multiplication, TOMS 2008).
#pragma once

#include "vectors.h"

namespace {

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

}  // namespace
