// RoI-Align, half-pixel ("aligned"), average: where the samples lie, and their weighted sum, forward and backward.
//
// Operation order is that of torchvision and of ONNX RoiAlign-16 in onnxruntime, so that float results are equal bit
// for bit where the compiler contracts nothing. The pixels of one image are rows of channels: pixel y * width + x
// begins at features + pixel * stride. Coordinates and weights are of type C, stored values of type T (see scalar.hpp).
#pragma once

#include "scalar.hpp"

namespace popdet {

// One sample position on one axis: its two neighbours and their weights. low is -1 where the sample adds nothing.
template <typename C>
struct AxisSample {
  int low, high;
  C low_weight, high_weight;
};

// One sample: four pixels, in the order low-low, low-high, high-low, high-high of (y, x), and their weights.
// An Index of int halves the size where a map is known to be small: 32 bytes on every machine.
template <typename C, typename Index = long>
struct BilinearSample {
  Index pixel[4];
  C weight[4];
};

// A sample outside [-1, size] adds nothing, nor does one at NaN: both comparisons are false for it.
template <typename C>
inline AxisSample<C> axis_sample(C position, long size) {
  if (!(position >= C(-1) && position <= C(size))) return {-1, -1, C(0), C(0)};
  position = smaller(larger(position, C(0)), C(size - 1));
  const int low = static_cast<int>(position);
  const C high_weight = position - C(low);
  return {low, static_cast<int>(smaller<long>(low + 1, size - 1)), C(1) - high_weight, high_weight};
}

// Where the samples of a RoI lie along one axis: bins of length `bin` from `start`, `ratio` samples in each.
template <typename C>
struct AxisGrid {
  C start, bin;
  long ratio, size;

  AxisSample<C> at(long i, long s) const {
    return axis_sample(start + C(i) * bin + (C(s) + C(0.5)) * bin / C(ratio), size);
  }
};

// `from` and `to` are the RoI's edges in input pixels; where to < from the bins have negative size, and are sampled all
// the same.
template <typename C>
inline AxisGrid<C> axis_grid(C from, C to, C scale, long bins, long ratio, long size) {
  const C start = from * scale - C(0.5);
  const C end = to * scale - C(0.5);
  return {start, (end - start) / C(bins), ratio, size};
}

// All samples of a RoI along one axis: out [bins * ratio].
template <typename C>
inline void axis_samples(C from, C to, C scale, long bins, long ratio, long size, AxisSample<C>* out) {
  const AxisGrid<C> grid = axis_grid(from, to, scale, bins, ratio, size);
  for (long i = 0; i < bins; ++i)
    for (long s = 0; s < ratio; ++s) out[i * ratio + s] = grid.at(i, s);
}

// The samples of one bin, from the `ratio` axis samples it has on each axis; returns how many lie inside.
// out [ratio * ratio], row by row, the outside ones left out.
template <typename C, typename Index>
inline long bin_samples(const AxisSample<C>* y, const AxisSample<C>* x, long ratio, long width,
                        BilinearSample<C, Index>* out) {
  long count = 0;
  for (long i = 0; i < ratio; ++i) {
    for (long j = 0; j < ratio; ++j) {
      if (y[i].low < 0 || x[j].low < 0) continue;
      const Index top = static_cast<Index>(y[i].low * width), bottom = static_cast<Index>(y[i].high * width);
      out[count++] = {{top + x[j].low, top + x[j].high, bottom + x[j].low, bottom + x[j].high},
                      {y[i].low_weight * x[j].low_weight, y[i].low_weight * x[j].high_weight,
                       y[i].high_weight * x[j].low_weight, y[i].high_weight * x[j].high_weight}};
    }
  }
  return count;
}

// `Lanes` channels of one bin; Lanes is a constant so that the sums stay in registers.
template <int Lanes, typename T, typename Index>
inline void bin_forward_lanes(const BilinearSample<typename Scalar<T>::Compute, Index>* samples, long count,
                              long divisor, const T* features, long stride, T* __restrict__ out) {
  using C = typename Scalar<T>::Compute;
  C sum[Lanes] = {};
  for (long at = 0; at < count; ++at) {
    const BilinearSample<C, Index>& s = samples[at];
    const T* p0 = features + s.pixel[0] * stride;
    const T* p1 = features + s.pixel[1] * stride;
    const T* p2 = features + s.pixel[2] * stride;
    const T* p3 = features + s.pixel[3] * stride;
    for (int c = 0; c < Lanes; ++c)
      sum[c] += s.weight[0] * Scalar<T>::load(p0[c]) + s.weight[1] * Scalar<T>::load(p1[c]) +
                s.weight[2] * Scalar<T>::load(p2[c]) + s.weight[3] * Scalar<T>::load(p3[c]);
  }
  if (divisor == 1)
    for (int c = 0; c < Lanes; ++c) out[c] = Scalar<T>::store(sum[c]);
  else
    for (int c = 0; c < Lanes; ++c) out[c] = Scalar<T>::store(sum[c] / C(divisor));
}

// out [channels]: the sum of `count` samples over `divisor` (the samples of the bin, those outside included).
// `out` must not overlap `features`.
template <typename T, typename Index>
inline void roi_align_bin_forward(const BilinearSample<typename Scalar<T>::Compute, Index>* samples, long count,
                                  long divisor, const T* features, long stride, long channels, T* __restrict__ out) {
  long c = 0;
  for (; c + 32 <= channels; c += 32) bin_forward_lanes<32>(samples, count, divisor, features + c, stride, out + c);
  for (; c + 8 <= channels; c += 8) bin_forward_lanes<8>(samples, count, divisor, features + c, stride, out + c);
  for (; c < channels; ++c) bin_forward_lanes<1>(samples, count, divisor, features + c, stride, out + c);
}

// The transpose of the above: adds grad [channels] of one bin into the gradient of the features.
// `grad_features` must not overlap `grad`; where T is half, let it be wider, for many bins meet in one pixel.
template <typename T, typename Sum, typename Index>
inline void roi_align_bin_backward(const BilinearSample<typename Scalar<T>::Compute, Index>* samples, long count,
                                   long divisor, const T* grad, long stride, long channels,
                                   Sum* __restrict__ grad_features) {
  using C = typename Scalar<T>::Compute;
  for (long at = 0; at < count; ++at) {
    for (int corner = 0; corner < 4; ++corner) {  // in turn: at the border two corners are the same pixel
      const C weight = samples[at].weight[corner] / C(divisor);
      Sum* target = grad_features + samples[at].pixel[corner] * stride;
      for (long c = 0; c < channels; ++c) target[c] += weight * Scalar<T>::load(grad[c]);
    }
  }
}

}  // namespace popdet
