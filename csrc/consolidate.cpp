#include "consolidate.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "simd_prelude.h"

namespace wplfast {
namespace {

// Sums of one block, or of one parameter.
struct Sums {
  double added, squares;
};

using ConsolidateFunction = Sums (*)(const AnchorUpdate& update, int64_t begin, int64_t count);

// Elements of one item of work and of one partial sum.
constexpr int64_t BLOCK = 8192;

// Below this many elements per thread, waking it costs more than it saves.
constexpr int64_t GRAIN = 32768;

constexpr double LEAST = 0x1p-1022;  // the smallest normal double: a total of zero is divided by it

}  // namespace
}  // namespace wplfast

#define WPLFAST_KERNEL "consolidate_kernel.inl"
#include "for_each_isa.inl"

namespace wplfast {
namespace {

struct Block {
  int64_t update, begin;
};

// Visits every element; returns sums by block, in the order of the updates.
template <class Visit>
void visit_blocks(const ConsolidateCall& call, bool write, const Visit& visit) {
  std::vector<Block> blocks;
  std::vector<ConsolidateFunction> functions(call.n_updates);
  int64_t total = 0;
  for (int64_t u = 0; u < call.n_updates; ++u) {
    const AnchorUpdate& update = call.updates[u];
    functions[u] = WPLFAST_PICK(selected_isa(), consolidate_block)(update, call.merge, write);
    for (int64_t begin = 0; begin < update.numel; begin += BLOCK) blocks.push_back({u, begin});
    total += update.numel;
  }
  std::vector<Sums> sums(blocks.size());
  const int64_t n_blocks = static_cast<int64_t>(blocks.size());
  parallel_each(threads_for(total, GRAIN, call.threads), n_blocks, [&](int, int64_t b) {
    const AnchorUpdate& update = call.updates[blocks[b].update];
    const int64_t count = std::min(BLOCK, update.numel - blocks[b].begin);
    sums[b] = functions[blocks[b].update](update, blocks[b].begin, count);
  });
  for (int64_t b = 0; b < n_blocks; ++b) visit(blocks[b].update, sums[b]);
}

}  // namespace

void consolidate(const ConsolidateCall& call) {
  visit_blocks(call, true, [](int64_t, const Sums&) {});
}

void measure_consolidation(const ConsolidateCall& call, double* added, double* squares) {
  std::fill(added, added + call.n_updates, 0.0);
  std::fill(squares, squares + call.n_updates, 0.0);
  visit_blocks(call, false, [&](int64_t update, const Sums& sums) {
    added[update] += sums.added;
    squares[update] += sums.squares;
  });
}

}  // namespace wplfast
