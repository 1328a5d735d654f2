// A newer anchor enters the anchors of many tensors, in place and in one parallel region. Per element:
//   total = decay F + weight F_new,   F <- total,   theta_hat <- theta_new
//   replace: offset <- 0
//   merge:   offset <- decay F / total gap,   c += decay F weight F_new / total gap^2,
//            gap = theta_hat + offset - theta_new
#pragma once

#include <cstdint>

#include "dtype.h"

namespace wplfast {

// One parameter: a run of `numel` elements in each array, none of which overlap.
struct AnchorUpdate {
  void* theta_hat;            // storage type
  void* offset;               // compute type; null where there is none, which a merge needs
  void* fisher;               // compute type, or bfloat16
  const void* new_theta_hat;  // storage type
  const void* new_fisher;     // double, or float beside a compute type of float
  int64_t numel;
  Dtype dtype, fisher_dtype, new_fisher_dtype;
  double decay, weight;
};

struct ConsolidateCall {
  const AnchorUpdate* updates;
  int64_t n_updates;
  bool merge;
  int threads;
};

// Changes the anchors.
void consolidate(const ConsolidateCall& call);

// Changes nothing; writes what c would gain (0 unless merging) and the sum of the squares of F as it would be before it
// is rounded, one of each per update. The same bits for every number of threads.
void measure_consolidation(const ConsolidateCall& call, double* added, double* squares);

}  // namespace wplfast
