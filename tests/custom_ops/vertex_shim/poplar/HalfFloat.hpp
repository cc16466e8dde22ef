// IEEE binary16 in software, for running codelets on a host: storage of 16 bits, round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace poplar {

class half {
 public:
  half() = default;
  half(float value) : bits_(encode(value)) {}
  operator float() const { return decode(bits_); }

 private:
  static std::uint16_t encode(float value) {
    std::uint32_t word;
    std::memcpy(&word, &value, 4);
    const std::uint32_t sign = (word >> 16) & 0x8000u, magnitude = word & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);   // NaN
    if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above: infinity
    if (magnitude < 0x33000000u) return static_cast<std::uint16_t>(sign);             // below 2^-25: zero
    const int exponent = static_cast<int>(magnitude >> 23) - 127;
    const std::uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
    const int shift = exponent < -14 ? 13 + (-14 - exponent) : 13;  // denormals keep fewer bits
    std::uint32_t kept = significand >> shift;
    const std::uint32_t rest = significand & ((1u << shift) - 1u), middle = 1u << (shift - 1);
    if (rest > middle || (rest == middle && (kept & 1u))) ++kept;
    if (exponent >= -14) kept += static_cast<std::uint32_t>(exponent + 14) << 10;  // the hidden bit adds the last one
    return static_cast<std::uint16_t>(sign | kept);
  }

  static float decode(std::uint16_t bits) {
    const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 0x3ffu;
    if (exponent == 0) {
      const float value = static_cast<float>(mantissa) * (1.0f / 16777216.0f);  // multiples of 2^-24
      return sign ? -value : value;
    }
    const std::uint32_t word = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | (mantissa << 13);
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }

  std::uint16_t bits_;
};
static_assert(sizeof(half) == 2, "half is stored in 16 bits");

}  // namespace poplar
