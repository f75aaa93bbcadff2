// Element types and small scalar helpers shared by all kernels. No torch header, no std:: template:
// see the note on instruction sets in kernels.h.
#pragma once
#include <stdint.h>
#include <string.h>

#define FASTSAE_INLINE static inline __attribute__((always_inline))

namespace fastsae {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Anonymous: every translation unit keeps a copy of its own, compiled for its own instruction set.
namespace {

FASTSAE_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

FASTSAE_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

FASTSAE_INLINE float to_float(float value) { return value; }
FASTSAE_INLINE float to_float(bf16 value) { return bits_to_float((uint32_t)value.bits << 16); }

FASTSAE_INLINE float to_float(f16 value) {
  const uint32_t sign = (uint32_t)(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude << 13));
  // 2^112 moves the exponent bias from 15 to 127; exact for subnormals too.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

FASTSAE_INLINE void from_float(float value, float* out) { *out = value; }

FASTSAE_INLINE void from_float(float value, bf16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits =
      (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)((bits >> 16) | 0x40) : (uint16_t)rounded;
}

FASTSAE_INLINE void from_float(float value, f16* out) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000, mag = bits & 0x7fffffff;
  uint32_t half;
  if (mag > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (mag >= 0x477ff000) {
    half = 0x7c00;  // rounds to infinity
  } else if (mag < 0x38800000) {
    // Subnormal half: adding 0.5 leaves the rounded result in the low mantissa bits.
    half = float_to_bits(bits_to_float(mag) + 0.5f) - 0x3f000000;
  } else {
    half = (mag - 0x38000000 + 0xfff + ((mag >> 13) & 1)) >> 13;
  }
  out->bits = (uint16_t)(sign | half);
}

// Order-preserving integer of a float: -0 and 0 are equal, NaN of either sign is above +inf.
FASTSAE_INLINE int32_t order_key(float value) {
  const float merged = value + 0.0f;  // -0 + 0 = +0
  const int32_t bits = (int32_t)float_to_bits(merged);
  const int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fffffff : key;
}

FASTSAE_INLINE float key_to_float(int32_t key) {
  return bits_to_float((uint32_t)(key ^ ((key >> 31) & 0x7fffffff)));
}

FASTSAE_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FASTSAE_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace fastsae
