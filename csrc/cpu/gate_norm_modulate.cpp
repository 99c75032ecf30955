// r = x + gate y; out = (norm(r) weight + bias) (1 + scale) + shift. A unit is a block of tokens of
// a sample; the tokens of a sample share a row of the tables.
#include <cmath>

#include "cpu/tile.h"
#include "ops.h"

namespace branchcore::cpu::BRANCHCORE_ISA {

constexpr int64_t kBlockTokens = 32;

static inline bool given(const TensorView& view) { return view.dtype != DType::kNone; }

struct Floats {
  explicit Floats(int64_t count) : values(new float[count]()) {}
  ~Floats() { delete[] values; }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  float* values;
};

static inline int64_t blocks_of(int64_t num_tokens) {
  return (num_tokens + kBlockTokens - 1) / kBlockTokens;
}

// Run body(sample, block, first token, last token + 1) for all blocks of the tokens of x.
template <class Body>
static inline void for_blocks(int64_t num_samples, const TensorView& x, Body body) {
  const int64_t num_tokens = num_samples ? x.sizes[0] / num_samples : 0;
  const auto unit = [&](int64_t sample, int64_t block, Span) {
    const int64_t begin = block * kBlockTokens, end = begin + kBlockTokens;
    const int64_t first = sample * num_tokens;
    body(sample, block, first + begin, first + (end < num_tokens ? end : num_tokens));
  };
  // a block counts as a tile
  for_tiles(num_samples, blocks_of(num_tokens) * kTile, x.sizes[0] * x.sizes[1], unit);
}

template <class Body>
static inline void for_spans(int64_t num_channels, Body body) {
  for (int64_t tile = 0; tile < num_tiles(num_channels); ++tile)
    body(tile_span(tile, num_channels));
}

static inline void fill(float* values, float value, Span span) {
  for (int64_t i = 0; i < span.count; ++i) values[i] = value;
}

// values * (1 + scale), values * table or values + table, where there is one.
static inline void multiply(float* values, const TensorView& table, int64_t row, Span span,
                            float plus) {
  if (!given(table)) return;
  Tile scratch;
  const float* factor = load(table, row, span, scratch);
  for (int64_t i = 0; i < span.count; ++i) values[i] *= plus + factor[i];
}

static inline void add(float* values, const TensorView& table, int64_t row, Span span) {
  if (!given(table)) return;
  Tile scratch;
  add_scaled(values, 1.0f, load(table, row, span, scratch), span.count);
}

struct Moments {
  float mean, rstd;
};

static inline void normalised(Tile& tile, const TensorView& r, int64_t token, Span span,
                              Moments moments) {
  const float* values = load(r, token, span, tile);
  for (int64_t i = 0; i < span.count; ++i)
    tile.values[i] = (values[i] - moments.mean) * moments.rstd;
}

// Sum of values: fp32 within short blocks, fp64 across them, as `dot`.
static inline double total(const float* values, int64_t count) {
  constexpr int64_t kBlock = 256;
  double sum = 0.0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    float partial = 0.0f;
#pragma omp simd reduction(+ : partial)
    for (int64_t i = begin; i < end; ++i) partial += values[i];
    sum += partial;
  }
  return sum;
}

// Mean (0 unless centred) and 1 / sqrt(variance + eps) of a token.
static Moments moments_of(const TensorView& r, int64_t token, bool centred, double eps) {
  const int64_t num_channels = r.sizes[1];
  double sum = 0.0, squares = 0.0;
  Tile tile;
  if (centred)
    for_spans(num_channels,
              [&](Span span) { sum += total(load(r, token, span, tile), span.count); });
  const float mean = static_cast<float>(sum / num_channels);
  for_spans(num_channels, [&](Span span) {
    normalised(tile, r, token, span, {mean, 1.0f});
    squares += dot(tile.values, tile.values, span.count);
  });
  return {mean, static_cast<float>(1.0 / std::sqrt(squares / num_channels + eps))};
}

void gate_norm_modulate(TensorView x, TensorView scale, TensorView shift, TensorView row,
                        TensorView y, TensorView gate, TensorView weight, TensorView bias,
                        bool centred, double eps, TensorView residual, TensorView out,
                        TensorView moments) {
  const int64_t num_channels = x.sizes[1];
  const TensorView& r = given(y) ? residual : x;
  check_table_rows("gate_norm_modulate", row, scale, shift, gate);
  for_blocks(row.sizes[0], x, [&](int64_t sample, int64_t, int64_t first, int64_t last) {
    const int64_t index = at<int64_t>(row, sample);
    Tile tile;
    for (int64_t token = first; token < last; ++token) {
      if (given(y))
        for_spans(num_channels, [&](Span span) {
          normalised(tile, y, token, span, {0.0f, 1.0f});
          multiply(tile.values, gate, index, span, 0.0f);
          add(tile.values, x, token, span);
          store(residual, token, span, tile, 1.0f);
        });
      const Moments found = moments_of(r, token, centred, eps);
      at<float>(moments, 0, token) = found.mean;
      at<float>(moments, 1, token) = found.rstd;
      for_spans(num_channels, [&](Span span) {
        normalised(tile, r, token, span, found);
        multiply(tile.values, weight, 0, span, 0.0f);
        add(tile.values, bias, 0, span);
        multiply(tile.values, scale, index, span, 1.0f);
        add(tile.values, shift, index, span);
        store(out, token, span, tile, 1.0f);
      });
    }
  });
}

// Sums over the tokens of a block, per channel: of g n, of g, and of dr y. Empty if not wanted.
class Sums {
 public:
  Sums(int64_t num_samples, int64_t blocks, int64_t num_channels)
      : blocks_(blocks),
        num_channels_(num_channels),
        sums_(num_samples * blocks * 3 * num_channels) {}

  float* at(int64_t sample, int64_t block, int kind) const {
    return sums_.values + ((sample * blocks_ + block) * 3 + kind) * num_channels_;
  }

  // Adds the blocks of a sample, in order, times factor.
  void add_to(double* total, int64_t sample, int kind, Span span, const float* factor) const {
    for (int64_t block = 0; block < blocks_; ++block) {
      const float* values = at(sample, block, kind) + span.begin;
      for (int64_t i = 0; i < span.count; ++i)
        total[i] += static_cast<double>(values[i]) * factor[i];
    }
  }

 private:
  const int64_t blocks_, num_channels_;
  const Floats sums_;
};

struct Terms {
  Tile n, p, scratch;
};

static inline void add_product(float* __restrict sum, const float* a, const float* b, Span span) {
  for (int64_t i = 0; i < span.count; ++i) sum[i] += a[i] * b[i];
}

struct Backward {
  const TensorView grad_out, grad_residual, residual, y, moments, scale, gate, weight;
  const bool centred;
  const TensorView dx, dy;

  // (1 + scale) weight of a sample.
  void fill_factor(float* factor, int64_t index) const {
    for_spans(residual.sizes[1], [&](Span span) {
      float* values = factor + span.begin;
      fill(values, 1.0f, span);
      multiply(values, scale, index, span, 1.0f);
      multiply(values, weight, 0, span, 0.0f);
    });
  }

  // n = (r - mean) rstd and p = g (1 + scale) weight of a piece of a token; returns g.
  const float* make(Terms& terms, int64_t t, const float* factor, Span span) const {
    normalised(terms.n, residual, t, span, {at<float>(moments, 0, t), at<float>(moments, 1, t)});
    const float* g = load(grad_out, t, span, terms.scratch);
    for (int64_t i = 0; i < span.count; ++i) terms.p.values[i] = g[i] * factor[span.begin + i];
    return g;
  }

  // dx and dy of a token; adds to the sums of its block, if there are any.
  void token(int64_t t, int64_t index, const float* factor, float* const sums[3]) const {
    const int64_t num_channels = residual.sizes[1];
    Terms terms;
    float *n = terms.n.values, *p = terms.p.values;
    double sum_p = 0.0, sum_pn = 0.0;
    for_spans(num_channels, [&](Span span) {
      make(terms, t, factor, span);
      if (centred) sum_p += total(p, span.count);
      sum_pn += dot(p, n, span.count);
    });
    const float level = static_cast<float>(sum_p / num_channels), rstd = at<float>(moments, 1, t);
    const float slope = static_cast<float>(sum_pn / num_channels);
    for_spans(num_channels, [&](Span span) {
      const float* g = make(terms, t, factor, span);
      if (sums[0]) {
        add_product(sums[0] + span.begin, g, n, span);
        add_scaled(sums[1] + span.begin, 1.0f, g, span.count);
      }
      for (int64_t i = 0; i < span.count; ++i) p[i] = rstd * (p[i] - level - n[i] * slope);
      add(p, grad_residual, t, span);
      store(dx, t, span, terms.p, 1.0f);
      if (sums[2] && given(y))
        add_product(sums[2] + span.begin, p, load(y, t, span, terms.scratch), span);
      if (given(gate)) {
        multiply(p, gate, index, span, 0.0f);
        store(dy, t, span, terms.p, 1.0f);
      }
    });
  }
};

// Gradients of the tables, each from its row's samples in order, and of weight and bias, from all.
struct Reduction {
  const Sums& sums;
  const TensorView scale, row, weight, bias;

  // Of the samples of a row; with a row of -1, of all samples, each times 1 + scale.
  void gather(Tile& out, int kind, int64_t index, Span span) const {
    double total[kTile] = {};
    Tile factor;
    for (int64_t sample = 0; sample < row.sizes[0]; ++sample) {
      const int64_t own = at<int64_t>(row, sample);
      if (index >= 0 && own != index) continue;
      fill(factor.values, 1.0f, span);
      if (index < 0) multiply(factor.values, scale, own, span, 1.0f);
      sums.add_to(total, sample, kind, span, factor.values);
    }
    for (int64_t i = 0; i < span.count; ++i) out.values[i] = static_cast<float>(total[i]);
  }

  void write_tables(TensorView dscale, TensorView dshift, TensorView dgate) const {
    const TensorView& any = given(dscale) ? dscale : given(dshift) ? dshift : dgate;
    if (!given(any)) return;
    for_tiles(any.sizes[0], any.sizes[1], INT64_MAX, [&](int64_t index, int64_t, Span span) {
      Tile tile, level;
      if (given(dscale)) {
        gather(tile, 0, index, span);
        multiply(tile.values, weight, 0, span, 0.0f);
        if (given(bias)) {
          gather(level, 1, index, span);
          multiply(level.values, bias, 0, span, 0.0f);
          add_scaled(tile.values, 1.0f, level.values, span.count);
        }
        store(dscale, index, span, tile, 1.0f);
      }
      if (given(dshift)) gather(tile, 1, index, span), store(dshift, index, span, tile, 1.0f);
      if (given(dgate)) gather(tile, 2, index, span), store(dgate, index, span, tile, 1.0f);
    });
  }

  void write_affine(TensorView out, int kind) const {
    if (!given(out)) return;
    for_tiles(1, out.sizes[1], INT64_MAX, [&](int64_t, int64_t, Span span) {
      Tile tile;
      gather(tile, kind, -1, span);
      store(out, 0, span, tile, 1.0f);
    });
  }
};

void gate_norm_modulate_backward(TensorView grad_out, TensorView grad_residual, TensorView residual,
                                 TensorView y, TensorView moments, TensorView scale, TensorView row,
                                 TensorView gate, TensorView weight, TensorView bias, bool centred,
                                 TensorView dx, TensorView dy, TensorView dscale, TensorView dshift,
                                 TensorView dgate, TensorView dweight, TensorView dbias) {
  const int64_t num_samples = row.sizes[0], num_channels = residual.sizes[1];
  check_table_rows("gate_norm_modulate_backward", row, scale, gate, dshift);
  const bool reduce =
      given(dscale) || given(dshift) || given(dgate) || given(dweight) || given(dbias);
  const Sums sums(reduce ? num_samples : 0,
                  blocks_of(num_samples ? residual.sizes[0] / num_samples : 0), num_channels);
  const Backward backward = {grad_out, grad_residual, residual, y,  moments, scale,
                             gate,     weight,        centred,  dx, dy};
  for_blocks(num_samples, residual, [&](int64_t sample, int64_t block, int64_t t, int64_t last) {
    const int64_t index = at<int64_t>(row, sample);
    const Floats factor(num_channels);
    backward.fill_factor(factor.values, index);
    float* own[3] = {};
    for (int kind = 0; reduce && kind < 3; ++kind) own[kind] = sums.at(sample, block, kind);
    for (; t < last; ++t) backward.token(t, index, factor.values, own);
  });
  const Reduction reduction = {sums, scale, row, weight, bias};
  reduction.write_tables(dscale, dshift, dgate);
  reduction.write_affine(dweight, 0);
  reduction.write_affine(dbias, 1);
}

}  // namespace branchcore::cpu::BRANCHCORE_ISA
