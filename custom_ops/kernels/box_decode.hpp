// Boxes from R-CNN deltas (dx, dy, dw, dh; arXiv 1311.2524, appendix C) relative to anchors or proposals, and clipping.
//
// Operation order is that of export/network/boxes.py. NaN stays NaN. Boxes are x1, y1, x2, y2 in pixels.
#pragma once

#include "scalar.hpp"

namespace popdet {

// log(1000 / 16): a delta never enlarges a box more than 62.5 times, so exp cannot overflow.
constexpr double kMaxLogScale = 4.135166556742356;

// What deltas are multiplied by, (1, 1, 1, 1) or the reciprocals (0.1, 0.1, 0.2, 0.2) of the weights (10, 10, 5, 5), and
// the image that boxes are clipped to, in pixels.
template <typename C>
struct BoxCode {
  C stds[4];
  C height, width;
};

// One axis: the low and high edge of a box of length exp(log_scale) * (high - low), its centre moved by `shift` lengths.
template <typename C, typename Exp>
inline void decode_axis(C low, C high, C shift, C log_scale, C limit, Exp exp, C* out_low, C* out_high) {
  const C length = high - low;
  const C centre = low + C(0.5) * length + shift * length;
  const C half = C(0.5) * length * exp(smaller(log_scale, C(kMaxLogScale)));
  *out_low = smaller(larger(centre - half, C(0)), limit);
  *out_high = smaller(larger(centre + half, C(0)), limit);
}

// anchor [4], delta [4] -> out [4]. `exp` is the natural exponential of the compute type.
template <typename T, typename Exp>
inline void box_decode(const T* anchor, const T* delta, const BoxCode<typename Scalar<T>::Compute>& code, Exp exp,
                       T* out) {
  using C = typename Scalar<T>::Compute;
  C box[4];
  for (int axis = 0; axis < 2; ++axis)
    decode_axis(C(Scalar<T>::load(anchor[axis])), C(Scalar<T>::load(anchor[axis + 2])),
                Scalar<T>::load(delta[axis]) * code.stds[axis], Scalar<T>::load(delta[axis + 2]) * code.stds[axis + 2],
                axis == 0 ? code.width : code.height, exp, box + axis, box + axis + 2);
  for (int i = 0; i < 4; ++i) out[i] = Scalar<T>::store(box[i]);
}

}  // namespace popdet
