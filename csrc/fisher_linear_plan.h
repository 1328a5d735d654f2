// How a Fisher product is cut into blocks of the output, chunks of the (n, t) rows and register tiles.
//
//   output [rows, columns]  ->  blocks, each owned by one thread: its sums stay in that thread's L2 cache
//   (n, t) rows             ->  chunks of at most CHUNK_ROWS: a packed column panel of a chunk stays in the L1 cache
//   block x chunk           ->  tiles of TILE_ROWS x 2 vectors, which stay in registers
#pragma once

#include <cstdint>

#include "fisher_linear.h"

namespace wplfast {

// What happens to a tile after the last row of a sample.
enum class Epilogue : int {
  square,         // sum += w * tile^2 (and gradient += w * tile)
  square_packed,  // T = 1: rows were squared when packed, so the product over samples is already the sum
  plain,          // T = 1, the gradient: nothing is squared
};

constexpr int64_t CHUNK_ROWS = 192;

// Squares are summed in fp32 over at most about this many samples before they are added to the result, so that the
// rounding error of long sums grows with the square root of their length at most.
constexpr int64_t FLUSH_SAMPLES = 128;

// The most rows and columns of a block: one buffer of sums takes at most 192 KiB in fp32.
constexpr int64_t BLOCK_ROWS = 192;
constexpr int64_t BLOCK_COLUMNS = 256;

struct FisherLinearPlan {
  SampleMatrix row_side, column_side;  // the output's rows and columns; swapped where that wastes less padding
  int64_t row_stride, column_stride;   // of the output
  int64_t n_samples, n_steps;
  const void* weights;  // [n_samples] in the compute type, or null
  void* output;         // receives the sums of the epilogue
  void* gradient;       // null, or receives the plain sums (Epilogue::square only)
  Epilogue epilogue;
  int64_t row_panels, column_panels;  // register tiles along each side
  int64_t row_blocks, column_blocks;  // blocks along each side
};

// A contiguous range of panels.
struct PanelRange {
  int64_t begin, end;
};

inline PanelRange panels_of_block(int64_t block, int64_t n_blocks, int64_t n_panels) {
  return {n_panels * block / n_blocks, n_panels * (block + 1) / n_blocks};
}

// Tile shape and entry points of one instruction set and dtype.
struct FisherLinearKernel {
  int64_t tile_rows, tile_columns;
  int64_t (*workspace_bytes)(const FisherLinearPlan& plan);  // of one thread
  void (*run_block)(const FisherLinearPlan& plan, int64_t block, void* workspace);
};

}  // namespace wplfast
