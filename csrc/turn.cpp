#include "turn.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace wplfast {
namespace {

// Bytes of the part of a row that is read at once, which is a cache line: rows that lie a power of two apart push each
// other out of the L1 cache, so each line is read once, into a tile of its own.
constexpr int64_t LINE = 64;

// Columns of one item of work, in lines, and bytes below which waking a thread costs more than it saves.
constexpr int64_t STRIP = 16;
constexpr int64_t GRAIN = 65536;

template <class T>
void turn_strip(const T* from, T* to, int64_t n_rows, int64_t n_columns, int64_t first, int64_t last) {
  constexpr int64_t SIDE = LINE / static_cast<int64_t>(sizeof(T));
  alignas(LINE) T tile[SIDE * SIDE];
  for (int64_t c = first; c < last; c += SIDE) {
    const int64_t width = std::min(SIDE, last - c);
    for (int64_t r = 0; r < n_rows; r += SIDE) {
      const int64_t height = std::min(SIDE, n_rows - r);
      const T* source = from + r * n_columns + c;
      T* target = to + c * n_rows + r;
      if (width == SIDE && height == SIDE) {
        for (int64_t i = 0; i < SIDE; ++i) std::memcpy(tile + i * SIDE, source + i * n_columns, LINE);
        for (int64_t j = 0; j < SIDE; ++j) {
          for (int64_t i = 0; i < SIDE; ++i) target[j * n_rows + i] = tile[i * SIDE + j];
        }
      } else {
        for (int64_t j = 0; j < width; ++j) {
          for (int64_t i = 0; i < height; ++i) target[j * n_rows + i] = source[i * n_columns + j];
        }
      }
    }
  }
}

template <class T>
void turn_all(const TurnCall& call) {
  constexpr int64_t COLUMNS = STRIP * LINE / static_cast<int64_t>(sizeof(T));
  const int64_t strips = (call.n_columns + COLUMNS - 1) / COLUMNS, numel = call.n_rows * call.n_columns;
  const int threads = threads_for(call.n_matrices * numel * call.element_bytes, GRAIN, call.threads);
  parallel_each(threads, call.n_matrices * strips, [&](int, int64_t item) {
    const int64_t n = item / strips, first = item % strips * COLUMNS;
    turn_strip(static_cast<const T*>(call.from) + n * numel, static_cast<T*>(call.to) + n * numel, call.n_rows,
               call.n_columns, first, std::min(call.n_columns, first + COLUMNS));
  });
}

}  // namespace

void turn(const TurnCall& call) {
  switch (call.element_bytes) {
    case 2:
      return turn_all<uint16_t>(call);
    case 4:
      return turn_all<uint32_t>(call);
    default:
      return turn_all<uint64_t>(call);
  }
}

}  // namespace wplfast
