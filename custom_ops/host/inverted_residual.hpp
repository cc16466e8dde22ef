// MobileNetV2's block on many small maps (the box head's RoIs), channels-last, in one go:
//
//   y = project(clip(depthwise(clip(expand(x))))) + addend
//
// expand and project are 1x1 convolutions, depthwise is 3x3 with padding 1 and stride 1 or 2; each has a bias. A few
// images at a time stay in the level 2 cache from x to y: what lies between is six times as large as either and is
// never written to memory. Without `expand`, x goes into the depthwise convolution as it is.
//
// Block: M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018.
#pragma once

#include "gemm.hpp"

namespace popdet {

constexpr long kBetweenBytes = 512 * 1024;  // what lies between, of as many images as a task takes

template <typename T>
struct InvertedResidual {
  Depthwise<T> middle;  // `before` is the clip behind expand
  long inputs, outputs;
  const T *expand, *expand_bias;  // packed as gemm's b; null for none
  const T *filters, *bias;        // of the depthwise convolution
  const T *project, *project_bias;

  long pixels() const { return middle.height * middle.width; }
  long out_pixels() const { return middle.out_height() * middle.out_width(); }
};

// x [batch, height, width, inputs], addend [batch, out height, out width, outputs] or null -> y, laid out as the addend
template <typename T>
void inverted_residual(const InvertedResidual<T>& s, const T* x, const T* addend, int threads, T* y) {
  const std::vector<T> filters = packed_filters(s.filters, s.middle.channels);
  const long between = s.middle.channels * (s.pixels() + s.out_pixels()), in = s.pixels() * s.inputs;
  const long count = std::max(1l, kBetweenBytes / (between * static_cast<long>(sizeof(T))));
  const auto band = s.middle.stride == 1 ? forward_band<1, T> : forward_band<2, T>;
  Epilogue<T> widened = unbounded<T>();
  widened.bias = s.expand_bias;
  parallel_for(ceil_divide(s.middle.batch, count), threads, [&](long task) {
    const long first = task * count, images = std::min(count, s.middle.batch - first);
    std::vector<T> scratch(images * between);
    T* wide = scratch.data();
    T* filtered = wide + images * s.pixels() * s.middle.channels;
    const T* source = x + first * in;
    if (s.expand)
      gemm<T>({1, images * s.pixels(), s.middle.channels, s.inputs}, {source, s.inputs, 1}, 0, s.expand, widened, 1, wide);
    for (long image = 0; image < images; ++image)
      band(s.middle, 0, s.middle.out_height(), (s.expand ? wide : source) + image * s.pixels() * s.middle.channels,
           filters.data(), s.bias, filtered + image * s.out_pixels() * s.middle.channels);
    const long out = first * s.out_pixels() * s.outputs;
    Epilogue<T> narrowed = unbounded<T>();
    narrowed.bias = s.project_bias;
    narrowed.addend = addend ? addend + out : nullptr;
    gemm<T>({1, images * s.out_pixels(), s.outputs, s.middle.channels}, {filtered, s.middle.channels, 1}, 0, s.project,
            narrowed, 1, y + out);
  });
}

}  // namespace popdet
