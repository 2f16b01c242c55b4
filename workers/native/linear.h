// Linear layers: y = x W^T + b, shared out by panels among the threads of a team.
#pragma once

#include "products.h"
#include "team.h"

namespace {

// Rows of activations that stay in the second-level cache beside a panel.
constexpr int64_t kRowBlocks[] = {kRowBlock, 2 * kRowBlock, 4 * kRowBlock, 4 * kRowBlock};

// y (+)= part (+ b), a tile of it at panel p.
template <bool kAccumulate>
void write_part(const Linear& layer, int64_t p, int64_t rows, const float* part, float* y) {
  const int64_t width = std::min<int64_t>(kPanel, layer.columns - p * kPanel);
  const float* bias = layer.bias.empty() ? nullptr : layer.bias.data() + p * kPanel;
  for (int64_t i = 0; i < rows; ++i, part += kPanel, y += layer.columns) {
    int64_t j = 0;
    for (; j + kLanes <= width; j += kLanes) {
      Vec value = load(part + j);
      if (bias != nullptr) value += load(bias + j);
      store(y + j, kAccumulate ? load(y + j) + value : value);
    }
    for (; j < width; ++j) {
      const float value = bias != nullptr ? part[j] + bias[j] : part[j];
      y[j] = kAccumulate ? y[j] + value : value;
    }
  }
}

// One panel of y for a block of rows; block is a multiple of kTileRows.
template <bool kAccumulate>
void linear_panel(const Linear& layer, const Activations& x, int64_t block, int64_t block_rows, int64_t p, float* y) {
  const bool is_whole = (p + 1) * kPanel <= layer.columns, is_last = p + 1 == panels_of(layer.columns);
  for (int64_t row = 0; row < block_rows; row += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, block_rows - row);
    const bool fetches = row == 0 && !is_last;
    float* c = y + (block + row) * layer.columns + p * kPanel;
    if (layer.format == kFloat32 && is_whole && layer.bias.empty()) {
      tile_of<kAccumulate>(rows, x.rows32 + (block + row) * x.stride, x.stride, layer.panel(p), layer.depth, c,
                           layer.columns, fetches ? layer.panel(p + 1) : nullptr);
      continue;
    }
    float part[kTileRows * kPanel];
    product(layer, x, block + row, rows, p, fetches, part);
    write_part<kAccumulate>(layer, p, rows, part, c);
  }
}

struct Output {
  const Linear* layer;
  float* y;  // [rows][columns]
};

// Layers of one format over the same x; waits. With kAccumulate adds to y.
template <bool kAccumulate, int kCount>
void linears(Member& member, const Output (&outputs)[kCount], const Activations& x, int64_t rows) {
  int64_t ends[kCount], num_panels = 0;
  for (int i = 0; i < kCount; ++i) ends[i] = num_panels += panels_of(outputs[i].layer->columns);
  const int64_t row_block = kRowBlocks[outputs[0].layer->format];
  const Range panels = member.share(num_panels);
  for (int64_t block = 0; block < rows; block += row_block) {
    const int64_t block_rows = std::min(row_block, rows - block);
    int which = 0;
    for (int64_t index = panels.first; index < panels.last; ++index) {
      while (index >= ends[which]) ++which;
      const int64_t p = index - (which > 0 ? ends[which - 1] : 0);
      linear_panel<kAccumulate>(*outputs[which].layer, x, block, block_rows, p, outputs[which].y);
    }
  }
  member.wait();
}

template <bool kAccumulate>
void linear(Member& member, const Linear& layer, const Activations& x, int64_t rows, float* y) {
  linears<kAccumulate>(member, {Output{&layer, y}}, x, rows);
}

// A tile's rows of gate's panel become silu(gate) * up, in place.
inline void gate_part(int64_t rows, const float* up, float* gate) {
  for (int64_t i = 0; i < rows * kPanel; i += kLanes) {
    const Vec value = load(gate + i);
    store(gate + i, value / (1.0f + exponential(-value)) * load(up + i));
  }
}

// out[rows][columns] at panel p = part, or the other way round.
template <bool kWrites>
void copy_part(int64_t rows, int64_t columns, int64_t p, float* part, float* out) {
  const int64_t width = std::min<int64_t>(kPanel, columns - p * kPanel);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = out + i * columns + p * kPanel;
    std::memcpy(kWrites ? row : part + i * kPanel, kWrites ? part + i * kPanel : row, width * sizeof(float));
  }
}

// gated() for a few rows: gate's panels one after the other, then up's, as they lie in memory.
inline void gated_in_order(const Range& panels, const Linear& gate, const Linear& up, const Activations& x, int64_t rows,
                           float* out) {
  float g[kTileRows * kPanel] = {}, u[kTileRows * kPanel];
  for (int64_t p = panels.first; p < panels.last; ++p) {
    product(gate, x, 0, rows, p, false, g);
    copy_part<true>(rows, gate.columns, p, g, out);
  }
  for (int64_t p = panels.first; p < panels.last; ++p) {
    product(up, x, 0, rows, p, false, u);
    copy_part<false>(rows, gate.columns, p, g, out);
    gate_part(rows, u, g);
    copy_part<true>(rows, gate.columns, p, g, out);
  }
}

// out = silu(x G^T) * (x U^T). Waits.
inline void gated(Member& member, const Linear& gate, const Linear& up, const Activations& x, int64_t rows, float* out) {
  const int64_t num_panels = panels_of(gate.columns), row_block = kRowBlocks[gate.format];
  const Range panels = member.share(num_panels);
  if (rows <= kUnfetchedRows) {
    gated_in_order(panels, gate, up, x, rows, out);
    return member.wait();
  }
  for (int64_t block = 0; block < rows; block += row_block) {
    const int64_t block_rows = std::min(row_block, rows - block);
    for (int64_t p = panels.first; p < panels.last; ++p) {
      float g[kTileRows * kPanel], u[kTileRows * kPanel];
      for (int64_t row = 0; row < block_rows; row += kTileRows) {
        const int64_t tile_rows = std::min<int64_t>(kTileRows, block_rows - row);
        const bool fetches = row == 0 && p + 1 < num_panels;
        product(gate, x, block + row, tile_rows, p, fetches, g);
        product(up, x, block + row, tile_rows, p, fetches, u);
        gate_part(tile_rows, u, g);
        copy_part<true>(tile_rows, gate.columns, p, g, out + (block + row) * gate.columns);
      }
    }
  }
  member.wait();
}

}  // namespace
