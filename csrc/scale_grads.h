// Per-sample gradients of an elementwise scale, in one pass: grads[n, d] = sum_t A[n, t, d] G[n, t, d].
#pragma once

#include <cstdint>

#include "dtype.h"

namespace wplfast {

// A tensor [N, T, D]; strides count elements.
struct Strided {
  const void* data;
  int64_t stride_n, stride_t, stride_d;
};

struct ScaleGradsCall {
  void* grads;  // [N, D], compute type, contiguous
  Strided activations, grad_outputs;
  int64_t n_samples, n_steps, size;  // N, T, D
  bool steps_are_contiguous;         // stride_t is 1 in both; otherwise stride_d is
  Dtype dtype;                       // of A and G; grads is double for f64 and float otherwise
  int threads;
};

// Gives the same bits for every number of threads.
void scale_grads(const ScaleGradsCall& call);

}  // namespace wplfast
