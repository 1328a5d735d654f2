// The prototype that benchmarks/fused_step.py measures: penalty and optimizer step, each in a pass or both in one pass.
//   value = alpha/2 sum_i F_i d_i^2,   g_i += scale alpha F_i d_i,   d = theta - theta_hat,   theta -= step(g)
// Vectors and threads are those of the library's kernels. All stores are ordinary ones: what is written was read just
// before, so its line is in L1 and a store that bypasses the caches would only evict it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "simd_prelude.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#  define WPLFAST_VECTOR_BYTES 64
#  define WPLFAST_AVX512 1
#elif defined(__AVX2__) && defined(__F16C__)
#  define WPLFAST_VECTOR_BYTES 32
#  define WPLFAST_AVX2 1
#else
#  define WPLFAST_VECTOR_BYTES 16
#endif

namespace wplfast {
namespace {

#include "simd.inl"

// The orders of the enumerations and of the structs' members are shared with fused_step.py beside this file.
enum class Rule : int { sgd = 0, momentum = 1, adamw = 2 };
enum class Pass : int { penalty = 0, step = 1, fused = 2 };

struct Slot {
  float* theta;
  const float* theta_hat;
  const float* fisher;
  float* grad;
  float* first;   // momentum, or AdamW's exp_avg
  float* second;  // AdamW's exp_avg_sq
  int64_t numel;
};

struct Coefficients {
  float alpha, scale;
  float lr;               // AdamW: divided by the first bias correction
  float beta1, rest1;     // rest = 1 - beta, rounded from double: 1 - 0.999f is off by 5e-5 of itself
  float beta2, rest2;     // SGD's momentum is beta1
  float root_correction;  // 1 / sqrt of the second bias correction
  float eps;
  float shrink;  // 1 - lr * weight_decay
};

constexpr int64_t BLOCK = 4096;   // elements per partial sum, as in csrc/penalty.cpp
constexpr int64_t GRAIN = 32768;  // elements worth waking a thread for, likewise
constexpr int UNROLL = 2;
// Elements that are asked for ahead. With five or six arrays to read, the processor's own prefetchers fall behind.
constexpr int64_t AHEAD = 256;

WPLFAST_INLINE F32 square_root(F32 value) {
#if defined(WPLFAST_AVX512)
  return (F32)_mm512_sqrt_ps((__m512)value);
#elif defined(WPLFAST_AVX2)
  return (F32)_mm256_sqrt_ps((__m256)value);
#else
  for (int lane = 0; lane < lanes<float>; ++lane) value[lane] = std::sqrt(value[lane]);
  return value;
#endif
}

// One vector of each array at `at`, or the first `count` elements of one where TAIL.
template <Rule RULE, Pass PASS, bool TAIL>
WPLFAST_INLINE void update(const Slot& slot, int64_t at, int64_t count, const Coefficients& c, F32& sum) {
  const auto take = [&](const float* from) {
    if constexpr (TAIL) return load_first(from + at, count);
    __builtin_prefetch(from + at + AHEAD);  // one line, the width of an AVX-512 vector; past the end it does nothing
    return load(from + at);
  };
  const auto put = [&](float* to, F32 value) { TAIL ? store_first(to + at, value, count) : store(to + at, value); };
  F32 theta = take(slot.theta), g = take(slot.grad);
  if constexpr (PASS != Pass::step) {
    const F32 d = theta - take(slot.theta_hat), fd = take(slot.fisher) * d;
    sum += fd * d;
    const F32 gradient = c.alpha * fd;
    g += c.scale * gradient;
  }
  if constexpr (PASS == Pass::penalty) {
    put(slot.grad, g);
  } else if constexpr (RULE == Rule::sgd) {
    put(slot.theta, theta - c.lr * g);
  } else if constexpr (RULE == Rule::momentum) {
    const F32 m = c.beta1 * take(slot.first) + g;
    put(slot.first, m);
    put(slot.theta, theta - c.lr * m);
  } else {
    const F32 m = c.beta1 * take(slot.first) + c.rest1 * g;
    const F32 v = c.beta2 * take(slot.second) + c.rest2 * g * g;
    put(slot.first, m);
    put(slot.second, v);
    put(slot.theta, c.shrink * theta - c.lr * m / (c.root_correction * square_root(v) + c.eps));
  }
}

template <Rule RULE, Pass PASS>
double block(const Slot& slot, int64_t begin, int64_t end, const Coefficients& c) {
  constexpr int64_t LANES = lanes<float>;
  F32 sum[UNROLL] = {};
  int64_t i = begin;
  for (; i + UNROLL * LANES <= end; i += UNROLL * LANES) {
    WPLFAST_UNROLL
    for (int u = 0; u < UNROLL; ++u) update<RULE, PASS, false>(slot, i + u * LANES, LANES, c, sum[u]);
  }
  for (; i + LANES <= end; i += LANES) update<RULE, PASS, false>(slot, i, LANES, c, sum[0]);
  if (i < end) update<RULE, PASS, true>(slot, i, end - i, c, sum[0]);
  double total = 0;
  for (F32 part : sum) total += sum_lanes(part);
  return 0.5 * c.alpha * total;
}

template <Rule RULE>
auto choose(Pass pass) {
  return pass == Pass::penalty ? block<RULE, Pass::penalty>
         : pass == Pass::step  ? block<RULE, Pass::step>
                               : block<RULE, Pass::fused>;
}

}  // namespace
}  // namespace wplfast

// Returns the penalty's value (0 for Pass::step), the same bits for every number of threads.
extern "C" double wplfast_fused_step(const wplfast::Slot* slots, int64_t n_slots, const wplfast::Coefficients* c,
                                     int rule, int pass, int threads) {
  using namespace wplfast;
  const auto run = rule == 0   ? choose<Rule::sgd>(static_cast<Pass>(pass))
                   : rule == 1 ? choose<Rule::momentum>(static_cast<Pass>(pass))
                               : choose<Rule::adamw>(static_cast<Pass>(pass));
  int64_t total = 0, n_blocks = 0;
  for (int64_t s = 0; s < n_slots; ++s) {
    total += slots[s].numel;
    n_blocks += (slots[s].numel + BLOCK - 1) / BLOCK;
  }
  // Every thread takes the blocks that begin in one range of the elements, all tensors counted through.
  std::vector<double> partial(n_blocks);
  parallel(threads_for(total, GRAIN, threads), [&](int64_t thread, int64_t count) {
    const int64_t first = total * thread / count, last = total * (thread + 1) / count;
    int64_t before = 0, done = 0;
    for (int64_t s = 0; s < n_slots && before < last; before += slots[s++].numel) {
      for (int64_t begin = 0; begin < slots[s].numel; begin += BLOCK, ++done) {
        if (before + begin < first || before + begin >= last) continue;
        partial[done] = run(slots[s], begin, std::min(begin + BLOCK, slots[s].numel), *c);
      }
    }
  });
  double value = 0;
  for (double term : partial) value += term;
  return value;
}
