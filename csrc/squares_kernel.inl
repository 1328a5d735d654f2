// Weighted squares of a strip of columns over a range of samples, summed to doubles. Included by for_each_isa.inl.

// to[j] = sum_n w_n grads[n, j]^2 for `columns` (at most STRIP) columns; fp32 sums of at most SAMPLES_PER_SUM terms are
// added up in double.
template <class T, class C>
void square_strip(const void* grads, int64_t row_stride, const double* weights, int64_t n_samples, int64_t columns,
                  double* to) {
  constexpr int64_t L = lanes<C>;
  const T* row = static_cast<const T*>(grads);
  alignas(64) C sums[STRIP + 64 / sizeof(C)];
  alignas(64) T tail[L] = {};
  for (int64_t j = 0; j < columns; ++j) to[j] = 0;
  for (int64_t n = 0; n < n_samples; n += SAMPLES_PER_SUM) {
    const int64_t end = n_samples - n < SAMPLES_PER_SUM ? n_samples : n + SAMPLES_PER_SUM;
    std::memset(sums, 0, sizeof sums);
    for (int64_t sample = n; sample < end; ++sample, row += row_stride) {
      const C weight = weights == nullptr ? C{1} : static_cast<C>(weights[sample]);
      int64_t j = 0;
      for (; j + L <= columns; j += L) {
        __builtin_prefetch(row + 2 * row_stride + j);  // rows are pages apart, which hardware prefetch does not follow
        const Vector<C> value = load(row + j);
        store(sums + j, load(sums + j) + weight * value * value);
      }
      if (j < columns) {
        std::memcpy(tail, row + j, (columns - j) * sizeof(T));
        const Vector<C> value = load(tail);
        store(sums + j, load(sums + j) + weight * value * value);
      }
    }
    for (int64_t j = 0; j < columns; ++j) to[j] += static_cast<double>(sums[j]);
  }
}

SquareStripFunction square_strip_kernel(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return square_strip<double, double>;
    case Dtype::bf16:
      return square_strip<BFloat16, float>;
    case Dtype::f16:
      return square_strip<Half, float>;
    default:
      return square_strip<float, float>;
  }
}
