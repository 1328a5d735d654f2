#include "fisher_linear.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#include "fisher_linear_plan.h"
#include "parallel.h"
#include "simd_prelude.h"

#define WPLFAST_KERNEL "fisher_linear_kernel.inl"
#include "for_each_isa.inl"

namespace wplfast {
namespace {

// Multiply-adds per thread below which waking the thread costs more than it saves.
constexpr int64_t GRAIN = 1 << 20;

// Packing a block costs about as much as this many rows or columns more of its product.
constexpr double PACKING = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of the output, padded to whole tiles, when its rows are the first size and its columns the second.
int64_t padded_area(int64_t rows, int64_t columns, const FisherLinearKernel& kernel) {
  return ceil_div(rows, kernel.tile_rows) * kernel.tile_rows * ceil_div(columns, kernel.tile_columns) *
         kernel.tile_columns;
}

// Chooses the number of blocks: at least what the caches ask for, and then what leaves the busiest thread least to do.
void choose_blocks(FisherLinearPlan& plan, const FisherLinearKernel& kernel, int threads) {
  const int64_t least_rows = ceil_div(plan.row_panels * kernel.tile_rows, BLOCK_ROWS);
  const int64_t least_columns = ceil_div(plan.column_panels * kernel.tile_columns, BLOCK_COLUMNS);
  double best = 0;
  for (int64_t r = least_rows; r <= std::min(plan.row_panels, least_rows + 8 + threads); ++r) {
    for (int64_t c = least_columns; c <= std::min(plan.column_panels, least_columns + 8 + threads); ++c) {
      const double rows = static_cast<double>(ceil_div(plan.row_panels, r) * kernel.tile_rows);
      const double columns = static_cast<double>(ceil_div(plan.column_panels, c) * kernel.tile_columns);
      const double turns = static_cast<double>(ceil_div(r * c, threads));
      const double cost = turns * (rows + PACKING) * (columns + PACKING);
      if (best == 0 || cost < best) {
        best = cost;
        plan.row_blocks = r;
        plan.column_blocks = c;
      }
    }
  }
}

// Memory that a calling thread keeps between calls: about a megabyte per worker, whose pages would otherwise be
// returned and faulted in again by each call, which costs more than a small product.
class Scratch {
 public:
  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset(static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Delete {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<char, Delete> memory_;
  int64_t size_ = 0;
};

void run(const FisherLinearPlan& plan, const FisherLinearKernel& kernel, int threads) {
  thread_local Scratch scratch;
  const int64_t n_blocks = plan.row_blocks * plan.column_blocks;
  threads = static_cast<int>(std::min<int64_t>(threads, n_blocks));
  const int64_t bytes = (kernel.workspace_bytes(plan) + 63) / 64 * 64;
  char* workspace = scratch.at_least(threads * bytes);
  // Each block is computed by one thread from first sample to last, so who takes it does not change the result.
  parallel_each(threads, n_blocks,
                [&](int thread, int64_t block) { kernel.run_block(plan, block, workspace + thread * bytes); });
}

}  // namespace

void fisher_linear(const FisherLinearCall& call) {
  const int64_t d_out = call.grad_outputs.size, d_in = call.activations.size;
  if (d_out == 0 || d_in == 0 || call.n_samples == 0 || call.n_steps == 0) return;
  const FisherLinearKernel kernel = WPLFAST_PICK(selected_isa(), fisher_linear_kernel)(call.dtype);

  FisherLinearPlan plan{};
  plan.n_samples = call.n_samples;
  plan.n_steps = call.n_steps;
  plan.row_side = call.grad_outputs;
  plan.column_side = call.activations;
  plan.row_stride = d_in;
  plan.column_stride = 1;
  if (padded_area(d_in, d_out, kernel) < padded_area(d_out, d_in, kernel)) {
    std::swap(plan.row_side, plan.column_side);
    std::swap(plan.row_stride, plan.column_stride);
  }
  plan.row_panels = ceil_div(plan.row_side.size, kernel.tile_rows);
  plan.column_panels = ceil_div(plan.column_side.size, kernel.tile_columns);

  std::vector<float> narrow_weights;
  plan.weights = call.weights;
  if (call.weights != nullptr && call.dtype != Dtype::f64) {
    narrow_weights.assign(call.weights, call.weights + call.n_samples);
    plan.weights = narrow_weights.data();
  }
  const int64_t work = d_out * d_in * call.n_samples * call.n_steps;
  const int threads = threads_for(work, GRAIN, call.threads);
  choose_blocks(plan, kernel, threads);

  plan.output = call.fisher;
  if (call.n_steps > 1) {
    plan.epilogue = Epilogue::square;
    plan.gradient = call.gradient;
    run(plan, kernel, threads);
    return;
  }
  plan.epilogue = Epilogue::square_packed;
  run(plan, kernel, threads);
  if (call.gradient != nullptr) {
    plan.epilogue = Epilogue::plain;
    plan.output = call.gradient;
    run(plan, kernel, threads);
  }
}

}  // namespace wplfast
