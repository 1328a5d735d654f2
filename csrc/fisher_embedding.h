// Fisher diagonal of a table that rows are taken from; a sample's repeated rows are summed, then squared:
//   fisher[v] += sum_n w_n (sum_{t: indices[n, t] = v} G[n, t])^2
//   gradient[v] += sum_n w_n sum_{t: indices[n, t] = v} G[n, t]          (optional)
#pragma once

#include <cstdint>

#include "dtype.h"

namespace wplfast {

struct FisherEmbeddingCall {
  void* fisher;                              // [V, D], compute type, contiguous
  void* gradient;                            // the same, or null
  const int64_t* indices;                    // [N, T]; negative ones are left out
  const void* grad_outputs;                  // G [N, T, D], contiguous
  const double* weights;                     // [N], or null
  int64_t n_samples, n_steps, n_rows, size;  // N, T, V, D
  Dtype dtype;                               // of G; fisher and gradient are double for f64 and float otherwise
  int threads;
};

// Gives the same bits for every number of threads. Throws std::out_of_range, before anything is written, where an index
// is V or more.
void fisher_embedding(const FisherEmbeddingCall& call);

}  // namespace wplfast
