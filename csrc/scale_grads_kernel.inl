// Sums of products over time, per column. Included by for_each_isa.inl.

// Columns are contiguous: COUNT vectors of them at a time, and `tail` lanes of the last one unless that is 0.
template <class T, class C, int COUNT>
void sum_columns(const ScaleTask& task, int64_t first, int64_t tail) {
  constexpr int64_t L = lanes<C>;
  using V = Vector<C>;
  const T* a = static_cast<const T*>(task.activations) + first;
  const T* g = static_cast<const T*>(task.grad_outputs) + first;
  double totals[COUNT * L] = {};
  for (int64_t t = 0; t < task.n_steps; t += TERMS) {
    const int64_t end = task.n_steps - t < TERMS ? task.n_steps : t + TERMS;
    V sums[COUNT] = {};
    for (int64_t step = t; step < end; ++step, a += task.stride_a, g += task.stride_g) {
      WPLFAST_UNROLL
      for (int v = 0; v < COUNT; ++v) {
        if (tail > 0) {
          sums[v] += load_first(a + v * L, tail) * load_first(g + v * L, tail);
        } else {
          sums[v] += load(a + v * L) * load(g + v * L);
        }
      }
    }
    for (int v = 0; v < COUNT; ++v) {
      for (int64_t lane = 0; lane < L; ++lane) totals[v * L + lane] += static_cast<double>(sums[v][lane]);
    }
  }
  C* to = static_cast<C*>(task.grads) + first;
  for (int64_t i = 0; i < (tail > 0 ? tail : COUNT * L); ++i) to[i] = static_cast<C>(totals[i]);
}

template <class T, class C>
void sum_strip(const ScaleTask& task) {
  constexpr int64_t L = lanes<C>;
  int64_t column = 0;
  for (; column + 4 * L <= task.columns; column += 4 * L) sum_columns<T, C, 4>(task, column, 0);
  for (; column + L <= task.columns; column += L) sum_columns<T, C, 1>(task, column, 0);
  if (column < task.columns) sum_columns<T, C, 1>(task, column, task.columns - column);
}

// Steps are contiguous: one column at a time, in four chains of vectors.
template <class T, class C>
void sum_steps(const ScaleTask& task) {
  constexpr int64_t L = lanes<C>, CHAINS = 4, BLOCK = TERMS * CHAINS * L;
  using V = Vector<C>;
  for (int64_t column = 0; column < task.columns; ++column) {
    const T* a = static_cast<const T*>(task.activations) + column * task.stride_a;
    const T* g = static_cast<const T*>(task.grad_outputs) + column * task.stride_g;
    double total = 0;
    for (int64_t t = 0; t < task.n_steps; t += BLOCK) {
      const int64_t end = task.n_steps - t < BLOCK ? task.n_steps : t + BLOCK;
      V sums[CHAINS] = {};
      int64_t i = t;
      for (; i + CHAINS * L <= end; i += CHAINS * L) {
        WPLFAST_UNROLL
        for (int chain = 0; chain < CHAINS; ++chain) sums[chain] += load(a + i + chain * L) * load(g + i + chain * L);
      }
      for (; i + L <= end; i += L) sums[0] += load(a + i) * load(g + i);
      if (i < end) sums[1] += load_first(a + i, end - i) * load_first(g + i, end - i);
      total += sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    static_cast<C*>(task.grads)[column] = static_cast<C>(total);
  }
}

template <class T, class C>
ScaleFunction pick_scale(bool by_steps) {
  return by_steps ? sum_steps<T, C> : sum_strip<T, C>;
}

ScaleFunction scale_kernel(Dtype dtype, bool by_steps) {
  switch (dtype) {
    case Dtype::f64:
      return pick_scale<double, double>(by_steps);
    case Dtype::bf16:
      return pick_scale<BFloat16, float>(by_steps);
    case Dtype::f16:
      return pick_scale<Half, float>(by_steps);
    default:
      return pick_scale<float, float>(by_steps);
  }
}
