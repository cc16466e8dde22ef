// The kernels as a C-ABI library for the CPU: threads, scratch memory and memory layouts live here, arithmetic does not.
//
// Every function returns 0, or 1 when memory or threads ran out (then the outputs are undefined). Arguments are checked
// by the caller (custom_ops/host/library.py). Results do not depend on the number of threads: each output value is
// computed by one thread, in one order.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../kernels/nms.hpp"
#include "../kernels/roi_align.hpp"
#include "depthwise.hpp"
#include "inverted_residual.hpp"
#include "parallel.hpp"
#include "winograd.hpp"

namespace {

using popdet::AxisSample;
using popdet::BilinearSample;
using popdet::guarded;
using popdet::parallel_for;

constexpr long kLanes = 32;         // channels that travel together in the packed layout [blocks][pixels][kLanes]
constexpr long kGradChannels = 64;  // channels-last backward: 50 x 50 pixels of these stay in the level 2 cache

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

// What both directions of RoI-Align are told.
struct Shape {
  long batch, channels, height, width, rois, roi_columns, out_height, out_width, ratio;
  bool channels_last;
  long pixels() const { return height * width; }
  long bins() const { return out_height * out_width; }
  long axis_entries() const { return (out_height + out_width) * ratio; }
};

// The axis samples of every RoI: [batch * rois][(out_height + out_width) * ratio], y before x.
template <typename T>
std::vector<AxisSample<T>> all_axis_samples(const T* rois, const Shape& s, T scale) {
  std::vector<AxisSample<T>> table(s.batch * s.rois * s.axis_entries());
  for (long r = 0; r < s.batch * s.rois; ++r) {
    const T* roi = rois + r * s.roi_columns;
    AxisSample<T>* y = table.data() + r * s.axis_entries();
    popdet::axis_samples(roi[1], roi[3], scale, s.out_height, s.ratio, s.height, y);
    popdet::axis_samples(roi[0], roi[2], scale, s.out_width, s.ratio, s.width, y + s.out_height * s.ratio);
  }
  return table;
}

// from [rows][from_stride] -> to [columns][to_stride], in squares that fit the level 1 cache.
template <typename T>
void transpose(const T* from, long from_stride, T* to, long to_stride, long rows, long columns) {
  constexpr long square = 16;
  for (long r0 = 0; r0 < rows; r0 += square)
    for (long c0 = 0; c0 < columns; c0 += square)
      for (long c = c0; c < std::min(c0 + square, columns); ++c)
        for (long r = r0; r < std::min(r0 + square, rows); ++r) to[c * to_stride + r] = from[r * from_stride + c];
}

// One RoI: calls use(bin, samples, count) for each of its bins.
template <typename T, typename Use>
void for_each_bin(const AxisSample<T>* y, const Shape& s, BilinearSample<T>* scratch, Use use) {
  const AxisSample<T>* x = y + s.out_height * s.ratio;
  for (long i = 0; i < s.out_height; ++i)
    for (long j = 0; j < s.out_width; ++j)
      use(i * s.out_width + j, scratch, popdet::bin_samples(y + i * s.ratio, x + j * s.ratio, s.ratio, s.width, scratch));
}

template <typename T>
void forward_channels_last(const T* features, const std::vector<AxisSample<T>>& axes, const Shape& s, int threads,
                           T* out) {
  const long divisor = s.ratio * s.ratio;
  parallel_for(s.batch * s.rois, threads, [&](long r) {
    const T* image = features + r / s.rois * s.pixels() * s.channels;
    std::vector<BilinearSample<T>> scratch(divisor);
    for_each_bin(axes.data() + r * s.axis_entries(), s, scratch.data(),
                 [&](long bin, const BilinearSample<T>* samples, long count) {
                   popdet::roi_align_bin_forward(samples, count, divisor, image, s.channels, s.channels,
                                                 out + (r * s.bins() + bin) * s.channels);
                 });
  });
}

// Channels-first: the features are packed once into [batch][blocks][pixels][kLanes], so that a bilinear corner is one
// contiguous read, and each block of a RoI is turned back in the cache.
template <typename T>
void forward_channels_first(const T* features, const std::vector<AxisSample<T>>& axes, const Shape& s, int threads,
                            T* out) {
  const long blocks = (s.channels + kLanes - 1) / kLanes, divisor = s.ratio * s.ratio;
  std::unique_ptr<T[]> packed(new T[s.batch * blocks * s.pixels() * kLanes]);
  parallel_for(s.batch * blocks, threads, [&](long task) {
    const long first = task % blocks * kLanes, lanes = std::min(kLanes, s.channels - first);
    T* target = packed.get() + task * s.pixels() * kLanes;
    transpose(features + (task / blocks * s.channels + first) * s.pixels(), s.pixels(), target, kLanes, lanes,
              s.pixels());
  });
  parallel_for(s.batch * s.rois, threads, [&](long r) {
    std::vector<BilinearSample<T>> samples(s.bins() * divisor);
    std::vector<long> counts(s.bins());
    std::vector<T> tile(s.bins() * kLanes);
    // The samples serve all blocks of channels: set them up once.
    const AxisSample<T>* y = axes.data() + r * s.axis_entries();
    const AxisSample<T>* x = y + s.out_height * s.ratio;
    for (long bin = 0; bin < s.bins(); ++bin)
      counts[bin] = popdet::bin_samples(y + bin / s.out_width * s.ratio, x + bin % s.out_width * s.ratio, s.ratio,
                                        s.width, samples.data() + bin * divisor);
    for (long block = 0; block < blocks; ++block) {
      const long first = block * kLanes, lanes = std::min(kLanes, s.channels - first);
      const T* image = packed.get() + (r / s.rois * blocks + block) * s.pixels() * kLanes;
      for (long bin = 0; bin < s.bins(); ++bin)
        popdet::roi_align_bin_forward(samples.data() + bin * divisor, counts[bin], divisor, image, kLanes, lanes,
                                      tile.data() + bin * kLanes);
      transpose(tile.data(), kLanes, out + (r * s.channels + first) * s.bins(), s.bins(), s.bins(), lanes);
    }
  });
}

// Each task owns a block of channels of one image and takes its RoIs in order: no atomics, one order of addition.
template <typename T>
void backward(const T* grad, const std::vector<AxisSample<T>>& axes, const Shape& s, int threads, T* grad_features) {
  const long wide = s.channels_last ? kGradChannels : kLanes;
  const long blocks = (s.channels + wide - 1) / wide, divisor = s.ratio * s.ratio;
  parallel_for(s.batch * blocks, threads, [&](long task) {
    const long image = task / blocks, first = task % blocks * wide, lanes = std::min(wide, s.channels - first);
    std::vector<T> sums(s.pixels() * wide), tile(s.channels_last ? 0 : s.bins() * wide);
    std::vector<BilinearSample<T>> scratch(divisor);
    for (long r = image * s.rois; r < (image + 1) * s.rois; ++r) {
      const T* rows = grad + r * s.bins() * s.channels + first;
      long stride = s.channels;
      if (!s.channels_last) {
        transpose(grad + (r * s.channels + first) * s.bins(), s.bins(), tile.data(), wide, lanes, s.bins());
        rows = tile.data();
        stride = wide;
      }
      for_each_bin(axes.data() + r * s.axis_entries(), s, scratch.data(),
                   [&](long bin, const BilinearSample<T>* samples, long count) {
                     popdet::roi_align_bin_backward(samples, count, divisor, rows + bin * stride, wide, lanes,
                                                    sums.data());
                   });
    }
    if (s.channels_last) {
      T* target = grad_features + image * s.pixels() * s.channels + first;
      for (long pixel = 0; pixel < s.pixels(); ++pixel)
        std::copy_n(sums.data() + pixel * wide, lanes, target + pixel * s.channels);
    } else {
      T* target = grad_features + (image * s.channels + first) * s.pixels();
      transpose(sums.data(), wide, target, s.pixels(), s.pixels(), lanes);
    }
  });
}

Shape make_shape(const int64_t* values, int channels_last) {
  const auto at = [&](int i) { return static_cast<long>(values[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), channels_last != 0};
}

template <typename T>
int roi_align(const T* values, const T* rois, const int64_t* shape, double scale, int channels_last, int threads,
              bool is_forward, T* out) {
  return guarded([&]() {
    const Shape s = make_shape(shape, channels_last);
    const std::vector<AxisSample<T>> axes = all_axis_samples(rois, s, static_cast<T>(scale));
    if (!is_forward)
      backward(values, axes, s, threads, out);
    else if (s.channels_last)
      forward_channels_last(values, axes, s, threads, out);
    else
      forward_channels_first(values, axes, s, threads, out);
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
    const popdet::InvertedResidual<T> s{make_depthwise<T>(shape, bounds), static_cast<long>(shape[5]),                 \
                                        static_cast<long>(shape[6]), expand, expand_bias, filters, bias, project,      \
                                        project_bias};                                                                 \
    return guarded([&]() { popdet::inverted_residual(s, x, addend, threads, y); });                                    \
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
