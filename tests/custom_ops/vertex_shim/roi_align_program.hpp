// RoI-Align as the Opx programs it: cells of tile_plan.hpp, one vertex a cell, each with buffers of its own.
#pragma once

#include "../../../custom_ops/popart/tile_plan.hpp"
#include "tile.hpp"

namespace harness {

using popdet::Range;
using popdet::RoiAlignPlan;

// Calls use(image, channels, rois, cell) for every cell that has RoIs.
template <typename Use>
void for_each_cell(const RoiAlignPlan& plan, Use use) {
  for (long image = 0; image < plan.sizes.batch; ++image)
    for (long c = 0; c < plan.channel_groups; ++c)
      for (long r = 0; r < plan.roi_groups; ++r)
        use(image, plan.channels_of(c), plan.rois_of(r), plan.cell(image, c, r));
}

template <typename V>
void set_roi_align_fields(V& vertex, const RoiAlignPlan& plan, float scale, long channels) {
  vertex.scale = scale;
  vertex.columns = plan.sizes.roi_columns;
  vertex.channels = channels;
  vertex.height = plan.sizes.height;
  vertex.width = plan.sizes.width;
  vertex.outHeight = plan.sizes.out_height;
  vertex.outWidth = plan.sizes.out_width;
  vertex.ratio = plan.sizes.ratio;
}

// features [B, C, H, W], rois [B, D, columns] -> aligned [B, D, C, h, w].
template <typename T, typename R>
TileBytes roi_align_forward(const RoiAlignPlan& plan, const T* features, const R* rois, float scale, T* aligned) {
  TileBytes bytes;
  const popdet::RoiAlignSizes& s = plan.sizes;
  const long pixels = s.pixels(), bins = s.bins();
  for_each_cell(plan, [&](long image, Range channels, Range own, long) {
    Local<T> map(pixels * channels.count), out(own.count * bins * channels.count);
    for (long c = 0; c < channels.count; ++c)
      for (long p = 0; p < pixels; ++p)
        map[p * channels.count + c] = features[(image * s.channels + channels.first + c) * pixels + p];
    Local<R> boxes(rois + (image * s.rois + own.first) * s.roi_columns, own.count * s.roi_columns);
    Local<unsigned> scratch(popdet::kWorkers * plan.scratch / 4);
    popdet::RoiAlignForward<T, R> vertex;
    map.connect(vertex.features);
    boxes.connect(vertex.rois);
    scratch.connect(vertex.scratch);
    out.connect(vertex.aligned);
    set_roi_align_fields(vertex, plan, scale, channels.count);
    bytes.see(map, boxes, scratch, out);
    run_workers(vertex, {Words::of_in_out(scratch), Words::of_output(out)});
    for (long r = 0; r < own.count; ++r)
      for (long c = 0; c < channels.count; ++c)
        for (long bin = 0; bin < bins; ++bin)
          aligned[((image * s.rois + own.first + r) * s.channels + channels.first + c) * bins + bin] =
              out[(r * bins + bin) * channels.count + c];
  });
  return bytes;
}

// One cell of the backward pass: sums float [pixels, channels].
template <typename T, typename R>
void roi_align_cell_backward(const RoiAlignPlan& plan, const T* grad, const R* rois, float scale, long image,
                             Range channels, Range own, TileBytes& bytes, float* target) {
  const popdet::RoiAlignSizes& s = plan.sizes;
  const long bins = s.bins();
  Local<T> rows(own.count * bins * channels.count);
  for (long r = 0; r < own.count; ++r)
    for (long c = 0; c < channels.count; ++c)
      for (long bin = 0; bin < bins; ++bin)
        rows[(r * bins + bin) * channels.count + c] =
            grad[((image * s.rois + own.first + r) * s.channels + channels.first + c) * bins + bin];
  Local<R> boxes(rois + (image * s.rois + own.first) * s.roi_columns, own.count * s.roi_columns);
  Local<unsigned> scratch(popdet::kWorkers * plan.scratch / 4);
  Local<float> sums(s.pixels() * channels.count);
  popdet::RoiAlignBackward<T, R> vertex;
  rows.connect(vertex.grad);
  boxes.connect(vertex.rois);
  scratch.connect(vertex.scratch);
  sums.connect(vertex.sums);
  set_roi_align_fields(vertex, plan, scale, channels.count);
  bytes.see(rows, boxes, scratch, sums);
  run_workers(vertex, {Words::of_in_out(scratch), Words::of_output(sums)});
  sums.copy_to(target);
}

// grad [B, D, C, h, w], rois [B, D, columns] -> grad_features [B, C, H, W].
template <typename T, typename R>
TileBytes roi_align_backward(const RoiAlignPlan& plan, const T* grad, const R* rois, float scale, T* grad_features) {
  TileBytes bytes;
  const popdet::RoiAlignSizes& s = plan.sizes;
  const long pixels = s.pixels();
  std::vector<float> partials(plan.cells * pixels * plan.group_channels);
  const auto of_cell = [&](long cell) { return partials.data() + cell * pixels * plan.group_channels; };
  for_each_cell(plan, [&](long image, Range channels, Range own, long cell) {
    roi_align_cell_backward(plan, grad, rois, scale, image, channels, own, bytes, of_cell(cell));
  });
  for_each_cell(plan, [&](long image, Range channels, Range, long cell) {
    const long group = cell % plan.roi_groups;
    const Range share = plan.share_of(channels.count, group);
    if (share.count <= 0) return;
    Local<float> sums(plan.roi_groups * share.count);
    Local<T> out(share.count);
    for (long part = 0; part < plan.roi_groups; ++part)
      std::memcpy(sums.data() + part * share.count, of_cell(cell - group + part) + share.first, 4 * share.count);
    popdet::RoiAlignSum<T> vertex;
    sums.connect(vertex.sums);
    out.connect(vertex.grad);
    bytes.see(sums, out);
    run_workers(vertex, {Words::of_output(out)});
    for (long i = 0; i < share.count; ++i) {
      const long at = share.first + i, pixel = at / channels.count, c = at % channels.count;
      grad_features[(image * s.channels + channels.first + c) * pixels + pixel] = out[i];
    }
  });
  return bytes;
}

}  // namespace harness
