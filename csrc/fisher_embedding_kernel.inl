// Sums of gathered rows per sample, squared and added to a table. Included by for_each_isa.inl.

// Adds what the places [begin, end) of one row give to COUNT vectors of its columns; with `tail`, only that many lanes
// of the last vector exist.
template <class T, class C, int COUNT>
void add_row(const RowsTask& task, int64_t begin, int64_t end, int64_t first, int64_t tail) {
  constexpr int64_t L = lanes<C>;
  using V = Vector<C>;
  C* fisher = static_cast<C*>(task.fisher) + task.places[begin].row * task.size + first;
  C* gradient =
      task.gradient == nullptr ? nullptr : static_cast<C*>(task.gradient) + task.places[begin].row * task.size + first;
  const auto flush = [&](C* to, V* sums) {
    WPLFAST_UNROLL
    for (int v = 0; v < COUNT; ++v) {
      if (v == COUNT - 1 && tail > 0) {
        store_first(to + v * L, load_first(to + v * L, tail) + sums[v], tail);
      } else {
        store(to + v * L, load(to + v * L) + sums[v]);
      }
      sums[v] = V{};
    }
  };
  V squares[COUNT] = {}, plain[COUNT] = {};
  int64_t samples = 0;
  for (int64_t at = begin; at < end;) {
    const int64_t sample = task.places[at].position / task.n_steps, next_sample = (sample + 1) * task.n_steps;
    V sums[COUNT] = {};
    for (; at < end && task.places[at].position < next_sample; ++at) {
      const T* row = static_cast<const T*>(task.grad_outputs) + task.places[at].position * task.size + first;
      WPLFAST_UNROLL
      for (int v = 0; v < COUNT; ++v) {
        sums[v] += v == COUNT - 1 && tail > 0 ? load_first(row + v * L, tail) : load(row + v * L);
      }
    }
    const C weight = task.weights == nullptr ? C{1} : static_cast<C>(task.weights[sample]);
    WPLFAST_UNROLL
    for (int v = 0; v < COUNT; ++v) {
      const V weighted = weight * sums[v];
      squares[v] += weighted * sums[v];
      plain[v] += weighted;
    }
    if (++samples == SAMPLES_PER_SUM || at == end) {
      flush(fisher, squares);
      if (gradient != nullptr) flush(gradient, plain);
      samples = 0;
    }
  }
}

// Every row of a task's places, four vectors at a time.
template <class T, class C>
void add_rows(const RowsTask& task) {
  constexpr int64_t L = lanes<C>;
  for (int64_t begin = 0, end = 0; begin < task.n_places; begin = end) {
    while (end < task.n_places && task.places[end].row == task.places[begin].row) ++end;
    int64_t column = task.first;
    const int64_t last = task.first + task.count;
    for (; column + 4 * L <= last; column += 4 * L) add_row<T, C, 4>(task, begin, end, column, 0);
    for (; column + L <= last; column += L) add_row<T, C, 1>(task, begin, end, column, 0);
    if (column < last) add_row<T, C, 1>(task, begin, end, column, last - column);
  }
}

RowsFunction rows_kernel(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return add_rows<double, double>;
    case Dtype::bf16:
      return add_rows<BFloat16, float>;
    case Dtype::f16:
      return add_rows<Half, float>;
    default:
      return add_rows<float, float>;
  }
}
