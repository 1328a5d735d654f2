// One block of one parameter: fp32 (fp64 for doubles) vectors, summed to one double. Included by for_each_isa.inl.

// Two vectors per step keep enough loads in flight; more would spill on AVX2 with an offset and l2.
constexpr int UNROLL = 2;

// Memory is asked for AHEAD_BYTES ahead, array by array, for so many elements at once. The processor's own prefetching
// begins anew at every page, of which four arrays cross many: without this, they are read at 0.7 to 0.8 of the rate of
// two (EPYC, family 25), with less or more at once and nearer or farther ahead at 0.8 to 0.9 of what this gives.
constexpr int64_t AHEAD_ELEMENTS = 64;

// Asks for as many elements of an array, for the second level of the cache.
template <class E>
WPLFAST_INLINE void prefetch(const E* from) {
  const char* const ahead = reinterpret_cast<const char*>(from) + AHEAD_BYTES;
  for (size_t at = 0; at < AHEAD_ELEMENTS * sizeof(E); at += 64) __builtin_prefetch(ahead + at, 0, 2);
}

template <class T, class F, class C, PenaltyMode MODE, bool OFFSET, bool L2, bool STREAMING>
struct PenaltyBlock {
  using V = Vector<C>;
  static constexpr int64_t LANES = lanes<C>;

  static WPLFAST_INLINE void step(const T* theta, const T* theta_hat, const C* offset, const F* fisher, T* grad,
                                  C alpha, C l2, C scale, V& fisher_sum, V& square_sum) {
    const V p = load(theta);
    V d = p - load(theta_hat);
    if constexpr (OFFSET) d -= load(offset);
    const V fd = load(fisher) * d;
    fisher_sum += fd * d;
    if constexpr (L2) square_sum += p * p;
    if constexpr (MODE != PenaltyMode::value) {
      V gradient = alpha * fd;
      if constexpr (L2) gradient += l2 * p;
      if constexpr (MODE == PenaltyMode::add) gradient = load(grad) + scale * gradient;
      if constexpr (STREAMING) {
        store_streaming(grad, gradient);
      } else {
        store(grad, gradient);
      }
    }
  }

  static double run(const Anchor& anchor, int64_t begin, int64_t count, double l2_wide, double scale_wide) {
    const T* theta = static_cast<const T*>(anchor.theta) + begin;
    const T* theta_hat = static_cast<const T*>(anchor.theta_hat) + begin;
    const C* offset = OFFSET ? static_cast<const C*>(anchor.offset) + begin : nullptr;
    const F* fisher = static_cast<const F*>(anchor.fisher) + begin;
    T* grad = MODE == PenaltyMode::value ? nullptr : static_cast<T*>(anchor.grad) + begin;
    const C alpha = static_cast<C>(anchor.alpha), l2 = static_cast<C>(l2_wide), scale = static_cast<C>(scale_wide);

    V fisher_sum[UNROLL] = {}, square_sum[UNROLL] = {};
    int64_t i = 0;
    const int64_t whole = count - count % (UNROLL * LANES);
    while (i < whole) {
      prefetch(theta + i);
      prefetch(theta_hat + i);
      if constexpr (OFFSET) prefetch(offset + i);
      prefetch(fisher + i);
      if constexpr (MODE == PenaltyMode::add) prefetch(grad + i);
      for (const int64_t end = std::min(i + AHEAD_ELEMENTS, whole); i < end; i += UNROLL * LANES) {
        WPLFAST_UNROLL
        for (int u = 0; u < UNROLL; ++u) {
          const int64_t at = i + u * LANES;
          step(theta + at, theta_hat + at, OFFSET ? offset + at : nullptr, fisher + at, grad ? grad + at : nullptr,
               alpha, l2, scale, fisher_sum[u], square_sum[u]);
        }
      }
    }
    for (; i + LANES <= count; i += LANES) {
      step(theta + i, theta_hat + i, OFFSET ? offset + i : nullptr, fisher + i, grad ? grad + i : nullptr, alpha, l2,
           scale, fisher_sum[0], square_sum[0]);
    }
    if (i < count) {  // a last partial vector, padded with zeros, which add nothing
      const int64_t rest = count - i;
      alignas(64) T tail_theta[LANES] = {}, tail_hat[LANES] = {}, tail_grad[LANES] = {};
      alignas(64) C tail_offset[LANES] = {};
      alignas(64) F tail_fisher[LANES] = {};
      std::memcpy(tail_theta, theta + i, rest * sizeof(T));
      std::memcpy(tail_hat, theta_hat + i, rest * sizeof(T));
      std::memcpy(tail_fisher, fisher + i, rest * sizeof(F));
      if constexpr (OFFSET) std::memcpy(tail_offset, offset + i, rest * sizeof(C));
      if constexpr (MODE == PenaltyMode::add) std::memcpy(tail_grad, grad + i, rest * sizeof(T));
      step(tail_theta, tail_hat, tail_offset, tail_fisher, tail_grad, alpha, l2, scale, fisher_sum[0], square_sum[0]);
      if constexpr (MODE != PenaltyMode::value) std::memcpy(grad + i, tail_grad, rest * sizeof(T));
    }
    if constexpr (STREAMING) fence_streaming();

    double fisher_total = 0, square_total = 0;
    for (int u = 0; u < UNROLL; ++u) fisher_total += sum_lanes(fisher_sum[u]);
    if constexpr (L2) {
      for (int u = 0; u < UNROLL; ++u) square_total += sum_lanes(square_sum[u]);
    }
    return 0.5 * (anchor.alpha * fisher_total + (L2 ? l2_wide * square_total : 0.0));
  }
};

template <class T, class F, class C, PenaltyMode MODE, bool STREAMING>
PenaltyBlockFunction choose_terms(bool offset, bool l2) {
  if (offset) {
    return l2 ? PenaltyBlock<T, F, C, MODE, true, true, STREAMING>::run
              : PenaltyBlock<T, F, C, MODE, true, false, STREAMING>::run;
  }
  return l2 ? PenaltyBlock<T, F, C, MODE, false, true, STREAMING>::run
            : PenaltyBlock<T, F, C, MODE, false, false, STREAMING>::run;
}

template <class T, class F, class C>
PenaltyBlockFunction choose_mode(PenaltyMode mode, bool offset, bool l2, bool streaming) {
  if (mode == PenaltyMode::value) return choose_terms<T, F, C, PenaltyMode::value, false>(offset, l2);
  if (mode == PenaltyMode::add) return choose_terms<T, F, C, PenaltyMode::add, false>(offset, l2);
  if constexpr (sizeof(T) >= 4) {
    if (streaming) return choose_terms<T, F, C, PenaltyMode::store, true>(offset, l2);
  }
  return choose_terms<T, F, C, PenaltyMode::store, false>(offset, l2);
}

template <class T>
PenaltyBlockFunction choose_fisher(Dtype fisher, PenaltyMode mode, bool offset, bool l2, bool streaming) {
  if (fisher == Dtype::bf16) return choose_mode<T, BFloat16, float>(mode, offset, l2, streaming);
  return choose_mode<T, float, float>(mode, offset, l2, streaming);
}

PenaltyBlockFunction penalty_block(const PenaltyCall& call, PenaltyMode mode, bool offset, bool streaming) {
  const bool l2 = call.l2 != 0;
  switch (call.dtype) {
    case Dtype::f64:
      return choose_mode<double, double, double>(mode, offset, l2, streaming);
    case Dtype::bf16:
      return choose_fisher<BFloat16>(call.fisher_dtype, mode, offset, l2, streaming);
    case Dtype::f16:
      return choose_fisher<Half>(call.fisher_dtype, mode, offset, l2, streaming);
    default:
      return choose_fisher<float>(call.fisher_dtype, mode, offset, l2, streaming);
  }
}
