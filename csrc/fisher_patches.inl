// Packing of patches, without unfolding them in memory. Included by fisher_product_kernel.inl.

// Positions beside each other in one row of one image's output, which lie beside each other in the packed rows too.
struct PatchRow {
  int64_t image;        // its first element
  int64_t z, y, start;  // of the first patch: its corner's plane and row, and element in that row
  int64_t row, count;
};

// Columns beside each other in one panel, [to, to + length), and in memory: `offset` elements after the patch's corner
// in the row of pixels z, y further.
struct PatchRun {
  int64_t z, y, offset, length, to;
};

inline int64_t patch_rows(const SamplePatches& patches, const Chunk& chunk, PatchRow* to) {
  const int64_t rows = chunk.n_samples * chunk.n_steps;
  int64_t n = 0;
  for (int64_t row = 0; row < rows; row += to[n++].count) {
    const int64_t sample = chunk.first_sample + row / chunk.n_steps, t = chunk.first_step + row % chunk.n_steps;
    const int64_t w = t % patches.positions[2], line = t / patches.positions[2];
    const int64_t h = line % patches.positions[1], plane = line / patches.positions[1];
    const int64_t d = plane % patches.positions[0], image = plane / patches.positions[0];
    const int64_t until_sample = chunk.n_steps - row % chunk.n_steps, until_line = patches.positions[2] - w;
    to[n] = {(sample * patches.n_images + image) * patches.image_elements(),
             d * patches.stride[0] - patches.padding[0],
             h * patches.stride[1] - patches.padding[1],
             (w * patches.stride[2] - patches.padding[2]) * patches.pixel_stride,
             row,
             until_line < until_sample ? until_line : until_sample};
  }
  return n;
}

// Cuts the columns [first, first + count) into runs.
inline int64_t patch_runs(const SamplePatches& patches, int64_t first, int64_t count, PatchRun* runs) {
  // Taps beside each other are one run where pixels are beside each other too: not with dilation or groups.
  const bool joins = patches.dilation[2] == 1 && patches.channels == patches.pixel_stride;
  const int64_t line = patches.kernel[2] * patches.channels, longest = joins ? line : patches.channels;
  int64_t n = 0;
  for (int64_t at = 0; at < count; at += runs[n++].length) {
    const int64_t row = (first + at) / line, rest = (first + at) % line, left = longest - rest % longest;
    const int64_t tap = rest / patches.channels, channel = rest % patches.channels;
    runs[n] = {row / patches.kernel[1] * patches.dilation[0], row % patches.kernel[1] * patches.dilation[1],
               tap * patches.dilation[2] * patches.pixel_stride + channel, count - at < left ? count - at : left, at};
  }
  return n;
}

// Copies a run's `length` columns (LENGTH unless that is 0) for `count` patches beside each other. The first one's lie
// at element `start` of a row of pixels with `limit` elements, each next one's `step` later; beyond the row are zeros.
template <class T, class C, int WIDTH, int LENGTH>
WPLFAST_INLINE void copy_run(const T* row, int64_t start, int64_t step, int64_t limit, int64_t count, int64_t length,
                             C* to) {
  if (LENGTH > 0) length = LENGTH;
  const bool short_run = LENGTH == 0 && length < lanes<C>;
  for (const C* end = to + count * WIDTH; to < end;) {
    if (start < 0 || start + length > limit) {
      const int64_t skipped = start < 0 ? -start : 0, stop = limit - start < length ? limit - start : length;
      std::memset(to, 0, length * sizeof(C));
      if (skipped < stop) copy_row(row + start + skipped, stop - skipped, to + skipped);
      start += step;
      to += WIDTH;
    } else if (short_run) {
      for (; to < end && start + length <= limit; start += step, to += WIDTH) {
        store_first(to, load_first(row + start, length), length);
      }
    } else {
      for (; to < end && start + length <= limit; start += step, to += WIDTH) copy_row(row + start, length, to);
    }
  }
}

// Packs columns [first, first + WIDTH) of a chunk's patches into one panel [rows][WIDTH], zero beyond the last column.
template <class T, class C, int WIDTH>
void pack_patches(const SamplePatches& patches, const PatchRow* rows, int64_t n_rows, int64_t first, C* packed) {
  const int64_t left = patches.columns() - first, count = left < WIDTH ? left : WIDTH;
  const int64_t step = patches.stride[2] * patches.pixel_stride, limit = patches.size[2] * patches.pixel_stride;
  PatchRun runs[WIDTH];
  const int64_t n_runs = patch_runs(patches, first, count, runs);
  for (const PatchRow* row = rows; row < rows + n_rows; ++row) {
    C* to = packed + row->row * WIDTH;
    for (const PatchRun* run = runs; run < runs + n_runs; ++run) {
      const int64_t z = row->z + run->z, y = row->y + run->y;
      if (z < 0 || z >= patches.size[0] || y < 0 || y >= patches.size[1]) {
        for (int64_t i = 0; i < row->count; ++i) std::memset(to + i * WIDTH + run->to, 0, run->length * sizeof(C));
        continue;
      }
      const T* pixels = static_cast<const T*>(patches.data) + row->image + (z * patches.size[1] + y) * limit;
      if (run->length == WIDTH) {
        copy_run<T, C, WIDTH, WIDTH>(pixels, row->start + run->offset, step, limit, row->count, WIDTH, to);
      } else {
        copy_run<T, C, WIDTH, 0>(pixels, row->start + run->offset, step, limit, row->count, run->length, to + run->to);
      }
    }
    for (int64_t i = 0; i < row->count && count < WIDTH; ++i) {
      std::memset(to + i * WIDTH + count, 0, (WIDTH - count) * sizeof(C));
    }
  }
}

// Squares a panel's rows and multiplies each by its sample's weight (T = 1).
template <class C, int WIDTH>
void square_and_weigh(int64_t rows, bool squared, const C* weights, C* panel) {
  for (int64_t row = 0; row < rows; ++row, panel += WIDTH) {
    const C weight = weights == nullptr ? C{1} : weights[row];
    for (int64_t i = 0; i < WIDTH; ++i) panel[i] = (squared ? panel[i] * panel[i] : panel[i]) * weight;
  }
}
