// A Fisher product, output[i, j] += sum_n w_n (sum_t rows[n, t, i] columns[n, t, j])^2, and how it is cut into pieces.
//
//   output [rows, columns]  ->  blocks, each computed by one thread at a time: its sums stay in that thread's L2 cache
//   samples                 ->  units, whose sums are added to the output in their order; the shape alone decides them
//   (n, t) rows of a unit   ->  chunks of at most CHUNK_ROWS: a packed column panel of a chunk stays in the L1 cache
//   block x chunk           ->  tiles of TILE_ROWS x 2 vectors, which stay in registers
//
// A block and unit's sums start from zero, so neither the blocks nor the threads change a bit of the output.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"
#include "sample_rows.h"

namespace wplfast {

// What happens to a tile after the last row of a sample.
enum class Epilogue : int {
  square,         // sum += w * tile^2 (and gradient += w * tile)
  square_packed,  // T = 1: rows were squared when packed, so the product over samples is already the sum
  plain,          // T = 1, the gradient: nothing is squared
};

constexpr int64_t CHUNK_ROWS = 256;

// A chunk holds as many whole samples as fit; a longer sample is cut into pieces of nearly equal length.
inline int64_t samples_per_chunk(int64_t n_steps) { return n_steps >= CHUNK_ROWS ? 1 : CHUNK_ROWS / n_steps; }

// The most rows and columns of a block: one buffer of sums takes at most 192 KiB in fp32. Patches are rows that are not
// kept packed, which leaves room for more of them. A product that is one chunk keeps no sums, and what is packed takes
// a larger part of its time: its blocks are larger.
constexpr int64_t BLOCK_ROWS = 192;
constexpr int64_t BLOCK_PATCH_ROWS = 576;
constexpr int64_t BLOCK_COLUMNS = 256;
constexpr int64_t BLOCK_PATCH_COLUMNS = 128;
constexpr int64_t BLOCK_CHUNK_ROWS = 384;
constexpr int64_t BLOCK_CHUNK_COLUMNS = 512;

// One side of the product. Element i of a matrix's row belongs to the output's row or column at i * output_stride;
// column (k, c) of patches belongs to the one at c * taps + k, where PyTorch's layout has it.
struct Side {
  bool is_patches;
  SampleMatrix matrix;
  SamplePatches patches;
  int64_t output_stride;

  int64_t size() const { return is_patches ? patches.columns() : matrix.size; }
};

struct ProductPlan {
  Side row_side, column_side;
  int64_t n_samples, n_steps;
  const void* weights;  // [n_samples] in the compute type, or null
  void* output;         // receives the sums of the epilogue
  void* gradient;       // null, or receives the plain sums (Epilogue::square only)
  Epilogue epilogue;
  int64_t unit_samples;
  int64_t row_panels, column_panels;  // register tiles along each side
  int64_t row_blocks, column_blocks;  // blocks along each side

  int64_t n_blocks() const { return row_blocks * column_blocks; }
  int64_t n_units() const { return (n_samples + unit_samples - 1) / unit_samples; }
  bool is_one_chunk() const { return n_samples * n_steps <= CHUNK_ROWS; }
};

// A contiguous range of panels.
struct PanelRange {
  int64_t begin, end;
};

inline PanelRange panels_of_block(int64_t block, int64_t n_blocks, int64_t n_panels) {
  return {n_panels * block / n_blocks, n_panels * (block + 1) / n_blocks};
}

// Tile shape and entry points of one instruction set and dtype. A block's sums lie tile by tile in an array of
// block_elements(plan) of the compute type, and the plain sums in another if plan.gradient is set.
struct ProductKernel {
  int64_t tile_rows, tile_columns;
  int64_t (*block_elements)(const ProductPlan& plan);
  int64_t (*workspace_bytes)(const ProductPlan& plan);  // of one thread
  // Stores the sums of one unit of samples, or adds them to the output right away if the product is one chunk: each
  // tile is complete then. columns_are_packed: the workspace was last used for a block of the same columns of it.
  void (*multiply)(const ProductPlan& plan, int64_t block, int64_t unit, bool columns_are_packed, void* workspace,
                   void* sums, void* gradient);
  // Adds stored sums to the output, and to plan.gradient.
  void (*flush)(const ProductPlan& plan, int64_t block, const void* sums, const void* gradient);
};

// A product to compute; `rows` and `columns` may be exchanged, and `groups` products lie beside each other: each of the
// pointers advances by its step, in elements, from one to the next.
struct Product {
  Side rows, columns;
  int64_t n_groups;
  int64_t rows_step, columns_step, output_step;
  void* fisher;
  void* gradient;         // or null
  const double* weights;  // [n_samples], or null
  int64_t n_samples, n_steps;
  Dtype dtype;
  int threads;
};

// Gives the same bits for every number of threads.
void fisher_product(const Product& product);

// Elements of one group's output when it is padded to whole tiles, in the better orientation.
int64_t padded_area(int64_t rows, int64_t columns, Dtype dtype);

// Samples whose squares are summed before they are added to the output: a function of the shape alone.
int64_t samples_per_unit(int64_t n_samples, int64_t n_steps);

}  // namespace wplfast
