#include "penalty.h"

#include <algorithm>
#include <vector>

#include "huge_pages.h"
#include "parallel.h"
#include "simd_prelude.h"

namespace wplfast {
namespace {

using PenaltyBlockFunction = double (*)(const Anchor&, int64_t begin, int64_t count, double l2, double scale);

// Elements per partial sum. A lane of an AVX-512 accumulator then adds 128 terms in fp32, far below the error budget.
constexpr int64_t BLOCK = 4096;

// How far ahead memory is asked for.
constexpr int64_t AHEAD_BYTES = 1024;

// Below this many elements per thread, waking it costs more than it saves.
constexpr int64_t GRAIN = 32768;

// Gradient buffers above this size do not stay in the last-level cache until they are read, and are fresh memory from
// the operating system.
constexpr int64_t STREAMING_BYTES = int64_t{16} << 20;

}  // namespace
}  // namespace wplfast

#define WPLFAST_KERNEL "penalty_kernel.inl"
#include "for_each_isa.inl"

namespace wplfast {
namespace {

// Elements and blocks that precede each parameter: the common coordinates by which threads share the work.
struct Schedule {
  std::vector<int64_t> elements, blocks;

  explicit Schedule(const PenaltyCall& call) : elements(call.n_anchors + 1), blocks(call.n_anchors + 1) {
    for (int64_t p = 0; p < call.n_anchors; ++p) {
      const int64_t numel = call.anchors[p].numel;
      elements[p + 1] = elements[p] + numel;
      blocks[p + 1] = blocks[p] + (numel + BLOCK - 1) / BLOCK;
    }
  }

  // Calls visit(parameter, block) for each block whose first element lies in [first, last).
  template <class Visit>
  void visit_range(int64_t first, int64_t last, const Visit& visit) const {
    const int64_t n_anchors = static_cast<int64_t>(elements.size()) - 1;
    int64_t p = std::upper_bound(elements.begin(), elements.end(), first) - elements.begin() - 1;
    for (; p < n_anchors && elements[p] < last; ++p) {
      const int64_t skipped = std::max<int64_t>(0, first - elements[p] + BLOCK - 1) / BLOCK;
      for (int64_t b = skipped; b < blocks[p + 1] - blocks[p] && elements[p] + b * BLOCK < last; ++b) visit(p, b);
    }
  }
};

// Asks for the first bytes of a parameter's arrays while the end of the one before it is worked on.
void prefetch_head(const Anchor& anchor) {
  const void* const arrays[] = {anchor.theta, anchor.theta_hat, anchor.offset, anchor.fisher, anchor.grad};
  for (const void* array : arrays) {
    for (int64_t at = 0; at < AHEAD_BYTES && array != nullptr; at += 64) {
      __builtin_prefetch(static_cast<const char*>(array) + at, 0, 2);
    }
  }
}

void zero_padding(const Anchor& anchor, Dtype dtype, int64_t padding) {
  const int64_t end = (anchor.numel + padding - 1) / padding * padding;
  char* grad = static_cast<char*>(anchor.grad);
  if (end > anchor.numel) std::memset(grad + anchor.numel * size_of(dtype), 0, (end - anchor.numel) * size_of(dtype));
}

}  // namespace

double penalty(const PenaltyCall& call) {
  const Schedule schedule(call);
  const int64_t total = schedule.elements.back();
  bool streaming = call.mode == PenaltyMode::store && total * size_of(call.dtype) >= STREAMING_BYTES;
  if (streaming && total > 0) {  // the gradients lie one behind the other in one fresh buffer
    const Anchor& last = call.anchors[call.n_anchors - 1];
    char* begin = static_cast<char*>(call.anchors[0].grad);
    advise_huge_pages(begin, static_cast<char*>(last.grad) + last.numel * size_of(call.dtype) - begin);
  }
  bool offset = false;
  for (int64_t p = 0; p < call.n_anchors; ++p) {
    const Anchor& anchor = call.anchors[p];
    offset |= anchor.offset != nullptr;
    streaming &= reinterpret_cast<uintptr_t>(anchor.grad) % 64 == 0;
    if (call.mode == PenaltyMode::store) zero_padding(anchor, call.dtype, call.padding);
  }
  const auto choose = WPLFAST_PICK(selected_isa(), penalty_block);
  const PenaltyBlockFunction block = choose(call, call.mode, offset, streaming);
  const PenaltyBlockFunction value_block = choose(call, PenaltyMode::value, offset, false);

  // Every thread takes one range of the elements, so that it streams contiguous memory; every block has its own slot,
  // so that the order of the final sum does not depend on the threads.
  std::vector<double> partial(schedule.blocks.back());
  parallel(threads_for(total, GRAIN, call.threads), [&](int64_t thread, int64_t threads) {
    schedule.visit_range(total * thread / threads, total * (thread + 1) / threads, [&](int64_t p, int64_t b) {
      const Anchor& anchor = call.anchors[p];
      const int64_t count = std::min(BLOCK, anchor.numel - b * BLOCK);
      if ((b + 1) * BLOCK >= anchor.numel && p + 1 < call.n_anchors) prefetch_head(call.anchors[p + 1]);
      const PenaltyBlockFunction evaluate = anchor.grad == nullptr ? value_block : block;
      partial[schedule.blocks[p] + b] = evaluate(anchor, b * BLOCK, count, call.l2, call.scale);
    });
  });
  double value = 0;
  for (double term : partial) value += term;
  return value;
}

}  // namespace wplfast
