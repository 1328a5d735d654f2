// Fisher diagonal of a linear layer without the per-sample gradients [N, D_out, D_in]:
//   fisher[o, i] += sum_n w_n (sum_t G[n, t, o] A[n, t, i])^2
//   gradient[o, i] += sum_n w_n sum_t G[n, t, o] A[n, t, i]          (optional)
#pragma once

#include <cstdint>

#include "dtype.h"
#include "sample_rows.h"

namespace wplfast {

struct FisherLinearCall {
  void* fisher;               // [D_out, D_in], compute type, contiguous
  void* gradient;             // the same, or null
  SampleMatrix grad_outputs;  // G
  SampleMatrix activations;   // A
  const double* weights;      // [N], or null
  int64_t n_samples, n_steps;
  Dtype dtype;  // of G and A; fisher and gradient are double for f64 and float otherwise
  int threads;
};

// Gives the same bits for every number of threads.
void fisher_linear(const FisherLinearCall& call);

}  // namespace wplfast
