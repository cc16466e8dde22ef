// The codelets as a C-ABI library: every function cuts its problem as tile_plan.hpp says and runs all vertices.
//
// Types are numbered 0 float, 1 half (16 bits, IEEE). Every function returns 0, or 1 where the plan does not fit the
// budget, or 2 with a line on stderr where a vertex broke a rule of tile.hpp. `report`: bytes planned, the most bytes that
// the edges of a vertex had, cycles, and more as each function says.
#include "../../../custom_ops/popart/codelets.cpp"

#include "nms_program.hpp"
#include "roi_align_program.hpp"

namespace {

using poplar::half;

template <typename Function>
int guarded(Function function) {
  try {
    return function();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}

template <typename S, typename B>
int nms(const void* scores, const void* boxes, const popdet::NmsPlan& plan, float iou, float threshold, int* keep,
        void* kept, int64_t* report) {
  harness::NmsProgram<S, B> program(plan, iou, threshold);
  const auto bytes = program.run(static_cast<const S*>(scores), static_cast<const B*>(boxes), keep, static_cast<B*>(kept));
  report[1] = bytes.largest;
  report[3] = program.state()[0];
  return 0;
}

template <typename T, typename R>
int roi_align(const popdet::RoiAlignPlan& plan, const void* values, const void* rois, float scale, void* out,
              int64_t* report) {
  const auto run = plan.backward ? harness::roi_align_backward<T, R> : harness::roi_align_forward<T, R>;
  report[1] = run(plan, static_cast<const T*>(values), static_cast<const R*>(rois), scale, static_cast<T*>(out)).largest;
  return 0;
}

popdet::RoiAlignPlan roi_align_plan(const int64_t* s, int value_type, int roi_type, int backward, int64_t tiles,
                                    int64_t budget) {
  const popdet::RoiAlignSizes sizes = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], value_type ? 2 : 4,
                                       roi_type ? 2 : 4};
  return popdet::plan_roi_align(sizes, backward != 0, tiles, budget);
}

}  // namespace

extern "C" {

// report: + columns a tile, chunks, tiles with slots, bytes of the resolving tile.
int codelets_plan_nms(int64_t rows, int64_t keep, int score_type, int box_type, int64_t tiles, int64_t budget,
                      int64_t* report) {
  const popdet::NmsPlan p = popdet::plan_nms({rows, keep, score_type ? 2 : 4, box_type ? 2 : 4}, tiles, budget);
  const int64_t values[] = {p.bytes, 0, p.cycles, p.columns, p.chunks, p.column_tiles, p.resolver_bytes};
  std::memcpy(report, values, sizeof values);
  return p.fits ? 0 : 1;
}

// report: + channels a group, groups of channels, RoIs a group, groups of RoIs.
int codelets_plan_roi_align(const int64_t* sizes, int value_type, int roi_type, int backward, int64_t tiles,
                            int64_t budget, int64_t* report) {
  const popdet::RoiAlignPlan p = roi_align_plan(sizes, value_type, roi_type, backward, tiles, budget);
  const int64_t values[] = {p.bytes, 0, p.cycles, p.group_channels, p.channel_groups, p.group_rois, p.roi_groups};
  std::memcpy(report, values, sizeof values);
  return p.fits ? 0 : 1;
}

// scores [rows], boxes [rows, 4] -> keep [keep_rows], kept [keep_rows, 4]; rows >= 1. report: + blocks resolved.
int codelets_nms(int score_type, int box_type, const void* scores, const void* boxes, int64_t rows, int64_t keep_rows,
                 float iou, float threshold, int64_t tiles, int64_t budget, int* keep, void* kept, int64_t* report) {
  return guarded([&]() {
    const popdet::NmsPlan plan =
        popdet::plan_nms({rows, keep_rows, score_type ? 2 : 4, box_type ? 2 : 4}, tiles, budget);
    report[0] = plan.bytes;
    report[2] = plan.cycles;
    if (!plan.fits) return 1;
    const auto run = score_type ? (box_type ? nms<half, half> : nms<half, float>)
                                : (box_type ? nms<float, half> : nms<float, float>);
    return run(scores, boxes, plan, iou, threshold, keep, kept, report);
  });
}

// sizes: B, C, H, W, D, columns, h, w, ratio, as for the host library; D >= 1. values: features, or the gradient of the
// result.
int codelets_roi_align(int value_type, int roi_type, const void* values, const void* rois, const int64_t* sizes,
                       float scale, int backward, int64_t tiles, int64_t budget, void* out, int64_t* report) {
  return guarded([&]() {
    const popdet::RoiAlignPlan plan = roi_align_plan(sizes, value_type, roi_type, backward, tiles, budget);
    report[0] = plan.bytes;
    report[2] = plan.cycles;
    if (!plan.fits) return 1;
    const auto run = value_type ? (roi_type ? roi_align<half, half> : roi_align<half, float>)
                                : (roi_type ? roi_align<float, half> : roi_align<float, float>);
    return run(plan, values, rois, scale, out, report);
  });
}

// anchors, deltas [rows, 4] -> boxes [rows, 4]. settings: four stds, height, width of the image.
int codelets_box_decode(int type, const void* anchors, const void* deltas, int64_t rows, const float* settings,
                        int64_t tiles, void* boxes) {
  return guarded([&]() {
    if (type)
      harness::box_decode(static_cast<const half*>(anchors), static_cast<const half*>(deltas), rows, settings, tiles,
                          static_cast<half*>(boxes));
    else
      harness::box_decode(static_cast<const float*>(anchors), static_cast<const float*>(deltas), rows, settings, tiles,
                          static_cast<float*>(boxes));
    return 0;
  });
}

// Round trip of `count` floats through half.
void codelets_to_half(const float* values, int64_t count, void* halves, float* back) {
  for (int64_t i = 0; i < count; ++i) {
    static_cast<half*>(halves)[i] = half(values[i]);
    back[i] = static_cast<half*>(halves)[i];
  }
}
}
