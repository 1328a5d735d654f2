// Matrices transposed in memory: to[n][c][r] = from[n][r][c], such as images from channels first to channels last.
#pragma once

#include <cstdint>

namespace wplfast {

struct TurnCall {
  const void* from;  // [n_matrices, n_rows, n_columns], contiguous
  void* to;          // [n_matrices, n_columns, n_rows], contiguous
  int64_t n_matrices, n_rows, n_columns;
  int64_t element_bytes;  // 2, 4 or 8
  int threads;
};

void turn(const TurnCall& call);

}  // namespace wplfast
