// Half-precision elements on the CPU: two-byte storage, widened to float and rounded back to nearest-even.
//
// Integer and float arithmetic only, no branches and no intrinsics: so the loops in elementwise_cpu.h vectorise on any
// machine. float16 follows the method of the FP16 library (M. Dukhan): the multiplier chain rounds in hardware.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd_dispatch.h"

namespace isonet_fast::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <typename T>
using Sum = typename SumOf<T>::type;

ISONET_FAST_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

ISONET_FAST_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

ISONET_FAST_INLINE float widen(float value) { return value; }
ISONET_FAST_INLINE double widen(double value) { return value; }
ISONET_FAST_INLINE float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

ISONET_FAST_INLINE float widen(Half value) {
  const uint32_t word = static_cast<uint32_t>(value.bits) << 16;
  const uint32_t sign = word & 0x80000000u, twice = word + word;
  const uint32_t normal = bits_of(float_of((twice >> 4) + (0xe0u << 23)) * 0x1p-112f);
  const uint32_t subnormal = bits_of(float_of((twice >> 17) | (126u << 23)) - 0.5f);
  return float_of(sign | (twice < (1u << 27) ? subnormal : normal));
}

ISONET_FAST_INLINE void narrow(float value, float& out) { out = value; }
ISONET_FAST_INLINE void narrow(double value, double& out) { out = value; }

ISONET_FAST_INLINE void narrow(float value, BFloat16& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u | ((bits >> 16) & 0x8000u) : rounded);
}

ISONET_FAST_INLINE void narrow(float value, Half& out) {
  const uint32_t word = bits_of(value), twice = word + word, sign = (word & 0x80000000u) >> 16;
  const uint32_t exponent = twice & 0xff000000u;
  const float magnitude = (float_of(word & 0x7fffffffu) * 0x1p112f) * 0x1p-110f;  // overflows to inf where a half would
  const float rounded = float_of(((exponent < 0x71000000u ? 0x71000000u : exponent) >> 1) + 0x07800000u) + magnitude;
  const uint32_t bits = bits_of(rounded);
  const uint32_t finite = ((bits >> 13) & 0x7c00u) + (bits & 0x0fffu);
  out.bits = static_cast<uint16_t>(sign | (twice > 0xff000000u ? 0x7e00u : finite));
}

}  // namespace isonet_fast::cpu
