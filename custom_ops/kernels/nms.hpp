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

  void set(long at, const T* box) {
    x_low[at] = smaller(box[0], box[2]);
    y_low[at] = smaller(box[1], box[3]);
    x_high[at] = larger(box[0], box[2]);
    y_high[at] = larger(box[1], box[3]);
    area[at] = (x_high[at] - x_low[at]) * (y_high[at] - y_low[at]);
  }
};

// Is IoU(kept box i, kept box j) > iou_threshold? An overlap of 0 or NaN is never above. onnxruntime also asks whether
// the areas and the union are positive; a positive overlap implies that, because rounding never reverses an order.
template <typename T>
inline bool nms_overlaps(const KeptBoxes<T>& boxes, long i, long j, T iou_threshold) {
  const T width = smaller(boxes.x_high[i], boxes.x_high[j]) - larger(boxes.x_low[i], boxes.x_low[j]);
  const T height = smaller(boxes.y_high[i], boxes.y_high[j]) - larger(boxes.y_low[i], boxes.y_low[j]);
  const T intersection = width * height;
  const T both = boxes.area[i] + boxes.area[j] - intersection;
  // & instead of &&: no branches, so the compiler can test a vector of boxes at once.
  return (width > T(0)) & (height > T(0)) & (intersection > T(0)) & (intersection / both > iou_threshold);
}

// Keeps at most `max_keep` of the `live` rows listed in `order` (rising rank: best first) and returns how many.
//   boxes    [rows, 4]         order  [live], row numbers      keep [max_keep], row numbers; the rest is left alone
//   scratch  5 * (max_keep + 1) values: the kept boxes and, behind them, the candidate
template <typename T>
inline long nms_greedy(const T* boxes, const int* order, long live, T iou_threshold, long max_keep, T* scratch,
                       int* keep) {
  KeptBoxes<T> kept(scratch, max_keep + 1);
  long count = 0;
  for (long rank = 0; rank < live && count < max_keep; ++rank) {
    kept.set(count, boxes + 4l * order[rank]);
    bool suppressed = false;
    for (long block = 0; block < count && !suppressed; block += 64) {  // blocks: vectors inside, early exit between
      const long end = smaller(block + 64, count);
      int hits = 0;
      for (long other = block; other < end; ++other) hits |= nms_overlaps(kept, other, count, iou_threshold);
      suppressed = hits != 0;
    }
    if (!suppressed) keep[count++] = order[rank];
  }
  return count;
}

}  // namespace popdet
