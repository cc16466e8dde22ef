// MobileNetV2's block, channels-last, in one go:
//
//   y = project(clip(depthwise(clip(wide)))) + addend
//
// where wide is expand(x), or x as it is, or RoI-Align of a map (whose channels were expanded ahead) + bias. expand and
// project are 1x1 convolutions, depthwise is 3x3 with padding 1 and stride 1 or 2; each has a bias. A few images at a time,
// or a few rows of one, stay in the level 2 cache from wide to y: what lies between is six times as large as x or y and is
// never written to memory. Rows that two tasks read are expanded by both.
//
// Block: M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018.
#pragma once

#include <memory>

#include "gemm.hpp"
#include "roi_align.hpp"

namespace popdet {

constexpr long kBetweenBytes = 768 * 1024;  // what lies between, of as many images or rows as a task takes

template <typename T>
struct InvertedResidual {
  Depthwise<T> middle;  // `before` is the clip of wide
  long outputs;
  const T *filters, *bias;  // of the depthwise convolution
  const T *project, *project_bias;

  long wide_row() const { return middle.width * middle.channels; }
  long filtered_row() const { return middle.out_width() * middle.channels; }
};

// What a task computes: output rows first_row .. last_row - 1 of images first .. first + images - 1, all rows of more than one;
// and rows top .. bottom - 1 of wide, which those read.
struct Piece {
  long first, images, first_row, last_row, top, bottom;
};

// bands of rows of every image, or `images` images at a time, whose bands are whole.
struct Pieces {
  long images, bands;
};

// As many images as fit into kBetweenBytes; bands where not one fits or there are fewer than threads, as many for each thread.
template <typename T>
Pieces pieces_of(const InvertedResidual<T>& s, int threads) {
  const Depthwise<T>& d = s.middle;
  const long fitting = kBetweenBytes / static_cast<long>(sizeof(T)), rows = d.out_height();
  const long images = fitting / std::max(1l, d.height * s.wide_row() + rows * s.filtered_row());
  if (images >= 1 && d.batch >= threads) return {images, 1};
  const long row = d.stride * s.wide_row() + s.filtered_row(), shared = (kSide - d.stride) * s.wide_row();
  const long bands = ceil_divide(rows, std::max(1l, (fitting - shared) / std::max(1l, row)));
  return {1, std::max(1l, std::min(rows, ceil_divide(bands, threads) * threads))};
}

template <typename T>
Piece piece_at(const InvertedResidual<T>& s, Pieces pieces, long task) {
  const Depthwise<T>& d = s.middle;
  const long first = task / pieces.bands * pieces.images, band = task % pieces.bands, rows = d.out_height();
  const long first_row = rows * band / pieces.bands, last_row = rows * (band + 1) / pieces.bands;
  return {first, std::min(pieces.images, d.batch - first), first_row, last_row, std::max(0l, d.stride * first_row - 1),
          std::min(d.height, d.stride * (last_row - 1) + kSide - 1)};
}

// addend [batch, out height, out width, outputs] or null -> y, laid out as the addend. widen(piece, wide) says where the rows
// of wide are that a piece reads, [images, rows, width, channels]: in `wide`, which it has filled, or elsewhere.
template <typename T, typename Widen>
void inverted_residual(const InvertedResidual<T>& s, const T* addend, int threads, T* y, Pieces pieces, Widen widen) {
  const std::vector<T> filters = packed_filters(s.filters, s.middle.channels);
  const auto band = s.middle.stride == 1 ? forward_band<1, T> : forward_band<2, T>;
  parallel_for(ceil_divide(s.middle.batch, pieces.images) * pieces.bands, threads, [&](long task) {
    const Piece piece = piece_at(s, pieces, task);
    const long wide_size = (piece.bottom - piece.top) * s.wide_row(), rows = piece.last_row - piece.first_row;
    const long filtered_size = rows * s.filtered_row();
    const std::unique_ptr<T[]> scratch(new T[piece.images * (wide_size + filtered_size)]);  // not filled: another pass
    T* filtered = scratch.get() + piece.images * wide_size;
    const T* wide = widen(piece, scratch.get());
    for (long image = 0; image < piece.images; ++image)
      band(s.middle, piece.first_row, piece.last_row, wide + image * wide_size - piece.top * s.wide_row(), filters.data(),
           s.bias, filtered + image * filtered_size - piece.first_row * s.filtered_row());
    const long out_row = s.middle.out_width() * s.outputs;
    const long out = (piece.first * s.middle.out_height() + piece.first_row) * out_row;
    Epilogue<T> narrowed = unbounded<T>();
    narrowed.bias = s.project_bias;
    narrowed.addend = addend ? addend + out : nullptr;
    gemm<T>({1, piece.images * rows * s.middle.out_width(), s.outputs, s.middle.channels}, {filtered, s.middle.channels, 1},
            0, s.project, narrowed, 1, y + out);
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
  inverted_residual(s, addend, threads, y, pieces_of(s, threads), [&](Piece p, T* wide) -> const T* {
    const T* source = expand.x + (p.first * s.middle.height + p.top) * s.middle.width * expand.inputs;
    if (!expand.filters) return source;
    const long pixels = p.images * (p.bottom - p.top) * s.middle.width;
    gemm<T>({1, pixels, s.middle.channels, expand.inputs}, {source, expand.inputs, 1}, 0, expand.filters, widened, 1, wide);
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
  const Pieces whole = {std::max(1l, pieces_of(s, 1).images), 1};
  inverted_residual(s, addend, threads, y, whole, [&](Piece p, T* wide) -> const T* {
    for (long image = 0; image < p.images; ++image)
      roi_align_one(pooled.align, pooled.features, axes, p.first + image, wide + image * s.middle.height * s.wide_row(),
                    add_bias);
    return wide;
  });
}

}  // namespace popdet
