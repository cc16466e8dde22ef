// Greedy non-maximum suppression of one image. Boxes are x1, y1, x2, y2 in pixels, corners in either order.
//
// The IoU test is ONNX NonMaxSuppression's (onnxruntime, opset 11), operation by operation: where rounding decides,
// it decides alike. That needs a compiler that does not contract a * b + c (host: -ffp-contract=off).
#pragma once

#include "scalar.hpp"

namespace popdet {

// True for a row that takes part: score above the threshold, no NaN anywhere. Every comparison is false for NaN.
template <typename T>
inline bool nms_row_is_live(T score, const T* box, T score_threshold) {
  return score > score_threshold && box[0] == box[0] && box[1] == box[1] && box[2] == box[2] && box[3] == box[3];
}

// A box with its corners in order, and its area.
template <typename C>
struct OrderedBox {
  C x_low, y_low, x_high, y_high, area;
};

template <typename T>
inline OrderedBox<typename Scalar<T>::Compute> ordered_box(const T* box) {
  using C = typename Scalar<T>::Compute;
  const C x1 = Scalar<T>::load(box[0]), y1 = Scalar<T>::load(box[1]);
  const C x2 = Scalar<T>::load(box[2]), y2 = Scalar<T>::load(box[3]);
  const C x_low = smaller(x1, x2), y_low = smaller(y1, y2), x_high = larger(x1, x2), y_high = larger(y1, y2);
  return {x_low, y_low, x_high, y_high, (x_high - x_low) * (y_high - y_low)};
}

// Is IoU(a, b) > iou_threshold? An overlap of 0 or NaN is never above. onnxruntime also asks whether the areas and the
// union are positive; a positive overlap implies that, because rounding never reverses an order.
template <typename C>
inline bool nms_overlaps(const OrderedBox<C>& a, const OrderedBox<C>& b, C iou_threshold) {
  const C width = smaller(a.x_high, b.x_high) - larger(a.x_low, b.x_low);
  const C height = smaller(a.y_high, b.y_high) - larger(a.y_low, b.y_low);
  const C intersection = width * height;
  const C both = a.area + b.area - intersection;
  // & instead of &&: no branches, so the compiler can test a vector of boxes at once.
  return (width > C(0)) & (height > C(0)) & (intersection > C(0)) & (intersection / both > iou_threshold);
}

// Kept boxes as five columns of `capacity` values each, in scratch the caller owns (5 * capacity values). Columns,
// because one candidate meets all kept boxes: the loop over them is the hot one, and it vectorises.
template <typename T>
struct KeptBoxes {
  T* x_low;
  T* y_low;
  T* x_high;
  T* y_high;
  T* area;

  KeptBoxes(T* scratch, long capacity)
      : x_low(scratch), y_low(scratch + capacity), x_high(scratch + 2 * capacity), y_high(scratch + 3 * capacity),
        area(scratch + 4 * capacity) {}

  void set(long at, const OrderedBox<T>& box) {
    x_low[at] = box.x_low;
    y_low[at] = box.y_low;
    x_high[at] = box.x_high;
    y_high[at] = box.y_high;
    area[at] = box.area;
  }

  OrderedBox<T> get(long at) const { return {x_low[at], y_low[at], x_high[at], y_high[at], area[at]}; }
};

// Keeps at most `max_keep` of the `live` rows listed in `order` (rising rank: best first) and returns how many.
//   boxes    [rows, 4]         order  [live], row numbers      keep [max_keep], row numbers; the rest is left alone
//   scratch  5 * max_keep values: the kept boxes
template <typename T>
inline long nms_greedy(const T* boxes, const int* order, long live, T iou_threshold, long max_keep, T* scratch,
                       int* keep) {
  KeptBoxes<T> kept(scratch, max_keep);
  long count = 0;
  for (long rank = 0; rank < live && count < max_keep; ++rank) {
    const OrderedBox<T> candidate = ordered_box(boxes + 4l * order[rank]);
    bool suppressed = false;
    for (long block = 0; block < count && !suppressed; block += 64) {  // blocks: vectors inside, early exit between
      const long end = smaller(block + 64, count);
      int hits = 0;
      for (long other = block; other < end; ++other) hits |= nms_overlaps(candidate, kept.get(other), iou_threshold);
      suppressed = hits != 0;
    }
    if (suppressed) continue;
    kept.set(count, candidate);
    keep[count++] = order[rank];
  }
  return count;
}

}  // namespace popdet
