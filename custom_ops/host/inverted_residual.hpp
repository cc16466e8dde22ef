// MobileNetV2's block on many small maps (the box head's RoIs), channels-last, in one go:
//
//   y = project(clip(depthwise(clip(wide)))) + addend
//
// where wide is expand(x), or x as it is, or RoI-Align of a map (whose channels were expanded ahead) + bias. expand and
// project are 1x1 convolutions, depthwise is 3x3 with padding 1 and stride 1 or 2; each has a bias. A few images at a time
// stay in the level 2 cache from wide to y: what lies between is six times as large as x or y and is never written to
// memory.
//
// Block: M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018.
#pragma once

#include <memory>

#include "gemm.hpp"
#include "roi_align.hpp"

namespace popdet {

constexpr long kBetweenBytes = 512 * 1024;  // what lies between, of as many images as a task takes

template <typename T>
struct InvertedResidual {
  Depthwise<T> middle;  // `before` is the clip of wide
  long outputs;
  const T *filters, *bias;  // of the depthwise convolution
  const T *project, *project_bias;

  long pixels() const { return middle.height * middle.width; }
  long out_pixels() const { return middle.out_height() * middle.out_width(); }
};

// addend [batch, out height, out width, outputs] or null -> y, laid out as the addend. widen(first, images, wide) says where
// `images` images from the first on are, [images, height, width, channels]: in `wide`, which it has filled, or elsewhere.
template <typename T, typename Widen>
void inverted_residual(const InvertedResidual<T>& s, const T* addend, int threads, T* y, Widen widen) {
  const std::vector<T> filters = packed_filters(s.filters, s.middle.channels);
  const long in = s.pixels() * s.middle.channels, filtered_size = s.out_pixels() * s.middle.channels;
  const long count = std::max(1l, kBetweenBytes / ((in + filtered_size) * static_cast<long>(sizeof(T))));
  const auto band = s.middle.stride == 1 ? forward_band<1, T> : forward_band<2, T>;
  parallel_for(ceil_divide(s.middle.batch, count), threads, [&](long task) {
    const long first = task * count, images = std::min(count, s.middle.batch - first);
    const std::unique_ptr<T[]> scratch(new T[images * (in + filtered_size)]);  // not filled: that would be another pass
    T* filtered = scratch.get() + images * in;
    const T* wide = widen(first, images, scratch.get());
    for (long image = 0; image < images; ++image)
      band(s.middle, 0, s.middle.out_height(), wide + image * in, filters.data(), s.bias,
           filtered + image * filtered_size);
    const long out = first * s.out_pixels() * s.outputs;
    Epilogue<T> narrowed = unbounded<T>();
    narrowed.bias = s.project_bias;
    narrowed.addend = addend ? addend + out : nullptr;
    gemm<T>({1, images * s.out_pixels(), s.outputs, s.middle.channels}, {filtered, s.middle.channels, 1}, 0, s.project,
            narrowed, 1, y + out);
  });
}

template <typename T>
struct Expand {
  const T* x;  // [batch, height, width, inputs]
  long inputs;
  const T *filters, *bias;  // packed as gemm's b; null where wide is x
};

template <typename T>
void inverted_residual_of_maps(const InvertedResidual<T>& s, const Expand<T>& expand, const T* addend, int threads,
                               T* y) {
  Epilogue<T> widened = unbounded<T>();
  widened.bias = expand.bias;
  inverted_residual(s, addend, threads, y, [&](long first, long images, T* wide) -> const T* {
    const T* source = expand.x + first * s.pixels() * expand.inputs;
    if (!expand.filters) return source;
    gemm<T>({1, images * s.pixels(), s.middle.channels, expand.inputs}, {source, expand.inputs, 1}, 0, expand.filters,
            widened, 1, wide);
    return wide;
  });
}

template <typename T>
struct Pooled {
  RoiAlign align;  // channels-last; all of its RoIs are the batch
  const T *features, *rois;
  const T* bias;  // [channels] or null
  T scale;
};

template <typename T>
void inverted_residual_of_rois(const InvertedResidual<T>& s, const Pooled<T>& pooled, const T* addend, int threads,
                               T* y) {
  const std::vector<AxisSample<T>> axes = all_axis_samples(pooled.rois, pooled.align, pooled.scale);
  const auto add_bias = [&](T* values) {
    if (!pooled.bias) return;
    for_each_wide_vector<T>(s.middle.channels, [&](auto zero, long c) {
      using V = decltype(zero);
      store(values + c, load<V>(values + c) + load<V>(pooled.bias + c));
    });
  };
  inverted_residual(s, addend, threads, y, [&](long first, long images, T* wide) -> const T* {
    for (long image = 0; image < images; ++image)
      roi_align_one(pooled.align, pooled.features, axes, first + image, wide + image * s.pixels() * s.middle.channels,
                    add_bias);
    return wide;
  });
}

}  // namespace popdet
