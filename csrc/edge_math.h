// Scalar maths of one edge, inline for host and device.
// Specification: branchcore/reference/ratio_loss.py and branch_step.py.
#pragma once

#include "noise.h"

namespace branchcore {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

// Mean log-probability per element of a Gaussian draw, from the mean of eps^2.
BC_INLINE double gaussian_log_prob(double mean_square, double log_s) {
  return -0.5 * mean_square - log_s - kHalfLog2Pi;
}

// The larger of two; NaN if either is.
BC_INLINE double larger(double a, double b) { return b > a || b != b ? b : a; }

struct RatioTerm {
  double loss;   // -A+ min(r, 1 + high) + A- max(r, 1 - low)
  double slope;  // d loss / d log r
  bool clipped_low, clipped_high;
};

// `low` and `high` are the bounds of the ratio itself; at a bound the gradient passes.
BC_INLINE RatioTerm ratio_term(double ratio, double plus, double minus, double low, double high) {
  RatioTerm term = {0.0, 0.0, minus > 0.0 && ratio < low, plus > 0.0 && ratio > high};
  if (plus > 0.0) {
    term.loss -= plus * (term.clipped_high ? high : ratio);
    term.slope -= term.clipped_high ? 0.0 : plus * ratio;
  }
  if (minus > 0.0) {
    term.loss += minus * (term.clipped_low ? low : ratio);
    term.slope += term.clipped_low ? 0.0 : minus * ratio;
  }
  return term;
}

}  // namespace branchcore
