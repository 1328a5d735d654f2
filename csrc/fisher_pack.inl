// Packing: copies the rows of a chunk, in the compute type, into panels. Included by fisher_product_kernel.inl.

// Consecutive (n, t) rows of one chunk: whole samples of equal length, or one piece of a sample.
struct Chunk {
  int64_t first_sample, n_samples;
  int64_t first_step, n_steps;
  bool begins, ends;  // false where a sample continues from the previous chunk, or into the next
};

// Copies `count` elements in the compute type, squared and weighted as the epilogue asks.
template <class T, class C>
WPLFAST_INLINE void convert_row(const T* from, int64_t count, bool squared, C weight, C* to) {
  constexpr int64_t L = lanes<C>;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    const auto value = load(from + i);
    store(to + i, (squared ? value * value : value) * weight);
  }
  if (i < count) {
    const auto value = load_first(from + i, count - i);
    store(to + i, (squared ? value * value : value) * weight);
  }
}

// Packs columns [first, first + n_panels * WIDTH) of a chunk's rows into panels [rows][WIDTH], zero beyond the matrix.
// `line` holds one converted row. Weights, if given, multiply each sample's rows.
template <class T, class C, int WIDTH>
void pack(const SampleMatrix& matrix, const Chunk& chunk, int64_t first, int64_t n_panels, bool squared,
          const C* weights, C* line, C* packed) {
  const int64_t rows = chunk.n_samples * chunk.n_steps;
  const int64_t width = n_panels * WIDTH;
  const int64_t count = matrix.size - first < width ? matrix.size - first : width;
  const bool direct = sizeof(T) == sizeof(C) && !squared && weights == nullptr && count == width;
  for (int64_t i = count; i < width + lanes<C>; ++i) line[i] = 0;
  int64_t row = 0;
  for (int64_t n = chunk.first_sample; n < chunk.first_sample + chunk.n_samples; ++n) {
    const C weight = weights == nullptr ? C{1} : weights[n];
    for (int64_t t = chunk.first_step; t < chunk.first_step + chunk.n_steps; ++t, ++row) {
      const T* from = static_cast<const T*>(matrix.data) + n * matrix.stride_n + t * matrix.stride_t + first;
      const C* source = line;
      if (direct) {
        source = reinterpret_cast<const C*>(from);
      } else {
        convert_row<T, C>(from, count, squared, weight, line);
      }
      C* to = packed + row * WIDTH;
      for (int64_t panel = 0; panel < n_panels; ++panel, to += rows * WIDTH, source += WIDTH) {
        std::memcpy(to, source, WIDTH * sizeof(C));
      }
    }
  }
}
