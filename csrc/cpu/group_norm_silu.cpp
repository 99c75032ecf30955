// Group normalisation with SiLU. Matrices are contiguous (images * positions, channels); statistics
// are a mean and 1 / sqrt(var + eps) per image and group. Sums are fp64, in which the square of an
// fp32 number is exact: sums of squares keep their digits.
#include <cmath>
#include <type_traits>

#include "cpu/tile.h"
#include "ops.h"

namespace branchcore::cpu::BRANCHCORE_ISA {

static inline float get(const float* from) { return *from; }
static inline float get(const uint16_t* from) { return float_from_bits(uint32_t{*from} << 16); }
static inline void put(float* to, float value) { *to = value; }
static inline void put(uint16_t* to, float value) { *to = bfloat16_from_float(value); }

// 1 / (1 + exp(-z)) to 2e-7, in steps that become vector instructions.
static inline float sigmoid(float z) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float above = -z < 87.0f ? -z : 87.0f, x = above > -87.0f ? above : -87.0f;
  const float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2
  float e = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  e = ((e * r + 1.0f / 120.0f) * r + 1.0f / 24.0f) * r + 1.0f / 6.0f;
  e = ((e * r + 0.5f) * r + 1.0f) * r + 1.0f;
  const uint32_t exponent = bits_from_float(shifted) - bits_from_float(kRound) + 127u;
  return 1.0f / (1.0f + e * float_from_bits(exponent << 23));
}

// Neighbouring groups of one image, one unit of work; with kWidth 64 it took 1.6 times as long.
struct Block {
  static constexpr int64_t kMaxChannels = 4096, kWidth = 256;
  int64_t image, channel, group, per_group, positions, stride, element, count;
  const float *weight, *bias;
  double sums[2][kMaxChannels] = {};
  float mean[kMaxChannels], rstd[kMaxChannels];

  // body(element of the matrix, channel of the block)
  template <class Body>
  void for_elements(Body body) const {
    for (int64_t position = 0; position < positions; ++position)
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) body(element + position * stride + c, c);
  }

  // Mean over the group of channel `begin` of a sum, or of weight times it.
  double average(int which, int64_t begin, bool weighted) const {
    double total = 0.0;
    for (int64_t c = begin; c < begin + per_group; ++c)
      total += sums[which][c] * (weighted ? weight[c] : 1.0f);
    return total / static_cast<double>(positions * per_group);
  }

  void read(TensorView statistics) {
    for (int64_t c = 0; c < count; ++c) {
      mean[c] = at<float>(statistics, group + c / per_group, 0);
      rstd[c] = at<float>(statistics, group + c / per_group, 1);
    }
  }

  float xhat(float x, int64_t c) const { return (x - mean[c]) * rstd[c]; }
  float z(float xhat, int64_t c) const { return xhat * weight[c] + bias[c]; }
};

// body(block, pointer to the elements of out, silu as a type: loops without a branch are vectors)
template <class Body>
static void for_blocks(TensorView weight, TensorView bias, TensorView statistics,
                       int64_t num_images, bool silu, TensorView out, Body body) {
  if (num_images == 0) return;
  const int64_t groups = statistics.sizes[0] / num_images, channels = out.sizes[1];
  const int64_t size = channels / groups, positions = out.sizes[0] / num_images;
  const int64_t width = size < Block::kWidth ? Block::kWidth / size * size : size;
  const auto run = [&](int64_t image, int64_t index, Span) {
    Block block;
    block.image = image, block.channel = index * width, block.per_group = size;
    block.group = image * groups + block.channel / size, block.positions = positions;
    block.stride = channels, block.element = image * positions * channels + block.channel;
    block.count = channels - block.channel < width ? channels - block.channel : width;
    block.weight = &at<float>(weight, block.channel), block.bias = &at<float>(bias, block.channel);
    const auto typed = [&](auto* elements) {
      silu ? body(block, elements, std::true_type()) : body(block, elements, std::false_type());
    };
    out.dtype == DType::kFloat32 ? typed(static_cast<float*>(out.data))
                                 : typed(static_cast<uint16_t*>(out.data));
  };
  // a block is given the place of a tile
  for_tiles(num_images, (channels + width - 1) / width * kTile, out.sizes[0] * channels, run);
}

void group_norm_silu(TensorView x_view, TensorView weight, TensorView bias, int64_t num_images,
                     double eps, bool silu, TensorView y_view, TensorView statistics) {
  const auto run = [&](Block& block, auto* y, auto activated) {
    const auto* x = static_cast<decltype(y)>(x_view.data);
    block.for_elements([&](int64_t i, int64_t c) {
      const double value = get(x + i);
      block.sums[0][c] += value, block.sums[1][c] += value * value;
    });
    for (int64_t c = 0; c < block.count; c += block.per_group) {
      const double mean = block.average(0, c, false);
      const double variance = std::fmax(block.average(1, c, false) - mean * mean, 0.0);
      at<float>(statistics, block.group + c / block.per_group, 0) = static_cast<float>(mean);
      at<float>(statistics, block.group + c / block.per_group, 1) =
          static_cast<float>(1.0 / std::sqrt(variance + eps));
    }
    block.read(statistics);
    block.for_elements([&](int64_t i, int64_t c) {
      const float z = block.z(block.xhat(get(x + i), c), c);
      put(y + i, activated ? z * sigmoid(z) : z);
    });
  };
  for_blocks(weight, bias, statistics, num_images, silu, y_view, run);
}

void group_norm_silu_backward(TensorView grad_view, TensorView x_view, TensorView weight,
                              TensorView bias, TensorView statistics, int64_t num_images, bool silu,
                              TensorView dx_view, TensorView dweight, TensorView dbias) {
  Partials totals[2] = {{x_view.sizes[1], num_images}, {x_view.sizes[1], num_images}};
  const auto run = [&](Block& block, auto* dx, auto activated) {
    const auto* x = static_cast<decltype(dx)>(x_view.data);
    const auto* grad = static_cast<decltype(dx)>(grad_view.data);
    block.read(statistics);
    const auto dz_of = [&](int64_t i, int64_t c, float xhat) {
      const float z = block.z(xhat, c), gate = sigmoid(z);
      return get(grad + i) * (activated ? gate * (1.0f + z * (1.0f - gate)) : 1.0f);
    };
    block.for_elements([&](int64_t i, int64_t c) {
      const float xhat = block.xhat(get(x + i), c), dz = dz_of(i, c, xhat);
      block.sums[0][c] += dz, block.sums[1][c] += dz * xhat;
    });
    float means[2][Block::kMaxChannels];
    for (int which = 0; which < 2; ++which)
      for (int64_t c = 0; c < block.count; ++c) {
        totals[which].at(block.channel + c, block.image) = block.sums[which][c];
        means[which][c] = c % block.per_group ? means[which][c - 1]
                                              : static_cast<float>(block.average(which, c, true));
      }
    block.for_elements([&](int64_t i, int64_t c) {
      const float xhat = block.xhat(get(x + i), c), dxhat = dz_of(i, c, xhat) * block.weight[c];
      put(dx + i, block.rstd[c] * (dxhat - means[0][c] - xhat * means[1][c]));
    });
  };
  for_blocks(weight, bias, statistics, num_images, silu, dx_view, run);
  for (int64_t c = 0; c < x_view.sizes[1]; ++c) {
    at<float>(dbias, c) = static_cast<float>(totals[0].total(c));
    at<float>(dweight, c) = static_cast<float>(totals[1].total(c));
  }
}

}  // namespace branchcore::cpu::BRANCHCORE_ISA
