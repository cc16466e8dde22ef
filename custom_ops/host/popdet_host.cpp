// The kernels as a C-ABI library for the CPU: threads, scratch memory and memory layouts live here, arithmetic does not.
//
// Every function returns 0, or 1 when memory or threads ran out (then the outputs are undefined). Arguments are checked
// by the caller (custom_ops/host/library.py). Results do not depend on the number of threads: each output value is
// computed by one thread, in one order.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../kernels/nms.hpp"
#include "depthwise.hpp"
#include "inverted_residual.hpp"
#include "parallel.hpp"
#include "roi_align.hpp"
#include "winograd.hpp"

namespace {

using popdet::guarded;
using popdet::parallel_for;

template <typename T>
void nms_image(const T* scores, const T* boxes, long rows, T iou_threshold, T score_threshold, long max_keep,
               int* keep) {
  struct Ranked {
    T score;
    int row;
  };
  std::vector<Ranked> ranked;
  ranked.reserve(rows);
  for (long row = 0; row < rows; ++row)
    if (popdet::nms_row_is_live(scores[row], boxes + 4 * row, score_threshold))
      ranked.push_back({scores[row], static_cast<int>(row)});
  std::sort(ranked.begin(), ranked.end(), [](const Ranked& a, const Ranked& b) {
    return a.score > b.score || (a.score == b.score && a.row < b.row);
  });
  std::vector<int> order(ranked.size());
  for (size_t i = 0; i < ranked.size(); ++i) order[i] = ranked[i].row;
  const long reachable = std::min<long>(max_keep, order.size());  // a huge capacity must not ask for a huge scratch
  std::vector<T> scratch(5 * reachable);
  const long count = popdet::nms_greedy(boxes, order.data(), static_cast<long>(order.size()), iou_threshold, reachable,
                                        scratch.data(), keep);
  std::fill(keep + count, keep + max_keep, -1);
}

// shape: nine numbers, see POPDET_EXPORT
popdet::RoiAlign make_roi_align(const int64_t* values, int channels_last) {
  const auto at = [&](int i) { return static_cast<long>(values[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), channels_last != 0};
}

template <typename T>
int roi_align(const T* values, const T* rois, const int64_t* shape, double scale, int channels_last, int threads,
              bool is_forward, T* out) {
  return guarded([&]() {
    const popdet::RoiAlign s = make_roi_align(shape, channels_last);
    if (is_forward)
      popdet::roi_align_forward(s, values, rois, static_cast<T>(scale), threads, out);
    else
      popdet::roi_align_backward(s, values, rois, static_cast<T>(scale), threads, out);
  });
}

template <typename T>
int nms(const T* scores, const T* boxes, int64_t batch, int64_t rows, double iou_threshold, double score_threshold,
        int64_t max_keep, int threads, int32_t* keep) {
  return guarded([&]() {
    parallel_for(batch, threads, [&](long image) {
      nms_image<T>(scores + image * rows, boxes + image * rows * 4, rows, static_cast<T>(iou_threshold),
                   static_cast<T>(score_threshold), max_keep, keep + image * max_keep);
    });
  });
}

// shape: batch, height, width, channels, stride. bounds: low and high before, low and high after.
template <typename T>
popdet::Depthwise<T> make_depthwise(const int64_t* shape, const double* bounds) {
  const auto bound = [&](int i) { return static_cast<T>(bounds[i]); };
  return {static_cast<long>(shape[0]), static_cast<long>(shape[1]), static_cast<long>(shape[2]),
          static_cast<long>(shape[3]), static_cast<long>(shape[4]), {bound(0), bound(1)}, {bound(2), bound(3)}};
}

// shape: as of make_depthwise, output channels
template <typename T>
popdet::InvertedResidual<T> make_inverted_residual(const T* filters, const T* bias, const T* project,
                                                   const T* project_bias, const int64_t* shape, const double* bounds) {
  return {make_depthwise<T>(shape, bounds), static_cast<long>(shape[5]), filters, bias, project, project_bias};
}

// low, high
template <typename T>
popdet::Bounds<T> make_bounds(const double* bounds) {
  return {static_cast<T>(bounds[0]), static_cast<T>(bounds[1])};
}

// shape: batch, height, width, input channels, output channels
popdet::Winograd make_winograd(const int64_t* shape) {
  const auto at = [&](int i) { return static_cast<long>(shape[i]); };
  return {at(0), at(1), at(2), at(3), at(4)};
}

// shape: rows, columns, depth; behind them, where means are taken, the pixels of an image
popdet::Gemm make_gemm(const int64_t* shape) {
  return {1, static_cast<long>(shape[0]), static_cast<long>(shape[1]), static_cast<long>(shape[2])};
}

}  // namespace

// scores [batch, rows], boxes [batch, rows, 4], keep int32 [batch, max_keep].
// features [B, C, H, W] or, channels_last, [B, H, W, C]; rois [B, D, roi_columns]; aligned [B, D, C, h, w] or
// [B, D, h, w, C]; shape is nine numbers: B, C, H, W, D, roi_columns, h, w, sampling_ratio.
#define POPDET_EXPORT(T, SUFFIX)                                                                                       \
  int popdet_nms_##SUFFIX(const T* scores, const T* boxes, int64_t batch, int64_t rows, double iou_threshold,          \
                          double score_threshold, int64_t max_keep, int threads, int32_t* keep) {                      \
    return nms<T>(scores, boxes, batch, rows, iou_threshold, score_threshold, max_keep, threads, keep);                \
  }                                                                                                                    \
  int popdet_roi_align_forward_##SUFFIX(const T* features, const T* rois, const int64_t* shape, double scale,          \
                                        int channels_last, int threads, T* aligned) {                                  \
    return roi_align<T>(features, rois, shape, scale, channels_last, threads, true, aligned);                          \
  }                                                                                                                    \
  int popdet_roi_align_backward_##SUFFIX(const T* grad, const T* rois, const int64_t* shape, double scale,             \
                                         int channels_last, int threads, T* grad_features) {                           \
    return roi_align<T>(grad, rois, shape, scale, channels_last, threads, false, grad_features);                       \
  }                                                                                                                    \
  int popdet_depthwise_forward_##SUFFIX(const T* x, const T* filters, const T* bias, const int64_t* shape,             \
                                        const double* bounds, int threads, T* y) {                                     \
    return guarded([&]() {                                                                                             \
      popdet::depthwise_forward(make_depthwise<T>(shape, bounds), x, filters, bias, threads, y);                       \
    });                                                                                                                \
  }                                                                                                                    \
  int popdet_depthwise_backward_##SUFFIX(const T* grad, const T* y, const T* x, const T* filters,                      \
                                         const int64_t* shape, const double* bounds, int threads, T* grad_x,           \
                                         T* grad_filters, T* grad_bias) {                                              \
    return guarded([&]() {                                                                                             \
      popdet::depthwise_backward(make_depthwise<T>(shape, bounds), grad, y, x, filters, threads, grad_x, grad_filters, \
                                 grad_bias);                                                                           \
    });                                                                                                                \
  }                                                                                                                    \
  int popdet_pack_filters_##SUFFIX(const T* filters, const int64_t* shape, int threads, T* packed) {                   \
    const popdet::Gemm s = make_gemm(shape);                                                                           \
    return guarded([&]() { popdet::gemm_pack<T>(s, {filters, s.depth, 1}, threads, packed); });                        \
  }                                                                                                                    \
  int popdet_pointwise_##SUFFIX(const T* x, const T* packed, const T* bias, const T* addend, const int64_t* shape,     \
                                const double* bounds, int threads, T* y) {                                             \
    const popdet::Gemm s = make_gemm(shape);                                                                           \
    const popdet::Epilogue<T> epilogue{bias, addend, make_bounds<T>(bounds)};                                          \
    return guarded([&]() { popdet::gemm<T>(s, {x, s.depth, 1}, 0, packed, epilogue, threads, y); });                   \
  }                                                                                                                    \
  int popdet_pointwise_mean_##SUFFIX(const T* x, const T* packed, const T* bias, const T* addend,                      \
                                     const int64_t* shape, const double* bounds, int threads, T* means) {              \
    const popdet::Gemm s = make_gemm(shape);                                                                           \
    const popdet::Epilogue<T> epilogue{bias, addend, make_bounds<T>(bounds)};                                          \
    const long pixels = static_cast<long>(shape[3]);                                                                   \
    return guarded([&]() {                                                                                             \
      popdet::gemm_mean<T>(s, pixels, {x, s.depth, 1}, packed, epilogue, threads, means);                              \
    });                                                                                                                \
  }                                                                                                                    \
  int popdet_inverted_residual_##SUFFIX(const T* x, const T* expand, const T* expand_bias, const T* filters,           \
                                        const T* bias, const T* project, const T* project_bias, const T* addend,       \
                                        const int64_t* shape, const double* bounds, int threads, T* y) {               \
    const popdet::InvertedResidual<T> s = make_inverted_residual(filters, bias, project, project_bias, shape, bounds); \
    const popdet::Expand<T> first{x, static_cast<long>(shape[6]), expand, expand_bias};                                \
    return guarded([&]() { popdet::inverted_residual_of_maps(s, first, addend, threads, y); });                        \
  }                                                                                                                    \
  int popdet_inverted_residual_of_rois_##SUFFIX(                                                                       \
      const T* features, const T* rois, const T* roi_bias, const T* filters, const T* bias, const T* project,          \
      const T* project_bias, const T* addend, const int64_t* roi_shape, double scale, const int64_t* shape,            \
      const double* bounds, int threads, T* y) {                                                                       \
    const popdet::InvertedResidual<T> s = make_inverted_residual(filters, bias, project, project_bias, shape, bounds); \
    const popdet::Pooled<T> first{make_roi_align(roi_shape, true), features, rois, roi_bias, static_cast<T>(scale)};   \
    return guarded([&]() { popdet::inverted_residual_of_rois(s, first, addend, threads, y); });                        \
  }                                                                                                                    \
  int popdet_winograd_filters_##SUFFIX(const T* filters, const int64_t* shape, int threads, T* packed) {               \
    const long outputs = static_cast<long>(shape[0]), inputs = static_cast<long>(shape[1]);                            \
    return guarded([&]() {                                                                                             \
      popdet::winograd_filters<T>(outputs, inputs, {filters, inputs * popdet::kTaps, popdet::kTaps}, threads, packed); \
    });                                                                                                                \
  }                                                                                                                    \
  int popdet_winograd_forward_##SUFFIX(const T* x, const T* packed, const T* bias, const int64_t* shape,               \
                                       const double* bounds, int threads, T* y) {                                      \
    return guarded([&]() {                                                                                             \
      popdet::winograd_forward(make_winograd(shape), make_bounds<T>(bounds), x, packed, bias, threads, y);             \
    });                                                                                                                \
  }                                                                                                                    \
  int popdet_winograd_backward_##SUFFIX(const T* grad, const T* y, const T* x, const T* filters, const int64_t* shape, \
                                        const double* bounds, int threads, T* grad_x, T* grad_filters, T* grad_bias) { \
    return guarded([&]() {                                                                                             \
      popdet::winograd_backward(make_winograd(shape), make_bounds<T>(bounds), grad, y, x, filters, threads, grad_x,    \
                                grad_filters, grad_bias);                                                              \
    });                                                                                                                \
  }

extern "C" {
int popdet_host_abi() { return 4; }
POPDET_EXPORT(float, f32)
POPDET_EXPORT(double, f64)
}
