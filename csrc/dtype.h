// Storage types of tensors and their scalar conversions to and from float (the vector forms are in simd.inl).
#pragma once

#include <cstdint>
#include <cstring>

namespace wplfast {

// The order is shared with DTYPES in wplfast/backends/cpp/dtypes.py.
enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(Half half) {
  const uint32_t magnitude = static_cast<uint32_t>(half.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000) << 16;
  if (magnitude >= 0x0f800000) return float_of(sign | 0x70000000 | magnitude);  // infinity and NaN keep their payload
  // The exponent bias differs by 112; the product is exact, and normalises subnormal halves on the way.
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}

inline Half to_half(float value) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000;
  uint32_t bits = bits_of(value) & 0x7fffffff;
  if (bits > 0x7f800000) {
    bits = 0x7e00;
  } else if (bits >= 0x477ff000) {  // 65520 and above round to infinity
    bits = 0x7c00;
  } else if (bits < 0x38800000) {
    // Subnormal halves are multiples of 2^-24, the unit in the last place of 0.5: the addition rounds to nearest even.
    bits = bits_of(float_of(bits) + 0.5f) - 0x3f000000;
  } else {
    bits = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  return Half{static_cast<uint16_t>(sign | bits)};
}

}  // namespace wplfast
