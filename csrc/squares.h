// fisher[j] += sum_n w_n grads[n, j]^2 over contiguous per-sample gradients [N, M].
#pragma once

#include <cstdint>

#include "dtype.h"

namespace wplfast {

struct SquaresCall {
  void* fisher;           // [M], compute type
  const void* grads;      // [N, M], storage type
  const double* weights;  // [N], or null
  int64_t n_samples, numel;
  Dtype dtype;
  int threads;
};

// Gives the same bits for every number of threads.
void accumulate_squares(const SquaresCall& call);

}  // namespace wplfast
