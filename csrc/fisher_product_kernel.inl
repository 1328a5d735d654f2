// Packed, register-blocked G^T A that squares each sample's product in its epilogue. Included by for_each_isa.inl.

#include "fisher_pack.inl"
#include "fisher_patches.inl"

// Rows of a register tile: with two vectors of columns, 24 of 32 (AVX-512) or 12 of 16 (AVX2) registers accumulate.
#if defined(WPLFAST_AVX512)
constexpr int TILE_ROWS = 12;
#else
constexpr int TILE_ROWS = 6;
#endif
template <class C>
constexpr int TILE_COLUMNS = 2 * static_cast<int>(lanes<C>);

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

// Where the output has the elements [first, first + count) of a side.
inline void output_offsets(const Side& side, int64_t first, int64_t count, int64_t* offsets) {
  if (!side.is_patches) {
    for (int64_t i = 0; i < count; ++i) offsets[i] = (first + i) * side.output_stride;
    return;
  }
  const int64_t channels = side.patches.channels, taps = side.patches.taps();
  int64_t tap = first / channels, channel = first % channels;
  for (int64_t i = 0; i < count; ++i) {
    offsets[i] = (channel * taps + tap) * side.output_stride;
    if (++channel == channels) {
      channel = 0;
      ++tap;
    }
  }
}

// Adds a block's sums, stored tile by tile, to the output. Where the output's columns lie apart (it is transposed), all
// of a column is added before the next one: lines a power of two apart would push each other out of the L1 cache.
template <class C>
void add_sums(const ProductPlan& plan, PanelRange rows, PanelRange columns, const C* sums, C* output) {
  constexpr int64_t WIDTH = TILE_COLUMNS<C>, TILE = TILE_ROWS * WIDTH;
  const bool contiguous = !plan.column_side.is_patches && plan.column_side.output_stride == 1;
  const int64_t all_rows = plan.row_side.size(), all_columns = plan.column_side.size();
  const int64_t first_row = rows.begin * TILE_ROWS, last_row = rows.end * TILE_ROWS;
  const int64_t n_rows = (all_rows < last_row ? all_rows : last_row) - first_row;
  int64_t row_offsets[BLOCK_PATCH_ROWS + TILE_ROWS], column_offsets[WIDTH];
  output_offsets(plan.row_side, first_row, n_rows, row_offsets);
  for (int64_t c = columns.begin; c < columns.end; ++c, sums += (rows.end - rows.begin) * TILE) {
    const int64_t n_columns = all_columns - c * WIDTH < WIDTH ? all_columns - c * WIDTH : WIDTH;
    output_offsets(plan.column_side, c * WIDTH, n_columns, column_offsets);
    if (contiguous) {
      for (int64_t i = 0; i < n_rows; ++i) {
        const C* from = sums + i * WIDTH;
        C* to = output + row_offsets[i] + column_offsets[0];
        for (int64_t j = 0; j < n_columns; ++j) to[j] += from[j];
      }
    } else {
      for (int64_t j = 0; j < n_columns; ++j) {
        const C* from = sums + j;
        C* to = output + column_offsets[j];
        for (int64_t i = 0; i < n_rows; ++i) to[row_offsets[i]] += from[i * WIDTH];
      }
    }
  }
}

inline PanelRange rows_of_block(const ProductPlan& plan, int64_t block) {
  return panels_of_block(block % plan.row_blocks, plan.row_blocks, plan.row_panels);
}

inline PanelRange columns_of_block(const ProductPlan& plan, int64_t block) {
  return panels_of_block(block / plan.row_blocks, plan.column_blocks, plan.column_panels);
}

template <class C>
void flush(const ProductPlan& plan, int64_t block, const void* sums, const void* gradient) {
  const PanelRange rows = rows_of_block(plan, block), columns = columns_of_block(plan, block);
  add_sums(plan, rows, columns, static_cast<const C*>(sums), static_cast<C*>(plan.output));
  if (plan.gradient == nullptr) return;
  add_sums(plan, rows, columns, static_cast<const C*>(gradient), static_cast<C*>(plan.gradient));
}

// Where the arrays of one block lie in a thread's workspace, in elements; every start is aligned to 64 bytes.
template <class C>
struct Workspace {
  int64_t tiles, carry, packed_rows, packed_columns, end;

  explicit Workspace(const ProductPlan& plan) {
    constexpr int64_t WIDTH = TILE_COLUMNS<C>;
    const int64_t row_panels = (plan.row_panels + plan.row_blocks - 1) / plan.row_blocks;
    const int64_t column_panels = (plan.column_panels + plan.column_blocks - 1) / plan.column_blocks;
    const int64_t rows = plan.n_samples * plan.n_steps < CHUNK_ROWS ? plan.n_samples * plan.n_steps : CHUNK_ROWS;
    tiles = row_panels * column_panels * TILE_ROWS * WIDTH;
    carry = 0;
    packed_rows = aligned(carry + (plan.n_steps > CHUNK_ROWS ? tiles : 0));
    packed_columns = aligned(packed_rows + rows * (plan.row_side.is_patches ? 1 : row_panels) * TILE_ROWS);
    end = aligned(packed_columns + rows * column_panels * WIDTH);
  }

  static int64_t aligned(int64_t element) { return (element + 15) / 16 * 16; }
};

template <class C>
int64_t workspace_bytes(const ProductPlan& plan) {
  return Workspace<C>(plan).end * static_cast<int64_t>(sizeof(C));
}

template <class C>
int64_t block_elements(const ProductPlan& plan) {
  return Workspace<C>(plan).tiles;
}

// The chunk of the samples from n on, or one of the pieces of a sample that is longer than a chunk.
inline Chunk chunk_at(const ProductPlan& plan, int64_t n, int64_t end, int64_t piece, int64_t pieces) {
  const int64_t fitting = samples_per_chunk(plan.n_steps);
  const int64_t first = plan.n_steps * piece / pieces, last = plan.n_steps * (piece + 1) / pieces;
  return {n, end - n < fitting ? end - n : fitting, first, last - first, piece == 0, piece == pieces - 1};
}

template <class T, class C>
void multiply(const ProductPlan& plan, int64_t block, int64_t unit, bool columns_are_packed, void* workspace,
              void* sums_out, void* gradient_out) {
  constexpr int64_t WIDTH = TILE_COLUMNS<C>, TILE = TILE_ROWS * WIDTH;
  const PanelRange rows = rows_of_block(plan, block), columns = columns_of_block(plan, block);
  const int64_t n_rows = rows.end - rows.begin, n_columns = columns.end - columns.begin;
  const Workspace<C> at(plan);
  C* base = static_cast<C*>(workspace);
  C* carry = base + at.carry;
  C* packed_rows = base + at.packed_rows;
  C* packed_columns = base + at.packed_columns;
  C* sums = static_cast<C*>(sums_out);
  C* gradient = plan.gradient == nullptr ? nullptr : static_cast<C*>(gradient_out);
  const C* weights = static_cast<const C*>(plan.weights);
  const bool weighs_rows = plan.epilogue != Epilogue::square;
  const bool squared = plan.epilogue == Epilogue::square_packed;
  const bool direct = plan.is_one_chunk();
  alignas(64) C tile_sums[TILE], tile_gradient[TILE];
  if (!direct) {
    std::memset(sums, 0, n_rows * n_columns * TILE * sizeof(C));
    if (gradient != nullptr) std::memset(gradient, 0, n_rows * n_columns * TILE * sizeof(C));
  }

  const int64_t pieces = (plan.n_steps + CHUNK_ROWS - 1) / CHUNK_ROWS, step = samples_per_chunk(plan.n_steps);
  const int64_t begin = unit * plan.unit_samples;
  const int64_t end = plan.n_samples - begin < plan.unit_samples ? plan.n_samples : begin + plan.unit_samples;
  for (int64_t n = begin; n < end; n += step) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const Chunk chunk = chunk_at(plan, n, end, piece, pieces);
      const int64_t chunk_rows = chunk.n_samples * chunk.n_steps;
      const int64_t next_n = piece + 1 < pieces ? n : n + step;
      const Chunk next = chunk_at(plan, next_n, plan.n_samples, (piece + 1) % pieces, pieces);
      const C* row_weights = weighs_rows ? weights : nullptr;
      PatchRow patch_row[CHUNK_ROWS];
      int64_t n_patch_rows = 0;
      if (columns_are_packed) {
        // by the block before this one
      } else if (plan.column_side.is_patches) {
        n_patch_rows = patch_rows(plan.column_side.patches, chunk, patch_row);
        for (int64_t c = 0; c < n_columns; ++c) {
          C* panel = packed_columns + c * chunk_rows * WIDTH;
          pack_patches<T, C, WIDTH>(plan.column_side.patches, patch_row, n_patch_rows, (columns.begin + c) * WIDTH,
                                    panel);
          if (squared) square_and_weigh<C, WIDTH>(chunk_rows, squared, nullptr, panel);
        }
      } else {
        pack_matrix<T, C, WIDTH>(plan.column_side.matrix, chunk, columns.begin * WIDTH, n_columns, squared, nullptr,
                                 packed_columns);
      }
      if (plan.row_side.is_patches) {
        n_patch_rows = patch_rows(plan.row_side.patches, chunk, patch_row);
      } else {
        pack_matrix<T, C, TILE_ROWS>(plan.row_side.matrix, chunk, rows.begin * TILE_ROWS, n_rows, squared, row_weights,
                                     packed_rows);
      }
      Chunk whole = chunk;
      if (weighs_rows) {  // T = 1: the chunk's rows are one product
        whole.n_steps = chunk_rows;
        whole.n_samples = 1;
      }
      int64_t done = 0;
      const auto multiply_one = [&](int64_t r, int64_t c, const C* row_panel) {
        if (next_n < plan.n_samples) {
          prefetch_part<T>(plan.row_side, plan.n_steps, next, rows.begin * TILE_ROWS, n_rows * TILE_ROWS, done,
                           n_rows * n_columns);
          prefetch_part<T>(plan.column_side, plan.n_steps, next, columns.begin * WIDTH, n_columns * WIDTH, done,
                           n_rows * n_columns);
        }
        ++done;
        if (direct) {
          const PanelRange row{rows.begin + r, rows.begin + r + 1}, column{columns.begin + c, columns.begin + c + 1};
          std::memset(tile_sums, 0, sizeof(tile_sums));
          if (plan.gradient != nullptr) std::memset(tile_gradient, 0, sizeof(tile_gradient));
          multiply_tile(row_panel, packed_columns + c * chunk_rows * WIDTH, whole, plan.epilogue, weights, tile_sums,
                        plan.gradient == nullptr ? nullptr : tile_gradient, static_cast<C*>(nullptr));
          add_sums(plan, row, column, tile_sums, static_cast<C*>(plan.output));
          if (plan.gradient != nullptr) add_sums(plan, row, column, tile_gradient, static_cast<C*>(plan.gradient));
          return;
        }
        const int64_t tile = (c * n_rows + r) * TILE;
        multiply_tile(row_panel, packed_columns + c * chunk_rows * WIDTH, whole, plan.epilogue, weights, sums + tile,
                      gradient == nullptr ? nullptr : gradient + tile, pieces == 1 ? nullptr : carry + tile);
      };
      if (plan.row_side.is_patches) {
        // Each panel is packed when it is needed: it never leaves the L1 cache, where all of them would.
        for (int64_t r = 0; r < n_rows; ++r) {
          pack_patches<T, C, TILE_ROWS>(plan.row_side.patches, patch_row, n_patch_rows, (rows.begin + r) * TILE_ROWS,
                                        packed_rows);
          if (weighs_rows) {
            const C* of_chunk = weights == nullptr ? nullptr : weights + chunk.first_sample;
            square_and_weigh<C, TILE_ROWS>(chunk_rows, squared, of_chunk, packed_rows);
          }
          for (int64_t c = 0; c < n_columns; ++c) multiply_one(r, c, packed_rows);
        }
      } else {
        for (int64_t c = 0; c < n_columns; ++c) {
          for (int64_t r = 0; r < n_rows; ++r) multiply_one(r, c, packed_rows + r * chunk_rows * TILE_ROWS);
        }
      }
    }
  }
}

template <class T, class C>
ProductKernel make_kernel() {
  return {TILE_ROWS, TILE_COLUMNS<C>, block_elements<C>, workspace_bytes<C>, multiply<T, C>, flush<C>};
}

ProductKernel product_kernel(Dtype dtype) {
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
