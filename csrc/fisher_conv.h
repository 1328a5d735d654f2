// Fisher diagonal of a convolution's weight without unfolding its input, which is channels last:
//   fisher[o, c, k] += sum_n w_n (sum_{m, l} G[n, m, l, o] X[n, m, l * stride - padding + k * dilation, c])^2
#pragma once

#include <cstdint>

#include "dtype.h"

namespace wplfast {

struct FisherConvCall {
  void* fisher;              // [C_out, C_in / groups, *K], compute type, contiguous
  void* gradient;            // the same, or null
  const void* inputs;        // X [N, M, *S, C_in], contiguous
  const void* grad_outputs;  // G [N, M, *L, C_out], contiguous; or [N, C_out, M, *L]
  bool channels_first;       // the latter
  const double* weights;     // [N], or null
  int64_t n_samples, n_images;
  int64_t c_in, c_out, groups;
  // Three spatial dimensions; of fewer, the first are one (and their padding zero).
  int64_t size[3], positions[3], kernel[3];
  int64_t stride[3], padding[3], dilation[3];
  Dtype dtype;  // of X and G; fisher and gradient are double for f64 and float otherwise
  int threads;
};

// Gives the same bits for every number of threads.
void fisher_conv(const FisherConvCall& call);

}  // namespace wplfast
