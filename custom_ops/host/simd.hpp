// Vectors of the widest kind that the processor has, with a multiplication and addition in one rounding where it has that.
#pragma once

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#include "depthwise.hpp"

namespace popdet {

#if defined(__AVX512F__)
constexpr int kWideBytes = 64, kWideRegisters = 32;
#elif defined(__AVX__)
constexpr int kWideBytes = 32, kWideRegisters = 16;
#else
constexpr int kWideBytes = 16, kWideRegisters = 16;
#endif

template <typename T>
struct WideVectorOf {
  typedef T type __attribute__((vector_size(kWideBytes)));
};

// As for_each_vector, with wide ones first.
template <typename T, typename Use>
inline void for_each_wide_vector(long count, Use use) {
  using V = typename WideVectorOf<T>::type;
  constexpr long lanes = sizeof(V) / sizeof(T);
  long c = 0;
  for (; c + lanes <= count; c += lanes) use(V(), c);
  for (; c < count; ++c) use(T(), c);
}

// a * b + c
template <typename T, typename V>
inline V multiply_add(T a, V b, V c) {
  return a * b + c;
}

#if defined(__AVX512F__)
inline WideVectorOf<float>::type multiply_add(float a, WideVectorOf<float>::type b, WideVectorOf<float>::type c) {
  return (WideVectorOf<float>::type)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)b, (__m512)c);
}
inline WideVectorOf<double>::type multiply_add(double a, WideVectorOf<double>::type b, WideVectorOf<double>::type c) {
  return (WideVectorOf<double>::type)_mm512_fmadd_pd(_mm512_set1_pd(a), (__m512d)b, (__m512d)c);
}
#elif defined(__FMA__)
inline WideVectorOf<float>::type multiply_add(float a, WideVectorOf<float>::type b, WideVectorOf<float>::type c) {
  return (WideVectorOf<float>::type)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)c);
}
inline WideVectorOf<double>::type multiply_add(double a, WideVectorOf<double>::type b, WideVectorOf<double>::type c) {
  return (WideVectorOf<double>::type)_mm256_fmadd_pd(_mm256_set1_pd(a), (__m256d)b, (__m256d)c);
}
#endif

}  // namespace popdet
