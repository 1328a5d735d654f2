#include "fisher_embedding.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "parallel.h"
#include "simd_prelude.h"

namespace wplfast {
namespace {

// One use of a row of the table: position n * T + t of the indices.
struct Place {
  int64_t row, position;
};

// Places [begin, end) of one or more rows, and the columns [first, first + count) of the table.
struct RowsTask {
  const Place* places;
  int64_t n_places;
  int64_t n_steps, size;
  int64_t first, count;
  const void* grad_outputs;
  const double* weights;
  void* fisher;
  void* gradient;
};

using RowsFunction = void (*)(const RowsTask& task);

// Samples whose squares are summed in fp32 before they are added to the table.
constexpr int64_t SAMPLES_PER_SUM = 128;

// Elements per thread below which waking the thread costs more than it saves.
constexpr int64_t GRAIN = 32768;

// Elements of one item of work, about: small enough to balance the load, large enough to hide its own cost.
constexpr int64_t ITEM = 16384;

// Columns that are always computed together: a few cache lines.
constexpr int64_t STRIP = 64;

}  // namespace
}  // namespace wplfast

#define WPLFAST_KERNEL "fisher_embedding_kernel.inl"
#include "for_each_isa.inl"

namespace wplfast {
namespace {

constexpr int DIGIT_BITS = 11;
constexpr int64_t DIGITS = int64_t{1} << DIGIT_BITS;

// All places with an index, by row and, within a row, in their order in memory: samples stay together.
std::vector<Place> sorted_places(const FisherEmbeddingCall& call) {
  const int64_t total = call.n_samples * call.n_steps;
  std::vector<Place> places;
  places.reserve(total);
  int64_t largest = 0;
  for (int64_t position = 0; position < total; ++position) {
    const int64_t row = call.indices[position];
    if (row < 0) continue;
    if (row >= call.n_rows) {
      throw std::out_of_range("indices must be below " + std::to_string(call.n_rows) + ", got " + std::to_string(row));
    }
    largest = std::max(largest, row);
    places.push_back({row, position});
  }
  std::vector<Place> sorted(places.size());
  for (int shift = 0; shift < 63 && largest >> shift > 0; shift += DIGIT_BITS) {
    int64_t starts[DIGITS + 1] = {};
    for (const Place& place : places) ++starts[(place.row >> shift) % DIGITS + 1];
    for (int64_t digit = 0; digit < DIGITS; ++digit) starts[digit + 1] += starts[digit];
    for (const Place& place : places) sorted[starts[(place.row >> shift) % DIGITS]++] = place;
    std::swap(places, sorted);
  }
  return places;
}

// Cuts sorted places where the row changes, into pieces of about `length`.
std::vector<int64_t> piece_starts(const std::vector<Place>& places, int64_t length) {
  const int64_t total = static_cast<int64_t>(places.size());
  std::vector<int64_t> starts{0};
  for (int64_t at = length; at < total; at += length) {
    while (at < total && places[at].row == places[at - 1].row) ++at;
    if (at < total) starts.push_back(at);
  }
  starts.push_back(total);
  return starts;
}

}  // namespace

void fisher_embedding(const FisherEmbeddingCall& call) {
  const std::vector<Place> places = sorted_places(call);
  if (places.empty() || call.size == 0) return;
  const RowsFunction rows_kernel = WPLFAST_PICK(selected_isa(), rows_kernel)(call.dtype);
  const int threads = threads_for(static_cast<int64_t>(places.size()) * call.size, GRAIN, call.threads);
  const std::vector<int64_t> starts = piece_starts(places, std::max<int64_t>(1, ITEM / call.size));
  const int64_t pieces = static_cast<int64_t>(starts.size()) - 1;
  // Few distinct rows are cut by columns too. Neither cut changes an element's sum.
  const int64_t all_strips = (call.size + STRIP - 1) / STRIP;
  const int64_t strips = threads == 1 || pieces >= 4 * threads ? 1 : std::min<int64_t>(all_strips, 4 * threads);
  parallel_each(threads, pieces * strips, [&](int, int64_t item) {
    const int64_t piece = item / strips, strip = item % strips;
    const int64_t first = all_strips * strip / strips * STRIP;
    const int64_t last = std::min(call.size, all_strips * (strip + 1) / strips * STRIP);
    rows_kernel({places.data() + starts[piece], starts[piece + 1] - starts[piece], call.n_steps, call.size, first,
                 last - first, call.grad_outputs, call.weights, call.fisher, call.gradient});
  });
}

}  // namespace wplfast
