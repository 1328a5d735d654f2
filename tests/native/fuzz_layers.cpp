// Fuzzes the kernels of convolutions, embeddings and elementwise scales against naive double loops.
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "fisher_conv.h"
#include "fisher_embedding.h"
#include "fuzz.h"
#include "scale_grads.h"
#include "turn.h"

namespace fuzz {
namespace {

std::vector<double> random_weights(int64_t n) {
  std::vector<double> weights;
  for (int64_t k = 0; k < n; ++k) weights.push_back(std::abs(normal()));
  return weights;
}

FisherConvCall random_convolution() {
  FisherConvCall call{};
  call.dtype = static_cast<Dtype>(integer(0, 3));
  call.threads = static_cast<int>(integer(1, 4));
  call.n_samples = integer(0, 5);
  call.n_images = integer(1, 2);
  call.groups = coin() ? 1 : integer(1, 40);
  call.channels_first = coin();
  const int64_t most = call.groups == 1 ? 40 : call.groups > 4 ? 3 : 12;
  call.c_in = call.groups * integer(coin() ? 1 : 0, coin() ? most : 1);
  call.c_out = call.groups * integer(1, coin() ? most : 2);
  const int dims = static_cast<int>(integer(1, 3));
  for (int dim = 0; dim < 3; ++dim) {
    const bool used = dim >= 3 - dims;
    call.kernel[dim] = used ? integer(1, 4) : 1;
    call.stride[dim] = used ? integer(1, 3) : 1;
    call.dilation[dim] = used ? integer(1, 3) : 1;
    call.padding[dim] = used ? integer(0, 4) : 0;
    call.size[dim] = used ? integer(0, dims == 1 ? 300 : dims == 2 ? 20 : 6) : 1;
    const int64_t room = call.size[dim] + 2 * call.padding[dim] - (call.kernel[dim] - 1) * call.dilation[dim] - 1;
    call.positions[dim] = room < 0 ? 0 : room / call.stride[dim] + 1;
    if (integer(0, 3) == 0 && call.positions[dim] > 0) --call.positions[dim];
  }
  return call;
}

// One sample's gradient for one weight, and the sum of its terms' magnitudes.
std::pair<double, double> weight_gradient(const FisherConvCall& call, const Array& x, const Array& g, int64_t n,
                                          int64_t o, int64_t c, const int64_t (&k)[3]) {
  const int64_t channel = o / (call.c_out / call.groups) * (call.c_in / call.groups) + c;
  double sum = 0, absolute = 0;
  for (int64_t m = n * call.n_images; m < (n + 1) * call.n_images; ++m) {
    const int64_t* count = call.positions;
    const int64_t length = count[0] * count[1] * count[2];
    for (int64_t l = 0; l < length; ++l) {
      const int64_t at[3] = {l / count[2] / count[1], l / count[2] % count[1], l % count[2]};
      int64_t pixel = m;
      bool inside = true;
      for (int dim = 0; dim < 3; ++dim) {
        const int64_t i = at[dim] * call.stride[dim] - call.padding[dim] + k[dim] * call.dilation[dim];
        inside = inside && i >= 0 && i < call.size[dim];
        pixel = pixel * call.size[dim] + i;
      }
      if (!inside) continue;
      const double term =
          g.get(call.channels_first ? (n * call.c_out + o) * call.n_images * length + m % call.n_images * length + l
                                    : (m * length + l) * call.c_out + o) *
          x.get(pixel * call.c_in + channel);
      sum += term;
      absolute += std::abs(term);
    }
  }
  return {sum, absolute};
}

}  // namespace

void fuzz_conv() {
  FisherConvCall call = random_convolution();
  const Dtype wide = compute_type(call.dtype);
  const int64_t images = call.n_samples * call.n_images, channels = call.c_in / call.groups;
  const int64_t taps = call.kernel[0] * call.kernel[1] * call.kernel[2];
  Array x(call.dtype, images * call.size[0] * call.size[1] * call.size[2] * call.c_in, normal);
  Array g(call.dtype, images * call.positions[0] * call.positions[1] * call.positions[2] * call.c_out, normal);
  Array fisher(wide, call.c_out * channels * taps, zero), gradient(wide, call.c_out * channels * taps, zero);
  const std::vector<double> weights = random_weights(call.n_samples);
  const bool weighted = coin(), with_gradient = coin();
  call.fisher = fisher.data();
  call.gradient = with_gradient ? gradient.data() : nullptr;
  call.inputs = x.data();
  call.grad_outputs = g.data();
  call.weights = weighted ? weights.data() : nullptr;
  fisher_conv(call);
  const double tolerance = is_wide(call.dtype) ? 1e-13 : 3e-6;
  for (int64_t i = 0; i < fisher.size(); i += 1 + i % 3) {  // the naive loop is slow
    const int64_t o = i / taps / channels, c = i / taps % channels, tap = i % taps;
    const int64_t k[3] = {tap / call.kernel[2] / call.kernel[1], tap / call.kernel[2] % call.kernel[1],
                          tap % call.kernel[2]};
    double want = 0, want_gradient = 0, magnitude = 0, gradient_magnitude = 0;
    for (int64_t n = 0; n < call.n_samples; ++n) {
      const auto [sum, absolute] = weight_gradient(call, x, g, n, o, c, k);
      const double w = weighted ? weights[n] : 1.0;
      want += w * sum * sum;
      want_gradient += w * sum;
      magnitude += w * std::abs(sum) * absolute + 1e-7 * w * absolute * absolute;
      gradient_magnitude += w * absolute;
    }
    expect_close("conv", fisher.get(i), want, magnitude, tolerance);
    if (with_gradient) {
      expect_close("gradient of conv", gradient.get(i), want_gradient, gradient_magnitude, tolerance);
    }
  }
}

void fuzz_turn() {
  const int64_t n = integer(0, 4), rows = integer(0, 70), columns = integer(0, coin() ? 40 : 700);
  const Dtype dtype = static_cast<Dtype>(integer(0, 3));
  Array from(dtype, n * rows * columns, normal), to(dtype, n * rows * columns, zero);
  turn({from.data(), to.data(), n, rows, columns, size_of(dtype), static_cast<int>(integer(1, 4))});
  for (int64_t i = 0; i < to.size(); ++i) {
    const int64_t matrix = i / (rows * columns), column = i / rows % columns, row = i % rows;
    expect_close("turn", to.get(i), from.get((matrix * rows + row) * columns + column), 0.0, 0.0);
  }
}

void fuzz_embedding() {
  const Dtype dtype = static_cast<Dtype>(integer(0, 3)), wide = compute_type(dtype);
  const int64_t n = integer(0, coin() ? 300 : 9), t = integer(0, 20), d = integer(0, 150);
  const int64_t v = integer(1, coin() ? 5 : 3000);
  std::vector<int64_t> indices;
  for (int64_t i = 0; i < n * t; ++i) indices.push_back(integer(-1, v - 1));
  Array g(dtype, n * t * d, normal), fisher(wide, v * d, zero), gradient(wide, v * d, zero);
  const std::vector<double> weights = random_weights(n);
  const bool weighted = coin(), with_gradient = coin();
  FisherEmbeddingCall call{fisher.data(),
                           with_gradient ? gradient.data() : nullptr,
                           indices.data(),
                           g.data(),
                           weighted ? weights.data() : nullptr,
                           n,
                           t,
                           v,
                           d,
                           dtype,
                           static_cast<int>(integer(1, 4))};
  if (n * t > 0 && integer(0, 7) == 0) {
    indices[integer(0, n * t - 1)] = v + integer(0, 1) * (int64_t{1} << 40);
    bool thrown = false;
    try {
      fisher_embedding(call);
    } catch (const std::out_of_range&) {
      thrown = true;
    }
    expect(thrown, "index beyond the table", 0, 1);
    for (int64_t i = 0; i < v * d; ++i) expect(fisher.get(i) == 0, "fisher of a bad index", fisher.get(i), 0);
    return;
  }
  fisher_embedding(call);
  std::vector<double> want(v * d), want_gradient(v * d), magnitude(v * d), gradient_magnitude(v * d);
  for (int64_t k = 0; k < n; ++k) {
    const double w = weighted ? weights[k] : 1.0;
    for (int64_t s = 0; s < t; ++s) {
      const int64_t row = indices[k * t + s];
      bool first = row >= 0;
      for (int64_t before = 0; before < s; ++before) first = first && indices[k * t + before] != row;
      for (int64_t j = 0; first && j < d; ++j) {
        double sum = 0, absolute = 0;
        for (int64_t later = s; later < t; ++later) {
          if (indices[k * t + later] != row) continue;
          sum += g.get((k * t + later) * d + j);
          absolute += std::abs(g.get((k * t + later) * d + j));
        }
        want[row * d + j] += w * sum * sum;
        want_gradient[row * d + j] += w * sum;
        magnitude[row * d + j] += w * (std::abs(sum) * absolute + 1e-7 * absolute * absolute);
        gradient_magnitude[row * d + j] += w * absolute;
      }
    }
  }
  const double tolerance = is_wide(dtype) ? 1e-13 : 3e-6;
  for (int64_t i = 0; i < v * d; ++i) {
    expect_close("embedding", fisher.get(i), want[i], magnitude[i], tolerance);
    const double plain = with_gradient ? want_gradient[i] : 0;
    expect_close("gradient of embedding", gradient.get(i), plain, gradient_magnitude[i], tolerance);
  }
}

void fuzz_scale_grads() {
  const Dtype dtype = static_cast<Dtype>(integer(0, 3));
  const int64_t n = integer(0, 6), t = integer(0, coin() ? 5 : 3000), d = integer(0, t > 5 ? 70 : 600);
  const bool by_steps = coin();
  const int64_t run = by_steps ? t : d, runs = by_steps ? d : t;
  const auto array = [&](int64_t gap) {
    const bool empty = n == 0 || runs == 0 || run == 0;
    return Array(dtype, empty ? 0 : (n * runs - 1) * (run + gap) + run, normal);
  };
  const int64_t gap_a = integer(0, 2), gap_g = integer(0, 2);
  Array a = array(gap_a), g = array(gap_g), grads(compute_type(dtype), n * d, normal);
  const auto strided = [&](Array& values, int64_t gap) {
    const int64_t step = run + gap;
    return Strided{values.data(), runs * step, by_steps ? 1 : step, by_steps ? step : 1};
  };
  const Strided from_a = strided(a, gap_a), from_g = strided(g, gap_g);
  scale_grads({grads.data(), from_a, from_g, n, t, d, by_steps, dtype, static_cast<int>(integer(1, 4))});
  for (int64_t i = 0; i < n * d; ++i) {
    double want = 0, magnitude = 0;
    for (int64_t s = 0; s < t; ++s) {
      const double term = a.get(i / d * from_a.stride_n + s * from_a.stride_t + i % d * from_a.stride_d) *
                          g.get(i / d * from_g.stride_n + s * from_g.stride_t + i % d * from_g.stride_d);
      want += term;
      magnitude += std::abs(term);
    }
    expect_close("scale", grads.get(i), want, magnitude, is_wide(dtype) ? 1e-13 : 3e-6);
  }
}

}  // namespace fuzz
