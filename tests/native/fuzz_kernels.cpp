// Fuzzes the kernels without Python against naive double loops; meant for -fsanitize=address,undefined.
// Every array is a heap block of exactly the size it needs, shifted by a random number of elements, so that a read or
// write beyond it is caught. Usage: fuzz_kernels [rounds] [seed]
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "consolidate.h"
#include "fisher_linear.h"
#include "fuzz.h"
#include "isa.h"
#include "penalty.h"
#include "squares.h"

namespace fuzz {
namespace {

void fuzz_penalty() {
  const Dtype dtype = static_cast<Dtype>(integer(0, 3)), wide = compute_type(dtype);
  const Dtype fisher_dtype = wide == Dtype::f32 && coin() ? Dtype::bf16 : wide;
  const PenaltyMode mode = static_cast<PenaltyMode>(integer(0, 2));
  const bool has_offset = coin();
  const double l2 = coin() ? 0.0 : 0.25, scale = 0.5;
  std::vector<Array> theta, theta_hat, offset, fisher, grad;
  std::vector<Anchor> anchors;
  const int64_t n_anchors = integer(1, 6);
  for (int64_t p = 0; p < n_anchors; ++p) {
    const int64_t numel = coin() ? integer(0, 70) : integer(0, 50000);
    theta.emplace_back(dtype, numel, normal);
    theta_hat.emplace_back(dtype, numel, normal);
    offset.emplace_back(wide, numel, normal);
    fisher.emplace_back(fisher_dtype, numel, [] { return std::abs(normal()); });
    grad.emplace_back(dtype, mode == PenaltyMode::store ? (numel + 15) / 16 * 16 : numel, normal);
  }
  const std::vector<Array> before = grad;
  std::vector<bool> frozen;
  for (int64_t p = 0; p < n_anchors; ++p) {
    frozen.push_back(mode == PenaltyMode::add && integer(0, 3) == 0);
    anchors.push_back({theta[p].data(), theta_hat[p].data(), has_offset ? offset[p].data() : nullptr, fisher[p].data(),
                       frozen[p] ? nullptr : grad[p].data(), theta[p].size(), 1.0 + 0.5 * static_cast<double>(p)});
  }
  const double got =
      penalty({anchors.data(), n_anchors, dtype, fisher_dtype, mode, l2, scale, 16, static_cast<int>(integer(1, 4))});

  double want = 0;
  for (int64_t p = 0; p < n_anchors; ++p) {
    for (int64_t i = 0; i < theta[p].size(); ++i) {
      const double value = theta[p].get(i), f = fisher[p].get(i);
      const double d = value - theta_hat[p].get(i) - (has_offset ? offset[p].get(i) : 0.0);
      want += 0.5 * (anchors[p].alpha * f * d * d + l2 * value * value);
      double gradient = anchors[p].alpha * f * d + l2 * value;
      double size = std::abs(gradient) + f * (std::abs(value) + std::abs(theta_hat[p].get(i))) + std::abs(value);
      if (mode == PenaltyMode::add) {
        gradient = before[p].get(i) + scale * gradient;
        size += std::abs(before[p].get(i));
      }
      if (mode == PenaltyMode::value || frozen[p]) gradient = before[p].get(i);
      expect_close("gradient", grad[p].get(i), gradient, 4 * size, storage_epsilon(dtype));
    }
    for (int64_t i = theta[p].size(); i < grad[p].size(); ++i) expect(grad[p].get(i) == 0, "padding", 1, 0);
  }
  expect_close("value", got, want, want, is_wide(dtype) ? 1e-13 : 1e-6);
}

// Gradients of 16 MiB and more, in one buffer whose every part starts at a cache line, are written around the cache.
template <class T>
void fuzz_streaming_penalty(Dtype dtype) {
  const int64_t padding = 16, large = (int64_t{16} << 20) / static_cast<int64_t>(sizeof(T)) + integer(0, 9000);
  const std::vector<int64_t> numels = {integer(0, 40), large, 0, integer(1, 5000)};
  std::vector<T> theta, theta_hat, offset, fisher;
  uint64_t state = static_cast<uint64_t>(integer(1, int64_t{1} << 40));
  const auto uniform = [&state] {  // in [0, 1): fast, since there are millions
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<T>(static_cast<double>(state >> 40) / static_cast<double>(1 << 24));
  };
  int64_t total = 0, packed = 0;
  for (int64_t numel : numels) {
    total += numel;
    packed += (numel + padding - 1) / padding * padding;
  }
  for (std::vector<T>* values : {&theta, &theta_hat, &offset, &fisher}) {
    values->resize(total);
    for (T& value : *values) value = uniform();
  }
  const bool has_offset = coin();
  std::vector<char> memory(packed * sizeof(T) + 63);
  T* grad = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  std::fill(grad, grad + packed, T{7});
  std::vector<Anchor> anchors;
  int64_t first = 0, at = 0;
  for (int64_t numel : numels) {
    anchors.push_back({theta.data() + first, theta_hat.data() + first, has_offset ? offset.data() + first : nullptr,
                       fisher.data() + first, grad + at, numel, 2.0});
    first += numel;
    at += (numel + padding - 1) / padding * padding;
  }
  const double l2 = coin() ? 0.0 : 0.25;
  const double got = penalty({anchors.data(), static_cast<int64_t>(anchors.size()), dtype, dtype, PenaltyMode::store,
                              l2, 1.0, padding, static_cast<int>(integer(1, 4))});
  double want = 0;
  const T* out = grad;
  first = 0;
  for (int64_t numel : numels) {
    for (int64_t i = first; i < first + numel; ++i, ++out) {
      const double value = theta[i], f = fisher[i], d = value - theta_hat[i] - (has_offset ? offset[i] : T{0});
      want += f * d * d + 0.5 * l2 * value * value;
      expect_close("streamed gradient", *out, 2 * f * d + l2 * value, 8, storage_epsilon(dtype));
    }
    for (int64_t i = numel; i % padding != 0; ++i, ++out) expect(*out == 0, "streamed padding", *out, 0);
    first += numel;
  }
  expect_close("streamed value", got, want, want, is_wide(dtype) ? 1e-12 : 1e-6);
}

void fuzz_consolidate() {
  const bool merge = coin(), has_offset = merge || coin();
  std::vector<Array> theta_hat, offset, fisher, new_hat, new_fisher;
  std::vector<AnchorUpdate> updates;
  const int64_t n = integer(1, 6);
  const auto positive = [] { return coin() ? 0.0 : std::abs(normal()); };
  for (int64_t p = 0; p < n; ++p) {
    const Dtype dtype = static_cast<Dtype>(integer(0, 3)), wide = compute_type(dtype);
    const Dtype fisher_dtype = wide == Dtype::f32 && coin() ? Dtype::bf16 : wide;
    const Dtype new_fisher_dtype = coin() ? Dtype::f64 : wide;
    const int64_t numel = coin() ? integer(0, 70) : integer(0, 30000);
    theta_hat.emplace_back(dtype, numel, normal);
    offset.emplace_back(wide, numel, normal);
    fisher.emplace_back(fisher_dtype, numel, positive);
    new_hat.emplace_back(dtype, numel, normal);
    new_fisher.emplace_back(new_fisher_dtype, numel, positive);
    updates.push_back({nullptr, nullptr, nullptr, nullptr, nullptr, numel, dtype, fisher_dtype, new_fisher_dtype,
                       0.5 * static_cast<double>(integer(0, 2)), 0.25 * static_cast<double>(integer(0, 2))});
  }
  for (int64_t p = 0; p < n; ++p) {
    updates[p].theta_hat = theta_hat[p].data();
    updates[p].offset = has_offset ? offset[p].data() : nullptr;
    updates[p].fisher = fisher[p].data();
    updates[p].new_theta_hat = new_hat[p].data();
    updates[p].new_fisher = new_fisher[p].data();
  }
  const ConsolidateCall call{updates.data(), n, merge, static_cast<int>(integer(1, 4))};
  const std::vector<Array> hat_before = theta_hat, offset_before = offset, fisher_before = fisher;
  std::vector<double> added(n), squares(n);
  measure_consolidation(call, added.data(), squares.data());
  consolidate(call);
  for (int64_t p = 0; p < n; ++p) {
    double c = 0, square = 0;
    for (int64_t i = 0; i < updates[p].numel; ++i) {
      const double share = updates[p].decay * fisher_before[p].get(i),
                   entering = updates[p].weight * new_fisher[p].get(i);
      const double total = share + entering, hat = hat_before[p].get(i), newer = new_hat[p].get(i);
      const double gap = hat + offset_before[p].get(i) - newer, shift = total > 0 ? share / total * gap : 0;
      c += shift * gap * entering;
      square += total * total;
      expect(theta_hat[p].get(i) == newer, "theta_hat", theta_hat[p].get(i), newer);
      expect_close("consolidated F", fisher[p].get(i), total, total, storage_epsilon(updates[p].fisher_dtype));
      const double size = std::abs(hat) + std::abs(newer) + std::abs(offset_before[p].get(i));
      const double moved = merge ? shift : has_offset ? 0 : offset_before[p].get(i);
      expect_close("offset", offset[p].get(i), moved, size, storage_epsilon(compute_type(updates[p].dtype)));
    }
    expect_close("c", added[p], merge ? c : 0, c, 1e-12);
    expect_close("squares of F", squares[p], square, square, 1e-12);
  }
}

void fuzz_fisher_linear() {
  const Dtype dtype = static_cast<Dtype>(integer(0, 3)), wide = compute_type(dtype);
  const int64_t n = integer(0, 9), t = coin() ? 1 : coin() ? integer(0, 12) : integer(1, 400);
  const int64_t limit = t > 50 ? 40 : 320;
  const int64_t d_in = integer(0, coin() ? limit : 3), d_out = integer(0, coin() ? limit : 15);
  const bool swapped = coin(), broadcast = integer(0, 7) == 0;  // time first; one sample's rows for all
  auto strides = [&](int64_t size) {
    const int64_t gap = size + integer(0, 2);
    const int64_t stride_n = broadcast ? 0 : swapped ? gap : gap * t;
    return std::pair<int64_t, int64_t>(stride_n, swapped ? gap * (broadcast ? 1 : n) : gap);
  };
  const auto [g_n, g_t] = strides(d_out);
  const auto [a_n, a_t] = strides(d_in);
  const bool empty = n == 0 || t == 0;
  Array g(dtype, empty || d_out == 0 ? 0 : (n - 1) * g_n + (t - 1) * g_t + d_out, normal);
  Array a(dtype, empty || d_in == 0 ? 0 : (n - 1) * a_n + (t - 1) * a_t + d_in, normal);
  Array weights(Dtype::f64, n, [] { return std::abs(normal()); });
  Array fisher(wide, d_out * d_in, zero), gradient(wide, d_out * d_in, zero);
  const bool weighted = coin(), with_gradient = coin();
  std::vector<double> aligned_weights;
  for (int64_t k = 0; k < n; ++k) aligned_weights.push_back(weights.get(k));
  fisher_linear({fisher.data(),
                 with_gradient ? gradient.data() : nullptr,
                 {g.data(), d_out, g_n, g_t},
                 {a.data(), d_in, a_n, a_t},
                 weighted ? aligned_weights.data() : nullptr,
                 n,
                 t,
                 dtype,
                 static_cast<int>(integer(1, 4))});
  const double tolerance = is_wide(dtype) ? 1e-13 : 3e-6;
  for (int64_t o = 0; o < d_out; ++o) {
    for (int64_t i = 0; i < d_in; ++i) {
      double want = 0, want_gradient = 0, magnitude = 0, gradient_magnitude = 0;
      for (int64_t k = 0; k < n; ++k) {
        const double w = weighted ? aligned_weights[k] : 1.0;
        double sum = 0, absolute = 0;
        for (int64_t s = 0; s < t; ++s) {
          const double term = g.get(k * g_n + s * g_t + o) * a.get(k * a_n + s * a_t + i);
          sum += term;
          absolute += std::abs(term);
        }
        want += w * sum * sum;
        want_gradient += w * sum;
        magnitude += w * std::abs(sum) * absolute + 1e-7 * w * absolute * absolute;
        gradient_magnitude += w * absolute;
      }
      expect_close("fisher", fisher.get(o * d_in + i), want, magnitude, tolerance);
      if (with_gradient) {
        expect_close("plain gradient", gradient.get(o * d_in + i), want_gradient, gradient_magnitude, tolerance);
      }
    }
  }
}

void fuzz_squares() {
  const Dtype dtype = static_cast<Dtype>(integer(0, 3)), wide = compute_type(dtype);
  const bool tall = coin();
  const int64_t n = integer(0, tall ? 6000 : 70), m = integer(0, tall ? 40 : 3000);
  Array grads(dtype, n * m, normal);
  Array fisher(wide, m, zero);
  std::vector<double> weights;
  for (int64_t k = 0; k < n; ++k) weights.push_back(std::abs(normal()));
  const bool weighted = coin();
  accumulate_squares(
      {fisher.data(), grads.data(), weighted ? weights.data() : nullptr, n, m, dtype, static_cast<int>(integer(1, 4))});
  for (int64_t j = 0; j < m; ++j) {
    double want = 0;
    for (int64_t k = 0; k < n; ++k) want += (weighted ? weights[k] : 1.0) * grads.get(k * m + j) * grads.get(k * m + j);
    expect_close("squares", fisher.get(j), want, want, is_wide(dtype) ? 1e-13 : 1e-6);
  }
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
  using namespace fuzz;
  const int64_t rounds = argc > 1 ? std::atoll(argv[1]) : 50;
  generator.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  for (int64_t round = 0; round < rounds; ++round) {
    fuzz_penalty();
    fuzz_consolidate();
    fuzz_fisher_linear();
    fuzz_squares();
    fuzz_conv();
    fuzz_embedding();
    fuzz_scale_grads();
    fuzz_turn();
  }
  fuzz_streaming_penalty<float>(Dtype::f32);
  fuzz_streaming_penalty<double>(Dtype::f64);
  std::printf("%s: %lld rounds passed\n", isa_name(selected_isa()), static_cast<long long>(rounds));
  return 0;
}
