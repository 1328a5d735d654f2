#include "fisher_groups.h"

#include <algorithm>

#include "fisher_product.h"
#include "parallel.h"
#include "scratch.h"
#include "simd_prelude.h"

#define WPLFAST_KERNEL "fisher_groups_kernel.inl"
#include "for_each_isa.inl"

namespace wplfast {
namespace {

// Multiply-adds per thread below which waking the thread costs more than it saves.
constexpr int64_t GRAIN = 1 << 18;

// Strips that keep every thread busy; with fewer, units of samples are computed in parallel too, if their sums are few.
constexpr int64_t STRIPS_PER_THREAD = 4;
constexpr int64_t MOST_PARTIAL_SUMS = int64_t{1} << 22;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

GroupsKernel kernel_for(Dtype dtype) { return WPLFAST_PICK(selected_isa(), groups_kernel)(dtype); }

// Adds a strip's sums to the output, where PyTorch's layout has them.
template <class C>
void add_strip(const GroupsPlan& plan, int64_t first, int64_t strip_lanes, const C* sums, void* output) {
  const int64_t columns = plan.patches.columns(), channels = plan.patches.channels, taps = plan.patches.taps();
  const int64_t width = std::min(strip_lanes, plan.c_out - first);
  C* to = static_cast<C*>(output) + first * columns;
  for (int64_t lane = 0; lane < width; ++lane) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (int64_t tap = 0; tap < taps; ++tap) *to++ += sums[(tap * channels + channel) * strip_lanes + lane];
    }
  }
}

template <class C>
void run(const FisherConvCall& call, const GroupsPlan& plan, const GroupsKernel& kernel) {
  thread_local Scratch scratch;
  const int64_t lanes = kernel.lanes_per_strip;
  const int64_t strips = ceil_div(plan.c_out, lanes), units = ceil_div(plan.n_samples, plan.unit_samples);
  const int64_t length = ceil_div(plan.patches.columns() * lanes, 16) * 16;
  const int64_t work_length = ceil_div(kernel.workspace_elements(plan), 16) * 16;
  const int64_t work = plan.n_samples * plan.patches.rows() * plan.patches.columns() * plan.c_out;
  int threads = threads_for(work, GRAIN, call.threads);
  const bool splits =
      threads > 1 && units > 1 && strips < STRIPS_PER_THREAD * threads && strips * units * length <= MOST_PARTIAL_SUMS;
  threads = static_cast<int>(std::min<int64_t>(threads, splits ? strips * units : strips));
  const int64_t elements = threads * work_length + (splits ? strips * units : threads) * 2 * length;
  C* workspace = reinterpret_cast<C*>(scratch.at_least(elements * static_cast<int64_t>(sizeof(C))));
  C* all_sums = workspace + threads * work_length;
  if (splits) {
    parallel_each(threads, strips * units, [&](int thread, int64_t part) {
      C* sums = all_sums + part * 2 * length;
      kernel.sum_strip(plan, part / units, part % units, workspace + thread * work_length, sums, sums + length);
    });
  }
  parallel_each(threads, strips, [&](int thread, int64_t strip) {
    for (int64_t unit = 0; unit < units; ++unit) {
      C* sums = all_sums + (splits ? strip * units + unit : thread) * 2 * length;
      if (!splits) kernel.sum_strip(plan, strip, unit, workspace + thread * work_length, sums, sums + length);
      add_strip(plan, strip * lanes, lanes, sums, call.fisher);
      if (plan.has_gradient) add_strip(plan, strip * lanes, lanes, sums + length, call.gradient);
    }
  });
}

}  // namespace

int64_t fisher_groups_cost(const FisherConvCall& call) {
  const int64_t lanes = kernel_for(call.dtype).lanes_per_strip / 2;
  const int64_t columns = call.c_in / call.groups * call.kernel[0] * call.kernel[1] * call.kernel[2];
  // Loads bound it; and where output channels share an input channel, that is copied to each one by one.
  return ceil_div(call.c_out, lanes) * lanes * columns * (call.c_out > call.groups ? 8 : 3) / 2;
}

void fisher_groups(const FisherConvCall& call, const SamplePatches& patches) {
  const GroupsPlan plan{patches,
                        call.grad_outputs,
                        call.weights,
                        call.n_samples,
                        samples_per_unit(call.n_samples, patches.rows()),
                        call.c_out,
                        call.c_out / call.groups,
                        call.gradient != nullptr};
  if (call.dtype == Dtype::f64) {
    run<double>(call, plan, kernel_for(call.dtype));
  } else {
    run<float>(call, plan, kernel_for(call.dtype));
  }
}

}  // namespace wplfast
