// Packing of patches, without unfolding them in memory. Included by fisher_product_kernel.inl.

// A run of contiguous columns inside one panel, [to, to + length), which come from one row of pixels: of the image row
// at tap (d, h), the elements from `offset` on, counted from the first pixel that the patch sees.
struct Run {
  int64_t d, h, offset, length, to;
};

// Cuts the columns [first, first + count) of a panel into runs, and what is left of `width` into zeros (d = -1).
inline int64_t cut_into_runs(const SamplePatches& patches, int64_t first, int64_t count, int64_t width, Run* runs) {
  // Taps beside each other are one run where pixels are beside each other too: not with dilation or groups.
  const bool joins = patches.dilation[2] == 1 && patches.channels == patches.pixel_stride;
  const int64_t row = patches.kernel[2] * patches.channels, longest = joins ? row : patches.channels;
  int64_t n_runs = 0;
  for (int64_t at = 0; at < count;) {
    const int64_t column = first + at, plane_row = column / row, rest = column % row;
    const int64_t left = longest - rest % longest;
    const int64_t length = count - at < left ? count - at : left;
    const int64_t tap = rest / patches.channels, channel = rest % patches.channels;
    runs[n_runs++] = {plane_row / patches.kernel[1], plane_row % patches.kernel[1],
                      tap * patches.dilation[2] * patches.pixel_stride + channel, length, at};
    at += length;
  }
  if (count < width) runs[n_runs++] = {-1, 0, 0, width - count, count};
  return n_runs;
}

// Copies `count` elements in the compute type.
template <class T, class C>
WPLFAST_INLINE void copy_run(const T* from, int64_t count, C* to) {
  constexpr int64_t L = lanes<C>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load_first(from + i, count - i), count - i);
}

// Copies a run of LENGTH (or, if that is 0, `length`) columns for `count` patches beside each other. The first starts
// at element `start` of a row of pixels with `limit` elements, each next one `step` later; beyond the row are zeros.
template <class T, class C, int WIDTH, int LENGTH>
WPLFAST_INLINE void copy_runs(const T* row, int64_t start, int64_t step, int64_t limit, int64_t count, int64_t length,
                              C* to) {
  if (LENGTH > 0) length = LENGTH;
  for (int64_t i = 0; i < count; ++i, start += step, to += WIDTH) {
    if (start >= 0 && start + length <= limit) {
      copy_run(row + start, length, to);
      continue;
    }
    const int64_t skipped = start < 0 ? -start : 0;
    const int64_t stop = limit - start < length ? limit - start : length;
    std::memset(to, 0, length * sizeof(C));
    if (skipped < stop) copy_run(row + start + skipped, stop - skipped, to + skipped);
  }
}

// As pack(), for patches: a row of output positions at a time, so that the image's borders are looked at once for many.
template <class T, class C, int WIDTH>
void pack_patches(const SamplePatches& patches, const Chunk& chunk, int64_t first, int64_t n_panels, C* packed) {
  const int64_t rows = chunk.n_samples * chunk.n_steps;
  const int64_t count = patches.columns() - first;
  Run runs[(BLOCK_ROWS > BLOCK_COLUMNS ? BLOCK_ROWS : BLOCK_COLUMNS) + WIDTH];
  int64_t ends[(BLOCK_ROWS > BLOCK_COLUMNS ? BLOCK_ROWS : BLOCK_COLUMNS) / WIDTH + 1], n_runs = 0;
  for (int64_t panel = 0; panel < n_panels; ++panel) {
    const int64_t left = count - panel * WIDTH;
    n_runs += cut_into_runs(patches, first + panel * WIDTH, left < WIDTH ? left : WIDTH, WIDTH, runs + n_runs);
    ends[panel] = n_runs;
  }
  const int64_t step = patches.stride[2] * patches.pixel_stride, limit = patches.size[2] * patches.pixel_stride;
  // Channels of other groups follow the last pixel's own, and are not read: a run never reaches beyond its pixel then.
  for (int64_t row = 0; row < rows;) {
    const int64_t n = chunk.first_sample + row / chunk.n_steps, t = chunk.first_step + row % chunk.n_steps;
    const int64_t w = t % patches.positions[2], line = t / patches.positions[2];
    const int64_t h = line % patches.positions[1], plane = line / patches.positions[1];
    const int64_t d = plane % patches.positions[0], m = plane / patches.positions[0];
    const int64_t until_sample = chunk.n_steps - row % chunk.n_steps, until_line = patches.positions[2] - w;
    const int64_t positions = until_line < until_sample ? until_line : until_sample;
    const T* image = static_cast<const T*>(patches.data) + (n * patches.n_images + m) * patches.image_elements();
    const int64_t start = (w * patches.stride[2] - patches.padding[2]) * patches.pixel_stride;
    int64_t run = 0;
    C* to = packed + row * WIDTH;
    for (int64_t panel = 0; panel < n_panels; ++panel, to += rows * WIDTH) {
      for (; run < ends[panel]; ++run) {
        const Run& r = runs[run];
        const int64_t z = d * patches.stride[0] - patches.padding[0] + r.d * patches.dilation[0];
        const int64_t y = h * patches.stride[1] - patches.padding[1] + r.h * patches.dilation[1];
        const bool inside = r.d >= 0 && z >= 0 && z < patches.size[0] && y >= 0 && y < patches.size[1];
        if (!inside) {
          for (int64_t i = 0; i < positions; ++i) std::memset(to + i * WIDTH + r.to, 0, r.length * sizeof(C));
          continue;
        }
        const T* pixels = image + (z * patches.size[1] + y) * limit;
        if (r.length == WIDTH) {
          copy_runs<T, C, WIDTH, WIDTH>(pixels, start + r.offset, step, limit, positions, WIDTH, to);
        } else {
          copy_runs<T, C, WIDTH, 0>(pixels, start + r.offset, step, limit, positions, r.length, to + r.to);
        }
      }
    }
    row += positions;
  }
}

// Squares packed rows and multiplies each sample's by its weight (T = 1).
template <class C, int WIDTH>
void square_and_weigh(const Chunk& chunk, int64_t n_panels, bool squared, const C* weights, C* packed) {
  const int64_t rows = chunk.n_samples * chunk.n_steps;
  for (int64_t row = 0; row < n_panels * rows; ++row, packed += WIDTH) {
    const C weight = weights == nullptr ? C{1} : weights[chunk.first_sample + row % rows / chunk.n_steps];
    for (int64_t i = 0; i < WIDTH; ++i) packed[i] = (squared ? packed[i] * packed[i] : packed[i]) * weight;
  }
}

template <class T, class C, int WIDTH>
void pack_side(const Side& side, const Chunk& chunk, PanelRange panels, bool squared, const C* weights, C* line,
               C* packed) {
  const int64_t n_panels = panels.end - panels.begin, first = panels.begin * WIDTH;
  if (!side.is_patches) {
    pack<T, C, WIDTH>(side.matrix, chunk, first, n_panels, squared, weights, line, packed);
    return;
  }
  pack_patches<T, C, WIDTH>(side.patches, chunk, first, n_panels, packed);
  if (squared || weights != nullptr) square_and_weigh<C, WIDTH>(chunk, n_panels, squared, weights, packed);
}
