// RMSNorm and rotary embedding of queries or keys, one row of heads per token: out = R (x rstd w).
// One unit is a block of tokens; it keeps its own sums of the weight's gradient, and the blocks are
// added in order.
#include <cmath>

#include "cpu/tile.h"
#include "ops.h"

namespace branchcore::cpu::BRANCHCORE_ISA {

static constexpr int64_t kTokens = 64;

// The heads of a token and what scales them. A norm is of `group` heads: one of them, or all.
class Heads {
 public:
  Heads(const TensorView& x, const TensorView& weight, const TensorView& cos, const TensorView& sin,
        int64_t size, double eps, bool halves)
      : size(size),
        count(x.sizes[1] / size),
        group(weight.sizes[1] > size ? count : 1),
        x_(x),
        weight_(weight),
        cos_(cos),
        sin_(sin),
        eps_(eps),
        halves_(halves) {}

  const int64_t size, count, group;

  Span span(int64_t head) const { return {head * size, size}; }
  Span weight_span(int64_t head) const { return span(group == 1 ? 0 : head); }
  const float* x(int64_t token, int64_t head) { return load(x_, token, span(head), x_scratch_); }
  const float* weight(int64_t head) { return load(weight_, 0, weight_span(head), w_scratch_); }
  float rstd(double square) const {
    return static_cast<float>(1.0 / std::sqrt(square / (group * size) + eps_));
  }

  // Rotate each pair in place by the angle of the token's position, or back: (a, b) to
  // (a cos - b sin, b cos + a sin).
  void rotate(float* y, int64_t token, bool back) const {
    if (cos_.dtype == DType::kNone) return;
    const int64_t position = token % cos_.sizes[0], half = size / 2;
    for (int64_t i = 0; i < half; ++i) {
      const int64_t first = halves_ ? i : 2 * i, second = halves_ ? i + half : 2 * i + 1;
      const float a = y[first], b = y[second];
      const float sin_a = at<float>(sin_, position, first);
      const float sin_b = at<float>(sin_, position, second);
      y[first] = a * at<float>(cos_, position, first) + (back ? b * sin_b : -b * sin_a);
      y[second] = b * at<float>(cos_, position, second) + (back ? -a * sin_a : a * sin_b);
    }
  }

 private:
  const TensorView &x_, &weight_, &cos_, &sin_;
  const double eps_;
  const bool halves_;
  Tile x_scratch_, w_scratch_;
};

// The tokens of a block.
static inline Span block_span(int64_t block, int64_t num_tokens) {
  const int64_t begin = block * kTokens, left = num_tokens - begin;
  return {begin, left < kTokens ? left : kTokens};
}

void qk_norm_rope(TensorView x, TensorView weight, TensorView cos, TensorView sin,
                  int64_t head_size, double eps, bool halves, TensorView out) {
  const int64_t num_tokens = x.sizes[0], blocks = (num_tokens + kTokens - 1) / kTokens;
  prefer_huge_pages(out);
  const auto body = [&](int64_t block, int64_t, Span) {
    Heads heads(x, weight, cos, sin, head_size, eps, halves);
    Tile y;
    const Span tokens = block_span(block, num_tokens);
    for (int64_t n = 0; n < tokens.count * heads.count; n += heads.group) {
      const int64_t token = tokens.begin + n / heads.count, first = n % heads.count;
      double square = 0.0;
      for (int64_t head = first; head < first + heads.group; ++head) {
        const float* x_head = heads.x(token, head);
        square += dot(x_head, x_head, head_size);
      }
      const float rstd = heads.rstd(square);
      for (int64_t head = first; head < first + heads.group; ++head) {
        const float *x_head = heads.x(token, head), *w = heads.weight(head);
        for (int64_t i = 0; i < head_size; ++i) y.values[i] = x_head[i] * rstd * w[i];
        heads.rotate(y.values, token, false);
        store(out, token, heads.span(head), y, 1.0f);
      }
    }
  };
  for_tiles(blocks, 1, num_tokens * x.sizes[1], body);
}

// dx = (dhat - hat mean(hat dhat)) rstd with hat = x rstd, dhat = dy w; dweight = sum of dy hat.
void qk_norm_rope_backward(TensorView grad, TensorView x, TensorView weight, TensorView cos,
                           TensorView sin, int64_t head_size, double eps, bool halves,
                           TensorView dx, TensorView dweight) {
  const int64_t num_tokens = x.sizes[0], blocks = (num_tokens + kTokens - 1) / kTokens;
  const int64_t num_weights = weight.sizes[1];
  const bool wanted = dweight.dtype != DType::kNone;
  Partials sums(blocks, wanted ? num_weights : 0);
  prefer_huge_pages(dx);
  const auto body = [&](int64_t block, int64_t, Span) {
    Heads heads(x, weight, cos, sin, head_size, eps, halves);
    Tile dy, dhat;
    const Span tokens = block_span(block, num_tokens);
    for (int64_t c = 0; wanted && c < num_weights; ++c) sums.at(block, c) = 0.0;
    const auto pull = [&](int64_t token, int64_t head) {
      const float *from = load(grad, token, heads.span(head), dhat), *w = heads.weight(head);
      for (int64_t i = 0; i < head_size; ++i) dy.values[i] = from[i];
      heads.rotate(dy.values, token, true);
      for (int64_t i = 0; i < head_size; ++i) dhat.values[i] = dy.values[i] * w[i];
    };
    for (int64_t n = 0; n < tokens.count * heads.count; n += heads.group) {
      const int64_t token = tokens.begin + n / heads.count, first = n % heads.count;
      double square = 0.0, cross = 0.0;
      for (int64_t head = first; head < first + heads.group; ++head) {
        const float* x_head = heads.x(token, head);
        pull(token, head);
        square += dot(x_head, x_head, head_size);
        cross += dot(x_head, dhat.values, head_size);
      }
      const float rstd = heads.rstd(square);
      const float pulled = rstd * rstd * static_cast<float>(cross / (heads.group * head_size));
      for (int64_t head = first; head < first + heads.group; ++head) {
        const float* x_head = heads.x(token, head);
        if (heads.group > 1) pull(token, head);
        for (int64_t i = 0; wanted && i < head_size; ++i)
          sums.at(block, heads.weight_span(head).begin + i) += dy.values[i] * (x_head[i] * rstd);
        for (int64_t i = 0; i < head_size; ++i) dhat.values[i] -= x_head[i] * pulled;
        store(dx, token, heads.span(head), dhat, rstd);
      }
    }
  };
  for_tiles(blocks, 1, num_tokens * x.sizes[1], body);
  for (int64_t tile = 0; wanted && tile < num_tiles(num_weights); ++tile) {
    Tile total;
    const Span span = tile_span(tile, num_weights);
    for (int64_t i = 0; i < span.count; ++i) {
      double sum = 0.0;
      for (int64_t block = 0; block < blocks; ++block) sum += sums.at(block, span.begin + i);
      total.values[i] = static_cast<float>(sum);
    }
    store(dweight, 0, span, total, 1.0f);
  }
}

}  // namespace branchcore::cpu::BRANCHCORE_ISA
