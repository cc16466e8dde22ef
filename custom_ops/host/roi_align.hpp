// RoI-Align of a batch on the CPU, forward and backward, in both orders of memory; a RoI's arithmetic is in
// kernels/roi_align.hpp.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../kernels/roi_align.hpp"
#include "parallel.hpp"

namespace popdet {

constexpr long kLanes = 32;         // channels that travel together in the packed layout [blocks][pixels][kLanes]
constexpr long kGradChannels = 64;  // channels-last backward: 50 x 50 pixels of these stay in the level 2 cache

// What both directions of RoI-Align are told.
struct RoiAlign {
  long batch, channels, height, width, rois, roi_columns, out_height, out_width, ratio;
  bool channels_last;
  long pixels() const { return height * width; }
  long bins() const { return out_height * out_width; }
  long axis_entries() const { return (out_height + out_width) * ratio; }
};

// The axis samples of every RoI: [batch * rois][(out_height + out_width) * ratio], y before x.
template <typename T>
std::vector<AxisSample<T>> all_axis_samples(const T* rois, const RoiAlign& s, T scale) {
  std::vector<AxisSample<T>> table(s.batch * s.rois * s.axis_entries());
  for (long r = 0; r < s.batch * s.rois; ++r) {
    const T* roi = rois + r * s.roi_columns;
    AxisSample<T>* y = table.data() + r * s.axis_entries();
    axis_samples(roi[1], roi[3], scale, s.out_height, s.ratio, s.height, y);
    axis_samples(roi[0], roi[2], scale, s.out_width, s.ratio, s.width, y + s.out_height * s.ratio);
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
void for_each_bin(const AxisSample<T>* y, const RoiAlign& s, BilinearSample<T>* scratch, Use use) {
  const AxisSample<T>* x = y + s.out_height * s.ratio;
  for (long i = 0; i < s.out_height; ++i)
    for (long j = 0; j < s.out_width; ++j)
      use(i * s.out_width + j, scratch, bin_samples(y + i * s.ratio, x + j * s.ratio, s.ratio, s.width, scratch));
}

// RoI r of channels-last features -> out [bins, channels]; then(out + ..) for each bin when it is there.
template <typename T, typename Then>
void roi_align_one(const RoiAlign& s, const T* features, const std::vector<AxisSample<T>>& axes, long r, T* out,
                   Then then) {
  const T* image = features + r / s.rois * s.pixels() * s.channels;
  const long divisor = s.ratio * s.ratio;
  std::vector<BilinearSample<T>> scratch(divisor);
  for_each_bin(axes.data() + r * s.axis_entries(), s, scratch.data(),
               [&](long bin, const BilinearSample<T>* samples, long count) {
                 T* target = out + bin * s.channels;
                 roi_align_bin_forward(samples, count, divisor, image, s.channels, s.channels, target);
                 then(target);
               });
}

template <typename T>
void forward_channels_last(const T* features, const std::vector<AxisSample<T>>& axes, const RoiAlign& s, int threads,
                           T* out) {
  parallel_for(s.batch * s.rois, threads, [&](long r) {
    roi_align_one(s, features, axes, r, out + r * s.bins() * s.channels, [](T*) {});
  });
}

// Channels-first: the features are packed once into [batch][blocks][pixels][kLanes], so that a bilinear corner is one
// contiguous read, and each block of a RoI is turned back in the cache.
template <typename T>
void forward_channels_first(const T* features, const std::vector<AxisSample<T>>& axes, const RoiAlign& s, int threads,
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
      counts[bin] = bin_samples(y + bin / s.out_width * s.ratio, x + bin % s.out_width * s.ratio, s.ratio, s.width,
                                samples.data() + bin * divisor);
    for (long block = 0; block < blocks; ++block) {
      const long first = block * kLanes, lanes = std::min(kLanes, s.channels - first);
      const T* image = packed.get() + (r / s.rois * blocks + block) * s.pixels() * kLanes;
      for (long bin = 0; bin < s.bins(); ++bin)
        roi_align_bin_forward(samples.data() + bin * divisor, counts[bin], divisor, image, kLanes, lanes,
                              tile.data() + bin * kLanes);
      transpose(tile.data(), kLanes, out + (r * s.channels + first) * s.bins(), s.bins(), s.bins(), lanes);
    }
  });
}

// features [batch, channels, height, width] -> out [batch, rois, channels, out height, out width] or, channels_last, with
// the channels last in both; rois [batch, rois, roi_columns]: x1, y1, x2, y2, and perhaps a column that is not read.
template <typename T>
void roi_align_forward(const RoiAlign& s, const T* features, const T* rois, T scale, int threads, T* out) {
  const std::vector<AxisSample<T>> axes = all_axis_samples(rois, s, scale);
  const auto forward = s.channels_last ? forward_channels_last<T> : forward_channels_first<T>;
  forward(features, axes, s, threads, out);
}

// Each task owns a block of channels of one image and takes its RoIs in order: no atomics, one order of addition.
// grad like the forward pass's out -> grad_features like its features.
template <typename T>
void roi_align_backward(const RoiAlign& s, const T* grad, const T* rois, T scale, int threads, T* grad_features) {
  const std::vector<AxisSample<T>> axes = all_axis_samples(rois, s, scale);
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
                     roi_align_bin_backward(samples, count, divisor, rows + bin * stride, wide, lanes, sums.data());
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

}  // namespace popdet
