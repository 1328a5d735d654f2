// Packed, register-blocked G^T A that squares each sample's product in its epilogue. Included by for_each_isa.inl.

// Rows of a register tile: with two vectors of columns, 24 of 32 (AVX-512) or 12 of 16 (AVX2) registers accumulate.
#if defined(WPLFAST_AVX512)
constexpr int TILE_ROWS = 12;
#else
constexpr int TILE_ROWS = 6;
#endif
template <class C>
constexpr int TILE_COLUMNS = 2 * static_cast<int>(lanes<C>);

// Consecutive (n, t) rows of one chunk: whole samples of equal length, or one piece of a sample.
struct Chunk {
  int64_t first_sample, n_samples;
  int64_t first_step, n_steps;
  bool begins, ends;  // false where a sample continues from the previous chunk, or into the next
};

// Each sample's product of a packed row panel [rows][TILE_ROWS] and column panel [rows][TILE_COLUMNS], and its
// epilogue. sums, gradient and carry are tiles [TILE_ROWS][TILE_COLUMNS]; gradient and weights may be null.
template <class C>
void multiply_tile(const C* row_panel, const C* column_panel, const Chunk& chunk, Epilogue epilogue, const C* weights,
                   C* sums, C* gradient, C* carry) {
  using V = Vector<C>;
  constexpr int64_t L = lanes<C>;
  for (int64_t n = 0; n < chunk.n_samples; ++n) {
    V tile[TILE_ROWS][2];
    WPLFAST_UNROLL
    for (int r = 0; r < TILE_ROWS; ++r) {
      tile[r][0] = chunk.begins ? V{} : load(carry + r * 2 * L);
      tile[r][1] = chunk.begins ? V{} : load(carry + r * 2 * L + L);
    }
    for (int64_t t = 0; t < chunk.n_steps; ++t) {
      const V left = load(column_panel), right = load(column_panel + L);
      WPLFAST_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) {
        const C scalar = row_panel[r];
        tile[r][0] += scalar * left;
        tile[r][1] += scalar * right;
      }
      row_panel += TILE_ROWS;
      column_panel += 2 * L;
    }
    if (!chunk.ends) {
      WPLFAST_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) {
        store(carry + r * 2 * L, tile[r][0]);
        store(carry + r * 2 * L + L, tile[r][1]);
      }
    } else if (epilogue != Epilogue::square) {
      WPLFAST_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) {
        store(sums + r * 2 * L, load(sums + r * 2 * L) + tile[r][0]);
        store(sums + r * 2 * L + L, load(sums + r * 2 * L + L) + tile[r][1]);
      }
    } else if (weights == nullptr && gradient == nullptr) {
      WPLFAST_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) {
        store(sums + r * 2 * L, load(sums + r * 2 * L) + tile[r][0] * tile[r][0]);
        store(sums + r * 2 * L + L, load(sums + r * 2 * L + L) + tile[r][1] * tile[r][1]);
      }
    } else {
      const C weight = weights == nullptr ? C{1} : weights[chunk.first_sample + n];
      WPLFAST_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) {
        WPLFAST_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int64_t at = (r * 2 + half) * L;
          const V weighted = weight * tile[r][half];
          store(sums + at, load(sums + at) + weighted * tile[r][half]);
          if (gradient != nullptr) store(gradient + at, load(gradient + at) + weighted);
        }
      }
    }
  }
}

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
    alignas(64) T tail[L] = {};
    std::memcpy(tail, from + i, (count - i) * sizeof(T));
    const auto value = load(tail);
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

// Adds a block's sums, stored tile by tile, to the output, and clears them.
template <class C>
void flush(const FisherLinearPlan& plan, PanelRange rows, PanelRange columns, C* sums, void* output) {
  constexpr int64_t WIDTH = TILE_COLUMNS<C>;
  for (int64_t c = columns.begin; c < columns.end; ++c) {
    const int64_t n_columns = plan.column_side.size - c * WIDTH < WIDTH ? plan.column_side.size - c * WIDTH : WIDTH;
    for (int64_t r = rows.begin; r < rows.end; ++r, sums += TILE_ROWS * WIDTH) {
      for (int64_t i = 0; i < TILE_ROWS && r * TILE_ROWS + i < plan.row_side.size; ++i) {
        C* to = static_cast<C*>(output) + (r * TILE_ROWS + i) * plan.row_stride + c * WIDTH * plan.column_stride;
        const C* from = sums + i * WIDTH;
        if (plan.column_stride == 1) {
          for (int64_t j = 0; j < n_columns; ++j) to[j] += from[j];
        } else {
          for (int64_t j = 0; j < n_columns; ++j) to[j * plan.column_stride] += from[j];
        }
      }
      std::memset(sums, 0, TILE_ROWS * WIDTH * sizeof(C));
    }
  }
}

// Where the arrays of one block lie in a thread's workspace, in elements; every start is aligned to 64 bytes.
template <class C>
struct Workspace {
  int64_t sums, gradient, carry, packed_rows, packed_columns, line, end;

  explicit Workspace(const FisherLinearPlan& plan) {
    constexpr int64_t WIDTH = TILE_COLUMNS<C>;
    const int64_t row_panels = (plan.row_panels + plan.row_blocks - 1) / plan.row_blocks;
    const int64_t column_panels = (plan.column_panels + plan.column_blocks - 1) / plan.column_blocks;
    const int64_t tiles = row_panels * column_panels * TILE_ROWS * WIDTH;
    const int64_t rows = plan.n_samples * plan.n_steps < CHUNK_ROWS ? plan.n_samples * plan.n_steps : CHUNK_ROWS;
    const int64_t widest =
        row_panels * TILE_ROWS < column_panels * WIDTH ? column_panels * WIDTH : row_panels * TILE_ROWS;
    sums = 0;
    gradient = aligned(sums + tiles);
    carry = aligned(gradient + (plan.gradient == nullptr ? 0 : tiles));
    packed_rows = aligned(carry + (plan.n_steps > CHUNK_ROWS ? tiles : 0));
    packed_columns = aligned(packed_rows + rows * row_panels * TILE_ROWS);
    line = aligned(packed_columns + rows * column_panels * WIDTH);
    end = aligned(line + widest + lanes<C>);
  }

  static int64_t aligned(int64_t element) { return (element + 15) / 16 * 16; }
};

template <class C>
int64_t workspace_bytes(const FisherLinearPlan& plan) {
  return Workspace<C>(plan).end * static_cast<int64_t>(sizeof(C));
}

template <class T, class C>
void run_block(const FisherLinearPlan& plan, int64_t block, void* workspace) {
  constexpr int64_t WIDTH = TILE_COLUMNS<C>, TILE = TILE_ROWS * WIDTH;
  const PanelRange rows = panels_of_block(block % plan.row_blocks, plan.row_blocks, plan.row_panels);
  const PanelRange columns = panels_of_block(block / plan.row_blocks, plan.column_blocks, plan.column_panels);
  const int64_t n_rows = rows.end - rows.begin, n_columns = columns.end - columns.begin;
  const Workspace<C> at(plan);
  C* base = static_cast<C*>(workspace);
  C* sums = base + at.sums;
  C* gradient = plan.gradient == nullptr ? nullptr : base + at.gradient;
  C* carry = base + at.carry;
  C* packed_rows = base + at.packed_rows;
  C* packed_columns = base + at.packed_columns;
  C* line = base + at.line;
  const C* weights = static_cast<const C*>(plan.weights);
  const bool weighs_rows = plan.epilogue != Epilogue::square;
  const bool squared = plan.epilogue == Epilogue::square_packed;
  std::memset(sums, 0, n_rows * n_columns * TILE * sizeof(C));
  if (gradient != nullptr) std::memset(gradient, 0, n_rows * n_columns * TILE * sizeof(C));

  // A chunk holds as many whole samples as fit; a longer sample is cut into pieces of nearly equal length.
  const int64_t samples_per_chunk = plan.n_steps >= CHUNK_ROWS ? 1 : CHUNK_ROWS / plan.n_steps;
  const int64_t pieces = (plan.n_steps + CHUNK_ROWS - 1) / CHUNK_ROWS;
  int64_t unflushed = 0;
  for (int64_t n = 0; n < plan.n_samples; n += samples_per_chunk) {
    const int64_t n_samples = plan.n_samples - n < samples_per_chunk ? plan.n_samples - n : samples_per_chunk;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t first = plan.n_steps * piece / pieces, last = plan.n_steps * (piece + 1) / pieces;
      Chunk chunk{n, n_samples, first, last - first, piece == 0, piece == pieces - 1};
      const int64_t chunk_rows = n_samples * (last - first);
      pack<T, C, TILE_ROWS>(plan.row_side, chunk, rows.begin * TILE_ROWS, n_rows, squared,
                            weighs_rows ? weights : nullptr, line, packed_rows);
      pack<T, C, WIDTH>(plan.column_side, chunk, columns.begin * WIDTH, n_columns, squared, nullptr, line,
                        packed_columns);
      if (weighs_rows) {  // T = 1: the chunk's rows are one product
        chunk.n_steps = chunk_rows;
        chunk.n_samples = 1;
      }
      for (int64_t c = 0; c < n_columns; ++c) {
        for (int64_t r = 0; r < n_rows; ++r) {
          const int64_t tile = (c * n_rows + r) * TILE;
          multiply_tile(packed_rows + r * chunk_rows * TILE_ROWS, packed_columns + c * chunk_rows * WIDTH, chunk,
                        plan.epilogue, weights, sums + tile, gradient == nullptr ? nullptr : gradient + tile,
                        pieces == 1 ? nullptr : carry + tile);
        }
      }
    }
    unflushed += weighs_rows ? 1 : n_samples;
    if (unflushed >= FLUSH_SAMPLES || n + samples_per_chunk >= plan.n_samples) {
      flush(plan, rows, columns, sums, plan.output);
      if (gradient != nullptr) flush(plan, rows, columns, gradient, plan.gradient);
      unflushed = 0;
    }
  }
}

template <class T, class C>
FisherLinearKernel make_kernel() {
  return {TILE_ROWS, TILE_COLUMNS<C>, workspace_bytes<C>, run_block<T, C>};
}

FisherLinearKernel fisher_linear_kernel(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return make_kernel<double, double>();
    case Dtype::bf16:
      return make_kernel<BFloat16, float>();
    case Dtype::f16:
      return make_kernel<Half, float>();
    default:
      return make_kernel<float, float>();
  }
}
