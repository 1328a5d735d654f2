#include "fisher_product.h"

#include <algorithm>
#include <utility>

#include "parallel.h"
#include "scratch.h"
#include "simd_prelude.h"

#define WPLFAST_KERNEL "fisher_product_kernel.inl"
#include "for_each_isa.inl"

namespace wplfast {
namespace {

// Multiply-adds per thread below which waking the thread costs more than it saves.
constexpr int64_t GRAIN = 1 << 20;

// Packing a block costs about as much as this many rows or columns more of its product.
constexpr double PACKING = 8;

// Rows of a unit, so that adding its sums to the output costs little beside computing them; and the most units, so
// that few small numbers are added to a large one.
constexpr int64_t UNIT_ROWS = 2048;
constexpr int64_t MOST_UNITS = 32;

// Squares are summed in fp32 over at most about this many samples before they are added to the result, so that the
// rounding error of long sums grows with the square root of their length at most. With T = 1, a chunk's sum is a term.
constexpr int64_t UNIT_SAMPLES = 128;

// Elements of the sums that units in parallel may keep until they are added up.
constexpr int64_t MOST_PARTIAL_SUMS = int64_t{1} << 22;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

ProductKernel kernel_for(Dtype dtype) { return WPLFAST_PICK(selected_isa(), product_kernel)(dtype); }

int64_t padded(int64_t rows, int64_t columns, const ProductKernel& kernel) {
  return ceil_div(rows, kernel.tile_rows) * kernel.tile_rows * ceil_div(columns, kernel.tile_columns) *
         kernel.tile_columns;
}

// Chooses the number of blocks: at least what the caches ask for, and then what leaves the busiest thread least to do.
// Returns whether units of samples should be computed in parallel too.
bool choose_blocks(ProductPlan& plan, const ProductKernel& kernel, int64_t n_plans, int threads) {
  const bool patches = plan.row_side.is_patches, one_chunk = plan.is_one_chunk();
  const int64_t most_rows = patches ? BLOCK_PATCH_ROWS : one_chunk ? BLOCK_CHUNK_ROWS : BLOCK_ROWS;
  const int64_t most_columns = patches ? BLOCK_PATCH_COLUMNS : one_chunk ? BLOCK_CHUNK_COLUMNS : BLOCK_COLUMNS;
  const int64_t least_rows = ceil_div(plan.row_panels * kernel.tile_rows, most_rows);
  const int64_t least_columns = ceil_div(plan.column_panels * kernel.tile_columns, most_columns);
  const int64_t units = plan.n_units();
  const int64_t sums = n_plans * plan.row_panels * plan.column_panels * kernel.tile_rows * kernel.tile_columns * units;
  const bool may_split = threads > 1 && units > 1 && sums <= MOST_PARTIAL_SUMS;
  bool splits = false;
  double best = 0;
  for (int64_t r = least_rows; r <= std::min(plan.row_panels, least_rows + 8 + threads); ++r) {
    for (int64_t c = least_columns; c <= std::min(plan.column_panels, least_columns + 8 + threads); ++c) {
      const double rows = static_cast<double>(ceil_div(plan.row_panels, r) * kernel.tile_rows);
      const double columns = static_cast<double>(ceil_div(plan.column_panels, c) * kernel.tile_columns);
      for (int64_t parts : {int64_t{1}, may_split ? units : int64_t{1}}) {
        const double turns =
            static_cast<double>(ceil_div(n_plans * r * c * parts, threads)) / static_cast<double>(parts);
        const double cost = turns * (rows + PACKING) * (columns + PACKING);
        if (best == 0 || cost < best) {
          best = cost;
          plan.row_blocks = r;
          plan.column_blocks = c;
          splits = parts > 1;
        }
      }
    }
  }
  return splits;
}

void run(const std::vector<ProductPlan>& plans, const ProductKernel& kernel, bool splits, int threads) {
  thread_local Scratch scratch;
  const ProductPlan& first = plans[0];
  const int64_t blocks = first.n_blocks(), items = blocks * static_cast<int64_t>(plans.size()), units = first.n_units();
  const int64_t sums_bytes = first.is_one_chunk() ? 0 : ceil_div(kernel.block_elements(first) * 8, 64) * 64;
  const int64_t both_bytes = first.gradient == nullptr ? sums_bytes : 2 * sums_bytes;
  const int64_t work_bytes = ceil_div(kernel.workspace_bytes(first), 64) * 64;
  threads = static_cast<int>(std::min<int64_t>(threads, splits ? items * units : items));
  char* workspace = scratch.at_least(threads * work_bytes + (splits ? items * units : threads) * both_bytes);
  char* all_sums = workspace + threads * work_bytes;
  if (splits) {
    parallel_each(threads, items * units, [&](int thread, int64_t part) {
      const int64_t item = part / units;
      char* sums = all_sums + part * both_bytes;
      kernel.multiply(plans[item / blocks], item % blocks, part % units, false, workspace + thread * work_bytes, sums,
                      sums + sums_bytes);
    });
  }
  // Blocks of the same columns follow one another. With one chunk their columns are packed once for all that a thread
  // takes in a row: for short products packing is a sixth of the time.
  std::vector<int64_t> packed(threads, -1);
  parallel_each(threads, items, [&](int thread, int64_t item) {
    const ProductPlan& plan = plans[item / blocks];
    const int64_t columns = item / plan.row_blocks;
    const bool are_packed = plan.is_one_chunk() && packed[thread] == columns;
    packed[thread] = columns;
    for (int64_t unit = 0; unit < units; ++unit) {
      char* sums = all_sums + (splits ? item * units + unit : thread) * both_bytes;
      if (!splits) {
        kernel.multiply(plan, item % blocks, unit, are_packed, workspace + thread * work_bytes, sums,
                        sums + sums_bytes);
      }
      if (!plan.is_one_chunk()) kernel.flush(plan, item % blocks, sums, sums + sums_bytes);
    }
  });
}

// Moves a side to group `group`.
Side advanced(Side side, int64_t elements, Dtype dtype) {
  const int64_t bytes = elements * size_of(dtype);
  side.matrix.data = side.is_patches ? nullptr : static_cast<const char*>(side.matrix.data) + bytes;
  side.patches.data = side.is_patches ? static_cast<const char*>(side.patches.data) + bytes : nullptr;
  return side;
}

}  // namespace

int64_t padded_area(int64_t rows, int64_t columns, Dtype dtype) {
  const ProductKernel kernel = kernel_for(dtype);
  return std::min(padded(rows, columns, kernel), padded(columns, rows, kernel));
}

int64_t samples_per_unit(int64_t n_samples, int64_t n_steps) {
  const int64_t per_chunk = samples_per_chunk(n_steps);
  const int64_t wanted = std::max(ceil_div(UNIT_ROWS, n_steps), ceil_div(n_samples, MOST_UNITS));
  const int64_t most = n_steps == 1 ? UNIT_SAMPLES * CHUNK_ROWS : UNIT_SAMPLES;
  return ceil_div(std::min(wanted, most), per_chunk) * per_chunk;
}

void fisher_product(const Product& product) {
  ProductPlan plan{};
  const int64_t n_rows = product.rows.size(), n_columns = product.columns.size();
  if (n_rows == 0 || n_columns == 0 || product.n_samples == 0 || product.n_steps == 0) return;
  const ProductKernel kernel = kernel_for(product.dtype);
  const int64_t area = padded(n_rows, n_columns, kernel), swapped_area = padded(n_columns, n_rows, kernel);
  // Patches are packed more quickly as rows, all of a matrix's columns at once.
  const bool swapped = swapped_area < area || (product.columns.is_patches && swapped_area * 8 <= area * 9);
  plan.row_side = swapped ? product.columns : product.rows;
  plan.column_side = swapped ? product.rows : product.columns;
  plan.n_samples = product.n_samples;
  plan.n_steps = product.n_steps;
  plan.unit_samples = samples_per_unit(product.n_samples, product.n_steps);
  plan.row_panels = ceil_div(swapped ? n_columns : n_rows, kernel.tile_rows);
  plan.column_panels = ceil_div(swapped ? n_rows : n_columns, kernel.tile_columns);

  std::vector<float> narrow_weights;
  plan.weights = product.weights;
  if (product.weights != nullptr && product.dtype != Dtype::f64) {
    narrow_weights.assign(product.weights, product.weights + product.n_samples);
    plan.weights = narrow_weights.data();
  }
  const int64_t work = product.n_groups * n_rows * n_columns * product.n_samples * product.n_steps;
  const int threads = threads_for(work, GRAIN, product.threads);
  const bool splits = choose_blocks(plan, kernel, product.n_groups, threads);

  const bool squares_rows = product.n_steps == 1;
  const int64_t step = product.output_step * (product.dtype == Dtype::f64 ? 8 : 4);
  for (const bool to_gradient : {false, true}) {
    if (to_gradient && (product.gradient == nullptr || !squares_rows)) continue;
    plan.epilogue = to_gradient ? Epilogue::plain : squares_rows ? Epilogue::square_packed : Epilogue::square;
    std::vector<ProductPlan> plans(product.n_groups, plan);
    for (int64_t group = 0; group < product.n_groups; ++group) {
      ProductPlan& own = plans[group];
      own.row_side = advanced(product.rows, group * product.rows_step, product.dtype);
      own.column_side = advanced(product.columns, group * product.columns_step, product.dtype);
      if (swapped) std::swap(own.row_side, own.column_side);
      own.output = static_cast<char*>(to_gradient ? product.gradient : product.fisher) + group * step;
      if (product.gradient != nullptr && !squares_rows) {
        own.gradient = static_cast<char*>(product.gradient) + group * step;
      }
    }
    run(plans, kernel, splits, threads);
  }
}

}  // namespace wplfast
