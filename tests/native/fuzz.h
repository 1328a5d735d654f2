// What the fuzzing programs share: random numbers, typed arrays of exact size, comparisons.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "dtype.h"

namespace fuzz {

using namespace wplfast;

inline std::mt19937_64 generator;

inline int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
inline double normal() { return std::normal_distribution<double>()(generator); }
inline bool coin() { return integer(0, 1) == 1; }

inline bool is_wide(Dtype dtype) { return dtype == Dtype::f64; }
inline Dtype compute_type(Dtype dtype) { return is_wide(dtype) ? Dtype::f64 : Dtype::f32; }

inline float from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A typed array at an element-aligned address.
class Array {
 public:
  Array(Dtype dtype, int64_t size, const std::function<double()>& fill)
      : dtype_(dtype), size_(size), shift_(integer(0, 3)), bytes_((size + shift_) * size_of(dtype)) {
    for (int64_t i = 0; i < size; ++i) set(i, fill());
  }
  int64_t size() const { return size_; }
  void* data() { return bytes_.data() + shift_ * size_of(dtype_); }
  double get(int64_t i) const {
    const char* at = bytes_.data() + (shift_ + i) * size_of(dtype_);
    if (dtype_ == Dtype::f64) return read<double>(at);
    if (dtype_ == Dtype::f32) return read<float>(at);
    if (dtype_ == Dtype::bf16) return from_bfloat16(read<uint16_t>(at));
    return to_float(Half{read<uint16_t>(at)});
  }

 private:
  template <class T>
  static T read(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  template <class T>
  static void write(char* at, T value) {
    std::memcpy(at, &value, sizeof value);
  }
  void set(int64_t i, double value) {
    char* at = bytes_.data() + (shift_ + i) * size_of(dtype_);
    if (dtype_ == Dtype::f64) {
      write(at, value);
    } else if (dtype_ == Dtype::f32) {
      write(at, static_cast<float>(value));
    } else if (dtype_ == Dtype::bf16) {
      write(at, to_bfloat16(static_cast<float>(value)));
    } else {
      write(at, to_half(static_cast<float>(value)).bits);
    }
  }

  Dtype dtype_;
  int64_t size_, shift_;
  std::vector<char> bytes_;
};

inline double zero() { return 0; }

inline void expect(bool ok, const char* what, double got, double want) {
  if (ok) return;
  std::fprintf(stderr, "%s: got %.9g, want %.9g\n", what, got, want);
  std::exit(1);
}

// Compares with an error relative to the sum of magnitudes, which cancellation does not shrink.
inline void expect_close(const char* what, double got, double want, double magnitude, double tolerance) {
  expect(std::abs(got - want) <= tolerance * magnitude + 1e-30, what, got, want);
}

inline double storage_epsilon(Dtype dtype) {
  return dtype == Dtype::f64 ? 1e-15 : dtype == Dtype::f32 ? 5e-7 : dtype == Dtype::bf16 ? 5e-3 : 7e-4;
}

// Fuzzes the kernels of convolutions, embeddings and elementwise scales (fuzz_layers.cpp).
void fuzz_conv();
void fuzz_embedding();
void fuzz_scale_grads();
void fuzz_turn();

}  // namespace fuzz
