// One block of one parameter's consolidation, in fp64 vectors whatever the types are. Included by for_each_isa.inl.

typedef float HalfF32 __attribute__((vector_size(WPLFAST_VECTOR_BYTES / 2)));
typedef float LooseHalfF32 __attribute__((vector_size(WPLFAST_VECTOR_BYTES / 2), aligned(4), may_alias));
typedef uint32_t HalfU32 __attribute__((vector_size(WPLFAST_VECTOR_BYTES / 2)));
typedef uint16_t QuarterU16 __attribute__((vector_size(WPLFAST_VECTOR_BYTES / 4)));
typedef uint16_t LooseQuarterU16 __attribute__((vector_size(WPLFAST_VECTOR_BYTES / 4), aligned(2), may_alias));

WPLFAST_INLINE F64 widen(const double* from) { return load(from); }

WPLFAST_INLINE F64 widen(const float* from) {
  return __builtin_convertvector(*reinterpret_cast<const LooseHalfF32*>(from), F64);
}

WPLFAST_INLINE F64 widen(const BFloat16* from) {
  const HalfU32 bits = __builtin_convertvector(*reinterpret_cast<const LooseQuarterU16*>(from), HalfU32) << 16;
  return __builtin_convertvector((HalfF32)bits, F64);
}

WPLFAST_INLINE F64 widen(const Half* from) {
  F64 value;
  for (int lane = 0; lane < lanes<double>; ++lane) value[lane] = to_float(from[lane]);
  return value;
}

WPLFAST_INLINE void narrow(double* to, F64 value) { store(to, value); }

WPLFAST_INLINE void narrow(float* to, F64 value) {
  *reinterpret_cast<LooseHalfF32*>(to) = __builtin_convertvector(value, HalfF32);
}

WPLFAST_INLINE void narrow(BFloat16* to, F64 value) {  // F is no NaN
  const HalfU32 bits = (HalfU32) __builtin_convertvector(value, HalfF32);
  const HalfU32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  *reinterpret_cast<LooseQuarterU16*>(to) = __builtin_convertvector(rounded, QuarterU16);
}

// T is theta_hat's type, C the offset's, F and N those of the two Fishers.
template <class T, class C, class F, class N, bool MERGE, bool WRITE>
struct ConsolidateBlock {
  static constexpr int64_t LANES = lanes<double>;

  static WPLFAST_INLINE void step(T* theta_hat, C* offset, F* fisher, const T* new_hat, const N* new_fisher,
                                  double decay, double weight, F64& added, F64& squares) {
    const F64 before = decay * widen(fisher), entering = weight * widen(new_fisher), total = before + entering;
    if constexpr (MERGE) {
      const F64 gap = widen(theta_hat) + widen(offset) - widen(new_hat);
      const F64 shift = before / (total > LEAST ? total : F64{} + LEAST) * gap;
      if constexpr (WRITE) {
        narrow(offset, shift);
        std::memcpy(theta_hat, new_hat, LANES * sizeof(T));
      } else {
        added += shift * gap * entering;
      }
    }
    if constexpr (WRITE) {
      narrow(fisher, total);
    } else {
      squares += total * total;
    }
  }

  static Sums run(const AnchorUpdate& update, int64_t begin, int64_t count) {
    T* theta_hat = MERGE ? static_cast<T*>(update.theta_hat) + begin : nullptr;
    const T* new_hat = MERGE ? static_cast<const T*>(update.new_theta_hat) + begin : nullptr;
    C* offset = MERGE ? static_cast<C*>(update.offset) + begin : nullptr;
    F* fisher = static_cast<F*>(update.fisher) + begin;
    const N* new_fisher = static_cast<const N*>(update.new_fisher) + begin;
    F64 added = {}, squares = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
      step(MERGE ? theta_hat + i : nullptr, MERGE ? offset + i : nullptr, fisher + i, MERGE ? new_hat + i : nullptr,
           new_fisher + i, update.decay, update.weight, added, squares);
    }
    if (i < count) {  // a last partial vector, padded with zeros, which stay zero and add nothing
      const int64_t rest = count - i;
      alignas(64) T tail_hat[LANES] = {}, tail_new_hat[LANES] = {};
      alignas(64) C tail_offset[LANES] = {};
      alignas(64) F tail_fisher[LANES] = {};
      alignas(64) N tail_new_fisher[LANES] = {};
      std::memcpy(tail_fisher, fisher + i, rest * sizeof(F));
      std::memcpy(tail_new_fisher, new_fisher + i, rest * sizeof(N));
      if constexpr (MERGE) {
        std::memcpy(tail_hat, theta_hat + i, rest * sizeof(T));
        std::memcpy(tail_new_hat, new_hat + i, rest * sizeof(T));
        std::memcpy(tail_offset, offset + i, rest * sizeof(C));
      }
      step(tail_hat, tail_offset, tail_fisher, tail_new_hat, tail_new_fisher, update.decay, update.weight, added,
           squares);
      if constexpr (WRITE) std::memcpy(fisher + i, tail_fisher, rest * sizeof(F));
      if constexpr (WRITE && MERGE) {
        std::memcpy(theta_hat + i, tail_hat, rest * sizeof(T));
        std::memcpy(offset + i, tail_offset, rest * sizeof(C));
      }
    }
    if constexpr (WRITE && !MERGE) {
      const int64_t size = size_of(update.dtype), wide = update.dtype == Dtype::f64 ? 8 : 4;
      std::memcpy(static_cast<char*>(update.theta_hat) + begin * size,
                  static_cast<const char*>(update.new_theta_hat) + begin * size, count * size);
      if (update.offset != nullptr) std::memset(static_cast<char*>(update.offset) + begin * wide, 0, count * wide);
    }
    return {sum_lanes(added), sum_lanes(squares)};
  }
};

template <class T, class C, class F, class N>
ConsolidateFunction choose_work(bool merge, bool write) {
  if (!merge) {  // theta_hat is moved as bytes
    return write ? ConsolidateBlock<float, float, F, N, false, true>::run
                 : ConsolidateBlock<float, float, F, N, false, false>::run;
  }
  return write ? ConsolidateBlock<T, C, F, N, true, true>::run : ConsolidateBlock<T, C, F, N, true, false>::run;
}

template <class T>
ConsolidateFunction choose_fishers(const AnchorUpdate& update, bool merge, bool write) {
  const bool narrow = update.fisher_dtype == Dtype::bf16;
  if (update.new_fisher_dtype == Dtype::f64) {
    return narrow ? choose_work<T, float, BFloat16, double>(merge, write)
                  : choose_work<T, float, float, double>(merge, write);
  }
  return narrow ? choose_work<T, float, BFloat16, float>(merge, write)
                : choose_work<T, float, float, float>(merge, write);
}

ConsolidateFunction consolidate_block(const AnchorUpdate& update, bool merge, bool write) {
  switch (update.dtype) {
    case Dtype::f64:
      return choose_work<double, double, double, double>(merge, write);
    case Dtype::bf16:
      return choose_fishers<BFloat16>(update, merge, write);
    case Dtype::f16:
      return choose_fishers<Half>(update, merge, write);
    default:
      return choose_fishers<float>(update, merge, write);
  }
}
