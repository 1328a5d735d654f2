// The weight plasticity penalty over many tensors in one parallel region:
//   value = sum_p alpha_p/2 sum_i F_pi d_pi^2 + l2/2 sum_i theta_pi^2,   d = (theta - theta_hat) - offset
//   gradient_pi = alpha_p F_pi d_pi + l2 theta_pi
#pragma once

#include <cstdint>

#include "dtype.h"

namespace wplfast {

enum class PenaltyMode : int { value = 0, store = 1, add = 2 };

// One parameter: a run of `numel` elements in each array.
struct Anchor {
  const void* theta;      // storage type
  const void* theta_hat;  // storage type
  const void* offset;     // compute type; null means zero
  const void* fisher;     // compute type, or bfloat16
  void* grad;             // storage type; unused by PenaltyMode::value; null in PenaltyMode::add adds the value alone
  int64_t numel;
  double alpha;
};

struct PenaltyCall {
  const Anchor* anchors;
  int64_t n_anchors;
  Dtype dtype;
  Dtype fisher_dtype;  // the compute type of dtype, or bfloat16
  PenaltyMode mode;
  double l2;
  double scale;     // PenaltyMode::add: grad += scale * gradient
  int64_t padding;  // PenaltyMode::store: zeros follow each gradient up to a multiple of this many elements
  int threads;
};

// Returns the value, the same bits for every number of threads.
double penalty(const PenaltyCall& call);

}  // namespace wplfast
