#include "scale_grads.h"

#include <algorithm>

#include "parallel.h"
#include "simd_prelude.h"

namespace wplfast {
namespace {

// Terms that one fp32 sum (a vector's lane) takes before it is added to a sum in double.
constexpr int64_t TERMS = 64;

// Columns of one item of work where those are contiguous.
constexpr int64_t STRIP = 256;

// Elements of one item of work where steps are contiguous, about.
constexpr int64_t ITEM = 32768;

// Elements per thread below which waking the thread costs more than it saves.
constexpr int64_t GRAIN = 65536;

// One sample's columns: strides as in Strided.
struct ScaleTask {
  const void* activations;
  const void* grad_outputs;
  int64_t stride_a, stride_g;  // of t where columns are contiguous, of d where steps are
  int64_t n_steps, columns;
  void* grads;
};

using ScaleFunction = void (*)(const ScaleTask& task);

}  // namespace
}  // namespace wplfast

#define WPLFAST_KERNEL "scale_grads_kernel.inl"
#include "for_each_isa.inl"

namespace wplfast {

void scale_grads(const ScaleGradsCall& call) {
  if (call.n_samples == 0 || call.size == 0) return;
  const bool by_steps = call.steps_are_contiguous;
  const ScaleFunction kernel = WPLFAST_PICK(selected_isa(), scale_kernel)(call.dtype, by_steps);
  const int64_t bytes = size_of(call.dtype), wide_bytes = call.dtype == Dtype::f64 ? 8 : 4;
  const int64_t strip = by_steps ? std::max<int64_t>(1, ITEM / std::max<int64_t>(1, call.n_steps)) : STRIP;
  const int64_t strips = (call.size + strip - 1) / strip;
  const int threads = threads_for(call.n_samples * call.n_steps * call.size, GRAIN, call.threads);
  const auto at = [&](const Strided& tensor, int64_t n, int64_t d) {
    return static_cast<const char*>(tensor.data) + (n * tensor.stride_n + d * tensor.stride_d) * bytes;
  };
  parallel_each(threads, call.n_samples * strips, [&](int, int64_t item) {
    const int64_t n = item / strips, first = item % strips * strip;
    kernel({at(call.activations, n, first), at(call.grad_outputs, n, first),
            by_steps ? call.activations.stride_d : call.activations.stride_t,
            by_steps ? call.grad_outputs.stride_d : call.grad_outputs.stride_t, call.n_steps,
            std::min(strip, call.size - first), static_cast<char*>(call.grads) + (n * call.size + first) * wide_bytes});
  });
}

}  // namespace wplfast
