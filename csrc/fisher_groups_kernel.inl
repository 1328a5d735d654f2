// Per-sample weight gradients of many small groups, vectorised over output channels. Included by for_each_isa.inl.

#include "copy_row.inl"

constexpr int STRIP_VECTORS = 2;
template <class C>
constexpr int64_t STRIP = STRIP_VECTORS * lanes<C>;

// The images' row that patches see, from its left padding to its right one, as [channels of a group][pixels][STRIP]:
// each output channel's own input.
template <class C>
struct Lines {
  int64_t pixels, line, raw, gradient, end;  // lengths and starts in a thread's workspace

  explicit Lines(const GroupsPlan& plan) {
    const SamplePatches& p = plan.patches;
    pixels = (p.positions[2] - 1) * p.stride[2] + (p.kernel[2] - 1) * p.dilation[2] + 1;
    line = 0;
    raw = p.channels * pixels * STRIP<C>;
    gradient = raw + (STRIP<C> / plan.group_out + 2) * p.channels + 16;
    end = gradient + p.columns() * STRIP<C>;
  }
};

// Fills `line` from a row of pixels.
template <class T, class C>
void spread_line(const GroupsPlan& plan, const T* row, int64_t first, int64_t width, const Lines<C>& at, C* line,
                 C* raw) {
  const SamplePatches& p = plan.patches;
  const int64_t group = first / plan.group_out, channels = p.channels;
  const int64_t n_raw = ((first + width - 1) / plan.group_out - group + 1) * channels;
  int64_t source[STRIP<C>];
  for (int64_t lane = 0; lane < width; ++lane) source[lane] = ((first + lane) / plan.group_out - group) * channels;
  const bool identity = channels == 1 && plan.group_out == 1;
  for (int64_t pixel = 0; pixel < at.pixels; ++pixel, line += STRIP<C>) {
    const int64_t x = pixel - p.padding[2];
    if (x < 0 || x >= p.size[2]) {
      for (int64_t i = 0; i < channels; ++i) std::memset(line + i * at.pixels * STRIP<C>, 0, STRIP<C> * sizeof(C));
      continue;
    }
    const T* from = row + x * p.pixel_stride + group * channels;
    if (identity) {
      copy_row(from, width, line);
      continue;
    }
    copy_row(from, n_raw, raw);
    for (int64_t i = 0; i < channels; ++i) {
      C* to = line + i * at.pixels * STRIP<C>;
      for (int64_t lane = 0; lane < width; ++lane) to[lane] = raw[source[lane] + i];
    }
  }
}

// sums[tap] += sum over positions of G times the line, for TAPS taps at offsets from `line`; all are STRIP wide.
template <class T, class C, int TAPS>
void add_taps(const T* g, int64_t g_step, const C* line, const int64_t* offsets, int64_t line_step, int64_t positions,
              int64_t width, C* const* sums) {
  constexpr int64_t L = lanes<C>;
  Vector<C> tile[TAPS][STRIP_VECTORS] = {};
  const auto accumulate = [&](auto load_grad) {
    for (int64_t position = 0; position < positions; ++position, g += g_step, line += line_step) {
      const Vector<C> left = load_grad(g, 0), right = load_grad(g, L);
      WPLFAST_UNROLL
      for (int tap = 0; tap < TAPS; ++tap) {
        tile[tap][0] += left * load(line + offsets[tap]);
        tile[tap][1] += right * load(line + offsets[tap] + L);
      }
    }
  };
  if (width == STRIP<C>) {
    accumulate([](const T* from, int64_t lane) { return load(from + lane); });
  } else {
    accumulate([&](const T* from, int64_t lane) {
      const int64_t left = width - lane;
      return left >= L ? load(from + lane) : load_first(from + (left > 0 ? lane : 0), left > 0 ? left : 0);
    });
  }
  for (int tap = 0; tap < TAPS; ++tap) {
    store(sums[tap], load(sums[tap]) + tile[tap][0]);
    store(sums[tap] + L, load(sums[tap] + L) + tile[tap][1]);
  }
}

// Which output row has tap k on input row `at`; -1 if none.
inline int64_t position_of(const SamplePatches& p, int dim, int64_t at, int64_t k) {
  const int64_t reach = at + p.padding[dim] - k * p.dilation[dim], position = reach / p.stride[dim];
  return reach >= 0 && reach % p.stride[dim] == 0 && position < p.positions[dim] ? position : -1;
}

// The gradient of one sample's images, [taps, channels, STRIP].
template <class T, class C>
void sum_sample(const GroupsPlan& plan, int64_t n, int64_t first, int64_t width, const Lines<C>& at, C* workspace) {
  const SamplePatches& p = plan.patches;
  C* line = workspace + at.line;
  C* gradient = workspace + at.gradient;
  std::memset(gradient, 0, p.columns() * STRIP<C> * sizeof(C));
  const int64_t per_tap = p.channels * STRIP<C>, planes = p.n_images * p.size[0];
  for (int64_t index = 0; index < planes * p.size[1]; ++index) {
    const int64_t y = index % p.size[1], z = index / p.size[1] % p.size[0], image = index / p.size[1] / p.size[0];
    bool is_spread = false;
    for (int64_t k = 0; k < p.kernel[0] * p.kernel[1]; ++k) {
      const int64_t d = position_of(p, 0, z, k / p.kernel[1]), h = position_of(p, 1, y, k % p.kernel[1]);
      if (d < 0 || h < 0) continue;
      if (!is_spread) {
        const T* images = static_cast<const T*>(p.data) + n * p.n_images * p.image_elements();
        spread_line(plan, images + index * p.size[2] * p.pixel_stride, first, width, at, line, workspace + at.raw);
        is_spread = true;
      }
      const int64_t out_row = ((n * p.n_images + image) * p.positions[0] + d) * p.positions[1] + h;
      const T* g = static_cast<const T*>(plan.grad_outputs) + out_row * p.positions[2] * plan.c_out + first;
      const int64_t total = p.kernel[2] * p.channels;
      for (int64_t done = 0; done < total; done += 4) {
        const int64_t count = total - done < 4 ? total - done : 4;
        int64_t offsets[4];
        C* sums[4];
        for (int64_t i = 0; i < count; ++i) {
          const int64_t tap = (done + i) / p.channels, channel = (done + i) % p.channels;
          offsets[i] = (channel * at.pixels + tap * p.dilation[2]) * STRIP<C>;
          sums[i] = gradient + (k * p.kernel[2] + tap) * per_tap + channel * STRIP<C>;
        }
        const auto add = count == 4   ? add_taps<T, C, 4>
                         : count == 3 ? add_taps<T, C, 3>
                         : count == 2 ? add_taps<T, C, 2>
                                      : add_taps<T, C, 1>;
        add(g, plan.c_out, line, offsets, p.stride[2] * STRIP<C>, p.positions[2], width, sums);
      }
    }
  }
}

template <class T, class C>
void sum_strip(const GroupsPlan& plan, int64_t strip, int64_t unit, void* workspace, void* sums_out,
               void* gradient_out) {
  constexpr int64_t L = lanes<C>;
  const Lines<C> at(plan);
  const int64_t first = strip * STRIP<C>, left = plan.c_out - first, width = left < STRIP<C> ? left : STRIP<C>;
  const int64_t length = plan.patches.columns() * STRIP<C>;
  C* sums = static_cast<C*>(sums_out);
  C* plain = static_cast<C*>(gradient_out);
  const C* gradient = static_cast<C*>(workspace) + at.gradient;
  std::memset(static_cast<C*>(workspace) + at.line, 0, at.raw * sizeof(C));  // lanes beyond the width stay zero
  std::memset(sums, 0, length * sizeof(C));
  std::memset(plain, 0, length * sizeof(C));
  const int64_t begin = unit * plan.unit_samples;
  const int64_t end = plan.n_samples - begin < plan.unit_samples ? plan.n_samples : begin + plan.unit_samples;
  for (int64_t n = begin; n < end; ++n) {
    sum_sample<T, C>(plan, n, first, width, at, static_cast<C*>(workspace));
    const C weight = plan.weights == nullptr ? C{1} : static_cast<C>(plan.weights[n]);
    for (int64_t i = 0; i < length; i += L) {
      const Vector<C> value = load(gradient + i), weighted = weight * value;
      store(sums + i, load(sums + i) + weighted * value);
      if (plan.has_gradient) store(plain + i, load(plain + i) + weighted);
    }
  }
}

template <class C>
int64_t workspace_elements(const GroupsPlan& plan) {
  return Lines<C>(plan).end;
}

template <class T, class C>
GroupsKernel make_kernel() {
  return {STRIP<C>, workspace_elements<C>, sum_strip<T, C>};
}

GroupsKernel groups_kernel(Dtype dtype) {
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
