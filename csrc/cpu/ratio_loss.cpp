// The clipped ratio loss on (E,) vectors, its gradient and statistics: one pass, fp64, edge order.
#include <cmath>

#include "cpu/tile.h"
#include "edge_math.h"
#include "ops.h"

namespace branchcore::cpu::BRANCHCORE_ISA {

// Fields of RatioStats, in their order.
struct Stats {
  double edges = 0, clipped_low = 0, clipped_high = 0;
  double sum_abs_dev = 0, max_abs_dev = 0, sum_log_ratio_sq = 0, sum_log_ratio = 0;

  void add(const RatioTerm& term, double ratio, double log_ratio) {
    const double dev = std::fabs(ratio - 1.0);
    edges += 1.0;
    clipped_low += term.clipped_low;
    clipped_high += term.clipped_high;
    sum_abs_dev += dev;
    max_abs_dev = larger(max_abs_dev, dev);
    sum_log_ratio_sq += log_ratio * log_ratio;
    sum_log_ratio += log_ratio;
  }
};

void ratio_loss(TensorView p, TensorView q, TensorView child_start, TensorView exponent,
                TensorView advantage, TensorView weight, double low, double high, TensorView loss,
                TensorView stats, TensorView grad_p, TensorView grad_q) {
  check_child_start("ratio_loss", child_start, p.sizes[0]);
  Stats met;
  double total = 0.0;
  for (int64_t n = 0; n < q.sizes[0]; ++n) {
    double grad_q_n = 0.0;
    for (int64_t e = at<int64_t>(child_start, n); e < at<int64_t>(child_start, n + 1); ++e) {
      const double w = number(weight, e), lin = at<double>(exponent, e, 0);
      const double quad = at<double>(exponent, e, 1);
      at<float>(grad_p, e) = 0.0f;
      if (w == 0.0) continue;
      const double log_ratio = lin * at<float>(p, e) - quad * at<float>(q, n);
      const double ratio = std::exp(log_ratio);
      const RatioTerm term = ratio_term(ratio, number(advantage, e, 0), number(advantage, e, 1),
                                        1.0 - low, 1.0 + high);
      total += w * term.loss;
      at<float>(grad_p, e) = w * term.slope * lin;
      grad_q_n -= w * term.slope * quad;
      met.add(term, ratio, log_ratio);
    }
    at<float>(grad_q, n) = grad_q_n;
  }
  at<float>(loss, 0) = total;
  const double fields[] = {met.edges,       met.clipped_low,      met.clipped_high, met.sum_abs_dev,
                           met.max_abs_dev, met.sum_log_ratio_sq, met.sum_log_ratio};
  for (int i = 0; i < 7; ++i) at<float>(stats, i) = fields[i];
}

}  // namespace branchcore::cpu::BRANCHCORE_ISA
