// The one-dimensional transforms of Winograd's F(4, 3) at the points 0, +-3/4, +-3/2 and infinity, and their transposes;
// the letters are those of winograd.hpp.
#pragma once

namespace popdet {

// Of vectors read at stride `from` and written at stride `to`.
template <typename T>
struct Points {
  static constexpr T a = T(0.75), b = T(1.5), aa = a * a, bb = b * b, aaa = aa * a, bbb = bb * b;

  // B': 6 -> 6
  template <typename V>
  static void input(const V* d, long from, V* out, long to) {
    const V d0 = d[0], d1 = d[from], d2 = d[2 * from], d3 = d[3 * from], d4 = d[4 * from], d5 = d[5 * from];
    const V even_a = d4 - bb * d2, odd_a = a * d3 - a * bb * d1;
    const V even_b = d4 - aa * d2, odd_b = b * d3 - b * aa * d1;
    out[0] = aa * bb * d0 - (aa + bb) * d2 + d4;
    out[to] = even_a + odd_a;
    out[2 * to] = even_a - odd_a;
    out[3 * to] = even_b + odd_b;
    out[4 * to] = even_b - odd_b;
    out[5 * to] = aa * bb * d1 - (aa + bb) * d3 + d5;
  }

  // B: 6 -> 6
  template <typename V>
  static void input_adjoint(const V* v, long from, V* out, long to) {
    const V v0 = v[0], v5 = v[5 * from];
    const V even_a = v[from] + v[2 * from], odd_a = a * (v[from] - v[2 * from]);
    const V even_b = v[3 * from] + v[4 * from], odd_b = b * (v[3 * from] - v[4 * from]);
    out[0] = aa * bb * v0;
    out[to] = aa * bb * v5 - bb * odd_a - aa * odd_b;
    out[2 * to] = -(aa + bb) * v0 - bb * even_a - aa * even_b;
    out[3 * to] = odd_a + odd_b - (aa + bb) * v5;
    out[4 * to] = v0 + even_a + even_b;
    out[5 * to] = v5;
  }

  // G: 3 -> 6
  template <typename V>
  static void filter(const V* g, long from, V* out, long to) {
    constexpr T zero = 1 / (aa * bb), near = 1 / (2 * aa * (aa - bb)), far = 1 / (2 * bb * (bb - aa));
    const V g0 = g[0], g1 = g[from], g2 = g[2 * from];
    const V even_a = near * (g0 + aa * g2), odd_a = near * a * g1, even_b = far * (g0 + bb * g2), odd_b = far * b * g1;
    out[0] = zero * g0;
    out[to] = even_a + odd_a;
    out[2 * to] = even_a - odd_a;
    out[3 * to] = even_b + odd_b;
    out[4 * to] = even_b - odd_b;
    out[5 * to] = g2;
  }

  // G': 6 -> 3
  template <typename V>
  static void filter_adjoint(const V* u, long from, V* out, long to) {
    constexpr T zero = 1 / (aa * bb), near = 1 / (2 * aa * (aa - bb)), far = 1 / (2 * bb * (bb - aa));
    const V even_a = near * (u[from] + u[2 * from]), odd_a = near * a * (u[from] - u[2 * from]);
    const V even_b = far * (u[3 * from] + u[4 * from]), odd_b = far * b * (u[3 * from] - u[4 * from]);
    out[0] = zero * u[0] + even_a + even_b;
    out[to] = odd_a + odd_b;
    out[2 * to] = aa * even_a + bb * even_b + u[5 * from];
  }

  // A': 6 -> 4
  template <typename V>
  static void output(const V* m, long from, V* out, long to) {
    const V even_a = m[from] + m[2 * from], odd_a = m[from] - m[2 * from];
    const V even_b = m[3 * from] + m[4 * from], odd_b = m[3 * from] - m[4 * from];
    out[0] = m[0] + even_a + even_b;
    out[to] = a * odd_a + b * odd_b;
    out[2 * to] = aa * even_a + bb * even_b;
    out[3 * to] = aaa * odd_a + bbb * odd_b + m[5 * from];
  }

  // A: 4 -> 6
  template <typename V>
  static void output_adjoint(const V* y, long from, V* out, long to) {
    const V y0 = y[0], y1 = y[from], y2 = y[2 * from], y3 = y[3 * from];
    const V even_a = y0 + aa * y2, odd_a = a * y1 + aaa * y3;
    const V even_b = y0 + bb * y2, odd_b = b * y1 + bbb * y3;
    out[0] = y0;
    out[to] = even_a + odd_a;
    out[2 * to] = even_a - odd_a;
    out[3 * to] = even_b + odd_b;
    out[4 * to] = even_b - odd_b;
    out[5 * to] = y3;
  }
};

}  // namespace popdet
