#include "squares.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "simd_prelude.h"

namespace wplfast {
namespace {

using SquareStripFunction = void (*)(const void* grads, int64_t row_stride, const double* weights, int64_t n_samples,
                                     int64_t columns, double* to);

// Columns of one item of work: its fp32 and fp64 sums fit the L1 cache, and each row of it is one page of memory.
constexpr int64_t STRIP = 1024;

// Terms of one fp32 sum; beyond that, sums are added up in double.
constexpr int64_t SAMPLES_PER_SUM = 64;

// Samples of one item, for matrices with too few columns to occupy all threads otherwise.
constexpr int64_t SAMPLES_PER_ITEM = 2048;

// Elements per thread below which waking the thread costs more than it saves.
constexpr int64_t GRAIN = 65536;

}  // namespace
}  // namespace wplfast

#define WPLFAST_KERNEL "squares_kernel.inl"
#include "for_each_isa.inl"

namespace wplfast {
namespace {

template <class C>
void run(const SquaresCall& call) {
  const SquareStripFunction strip_kernel = WPLFAST_PICK(selected_isa(), square_strip_kernel)(call.dtype);
  const int threads = threads_for(call.n_samples * call.numel, GRAIN, call.threads);
  const int64_t strips = (call.numel + STRIP - 1) / STRIP;
  // The shape alone decides how samples are split, so that the result does not depend on the number of threads.
  const int64_t splits = strips >= 64 ? 1 : (call.n_samples + SAMPLES_PER_ITEM - 1) / SAMPLES_PER_ITEM;
  C* fisher = static_cast<C*>(call.fisher);
  const char* grads = static_cast<const char*>(call.grads);
  std::vector<double> partial(splits > 1 ? splits * call.numel : 0);

  parallel_each(threads, strips * splits, [&](int, int64_t item) {
    const int64_t first = item % strips * STRIP, split = item / strips;
    const int64_t columns = std::min(STRIP, call.numel - first);
    const int64_t begin = call.n_samples * split / splits, end = call.n_samples * (split + 1) / splits;
    double local[STRIP];
    double* to = splits > 1 ? partial.data() + split * call.numel + first : local;
    strip_kernel(grads + (begin * call.numel + first) * size_of(call.dtype), call.numel,
                 call.weights == nullptr ? nullptr : call.weights + begin, end - begin, columns, to);
    if (splits > 1) return;
    for (int64_t j = 0; j < columns; ++j) fisher[first + j] = static_cast<C>(fisher[first + j] + local[j]);
  });
  for (int64_t j = 0; splits > 1 && j < call.numel; ++j) {
    double sum = fisher[j];
    for (int64_t split = 0; split < splits; ++split) sum += partial[split * call.numel + j];
    fisher[j] = static_cast<C>(sum);
  }
}

}  // namespace

void accumulate_squares(const SquaresCall& call) {
  if (call.n_samples == 0 || call.numel == 0) return;
  if (call.dtype == Dtype::f64) {
    run<double>(call);
  } else {
    run<float>(call);
  }
}

}  // namespace wplfast
