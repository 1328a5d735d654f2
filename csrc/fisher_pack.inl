// Packing: copies the rows of a chunk, in the compute type, into panels. Included by fisher_product_kernel.inl.

#include "copy_row.inl"

// Consecutive (n, t) rows of one chunk: whole samples of equal length, or one piece of a sample.
struct Chunk {
  int64_t first_sample, n_samples;
  int64_t first_step, n_steps;
  bool begins, ends;  // false where a sample continues from the previous chunk, or into the next
};

// Copies WIDTH elements in the compute type, squared and weighted; `readable` ones exist.
template <class T, class C, int WIDTH>
WPLFAST_INLINE void convert_panel_row(const T* from, int64_t readable, bool squared, C weight, C* to) {
  constexpr int64_t L = lanes<C>, REST = WIDTH % L;
  const auto changed = [&](Vector<C> value) { return (squared ? value * value : value) * weight; };
  WPLFAST_UNROLL
  for (int64_t i = 0; i + L <= WIDTH; i += L) store(to + i, changed(load(from + i)));
  if constexpr (REST > 0) {
    constexpr int64_t LAST = WIDTH - REST;
    const Vector<C> value = readable >= LAST + L ? load(from + LAST) : load_first(from + LAST, REST);
    store_first(to + LAST, changed(value), REST);
  }
}

#if defined(WPLFAST_AVX512)
// Transposes a tile in registers: four perfect shuffles of its rows, each of which moves one bit of an element's row
// to its column and one of its column to its row.
WPLFAST_INLINE void transpose(F32 (&rows)[16]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  WPLFAST_UNROLL
  for (int stage = 0; stage < 4; ++stage) {
    F32 next[16];
    WPLFAST_UNROLL
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = (F32)_mm512_permutex2var_ps((__m512)rows[i], low, (__m512)rows[i + 8]);
      next[2 * i + 1] = (F32)_mm512_permutex2var_ps((__m512)rows[i], high, (__m512)rows[i + 8]);
    }
    WPLFAST_UNROLL
    for (int i = 0; i < 16; ++i) rows[i] = next[i];
  }
}
#endif

// Packs columns as pack_matrix does, of a matrix whose steps are contiguous: a cache line holds one column of many
// rows.
template <class T, class C, int WIDTH>
void pack_turned(const SampleMatrix& matrix, const Chunk& chunk, int64_t first, int64_t n_panels, bool squared,
                 const C* weights, C* packed) {
  constexpr int64_t LINE = 64 / sizeof(T);
  const int64_t rows = chunk.n_samples * chunk.n_steps;
  for (int64_t panel = 0; panel < n_panels; ++panel) {
    const int64_t column = first + panel * WIDTH, left = matrix.size - column;
    const int64_t width = left < WIDTH ? left : WIDTH;
    C* to = packed + panel * rows * WIDTH;
    for (int64_t n = chunk.first_sample; n < chunk.first_sample + chunk.n_samples; ++n) {
      const C weight = weights == nullptr ? C{1} : weights[n];
      const T* from =
          static_cast<const T*>(matrix.data) + n * matrix.stride_n + chunk.first_step + column * matrix.stride_d;
      for (int64_t t = 0; t < chunk.n_steps; t += LINE, to += LINE * WIDTH) {
        const int64_t count = chunk.n_steps - t < LINE ? chunk.n_steps - t : LINE;
#if defined(WPLFAST_AVX512)
        if constexpr (sizeof(C) == 4 && WIDTH % 16 == 0) {
          if (count == LINE && width == WIDTH) {
            for (int64_t i = 0; i < LINE; i += 16) {
              for (int64_t d = 0; d < WIDTH; d += 16) {
                F32 tile[16];
                WPLFAST_UNROLL
                for (int64_t j = 0; j < 16; ++j) tile[j] = load(from + (d + j) * matrix.stride_d + t + i);
                transpose(tile);
                WPLFAST_UNROLL
                for (int64_t j = 0; j < 16; ++j) {
                  store(to + (i + j) * WIDTH + d, (squared ? tile[j] * tile[j] : tile[j]) * weight);
                }
              }
            }
            continue;
          }
        }
#endif
        C line[LINE];
        for (int64_t d = 0; d < WIDTH; ++d) {
          if (d < width) {
            copy_row(from + d * matrix.stride_d + t, count, line);
          } else {
            std::memset(line, 0, sizeof(line));
          }
          for (int64_t i = 0; i < count; ++i) to[i * WIDTH + d] = (squared ? line[i] * line[i] : line[i]) * weight;
        }
        if (count < LINE) to -= (LINE - count) * WIDTH;
      }
    }
  }
}

// Packs columns [first, first + n_panels * WIDTH) of a chunk's rows into panels [rows][WIDTH], zero beyond the matrix.
// Weights, if given, multiply each sample's rows.
template <class T, class C, int WIDTH>
void pack_matrix(const SampleMatrix& matrix, const Chunk& chunk, int64_t first, int64_t n_panels, bool squared,
                 const C* weights, C* packed) {
  if (matrix.stride_d != 1) return pack_turned<T, C, WIDTH>(matrix, chunk, first, n_panels, squared, weights, packed);
  const int64_t rows = chunk.n_samples * chunk.n_steps, left = matrix.size - first;
  const int64_t full = left / WIDTH < n_panels ? left / WIDTH : n_panels;
  const int64_t rest = full < n_panels ? left - full * WIDTH : 0;
  const bool plain = !squared && weights == nullptr;
  int64_t row = 0;
  for (int64_t n = chunk.first_sample; n < chunk.first_sample + chunk.n_samples; ++n) {
    const C weight = weights == nullptr ? C{1} : weights[n];
    for (int64_t t = chunk.first_step; t < chunk.first_step + chunk.n_steps; ++t, ++row) {
      const T* from = static_cast<const T*>(matrix.data) + n * matrix.stride_n + t * matrix.stride_t + first;
      C* to = packed + row * WIDTH;
      for (int64_t panel = 0; panel < full; ++panel, to += rows * WIDTH, from += WIDTH) {
        if (sizeof(T) == sizeof(C) && plain) {
          std::memcpy(to, from, WIDTH * sizeof(C));
        } else {
          convert_panel_row<T, C, WIDTH>(from, left - panel * WIDTH, squared, weight, to);
        }
      }
      if (full == n_panels) continue;
      copy_row(from, rest, to);
      for (int64_t i = 0; i < rest && !plain; ++i) to[i] = (squared ? to[i] * to[i] : to[i]) * weight;
      std::memset(to + rest, 0, (WIDTH - rest) * sizeof(C));
    }
  }
}

// Asks for part `part` of `parts` of the memory that packing a chunk will read: it comes from far away, and the product
// of the chunk before it can hide that. Of patches, the same share of the images is taken as the chunk has of the rows.
template <class T>
void prefetch_part(const Side& side, int64_t n_steps, const Chunk& chunk, int64_t first, int64_t count, int64_t part,
                   int64_t parts) {
  constexpr int64_t LINE = 64 / sizeof(T);
  const int64_t rows = chunk.n_samples * chunk.n_steps;
  const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
  if (begin == end) return;
  if (side.is_patches) {
    const int64_t elements = side.patches.n_images * side.patches.image_elements();
    const int64_t start = chunk.first_sample * elements + chunk.first_step * elements / n_steps;
    const T* from = static_cast<const T*>(side.patches.data) + start + begin * elements / n_steps;
    for (int64_t i = 0; i < (end - begin) * elements / n_steps; i += LINE) __builtin_prefetch(from + i, 0, 2);
    return;
  }
  const int64_t length = side.matrix.size - first < count ? side.matrix.size - first : count;
  int64_t n = chunk.first_sample + begin / chunk.n_steps, t = begin % chunk.n_steps;
  for (int64_t row = begin; row < end; ++row) {
    const T* from = static_cast<const T*>(side.matrix.data) + n * side.matrix.stride_n +
                    (chunk.first_step + t) * side.matrix.stride_t + first;
    if (side.matrix.stride_d == 1) {
      for (int64_t i = 0; i < length; i += LINE) __builtin_prefetch(from + i, 0, 2);
    } else if (row == begin || t % LINE == 0) {
      const T* turned = from + first * (side.matrix.stride_d - 1);
      for (int64_t i = 0; i < length; ++i) __builtin_prefetch(turned + i * side.matrix.stride_d, 0, 2);
    }
    if (++t == chunk.n_steps) {
      t = 0;
      ++n;
    }
  }
}
