// The table of custom_ops/popart/README.md: what tile_plan.hpp decides for the detector's sizes on 1472 tiles of 624 KiB.
#include <cstdio>
#include <initializer_list>

#include "../../../custom_ops/popart/tile_plan.hpp"

namespace {

constexpr long kTiles = 1472;

void print_nms(long rows, long keep, long bytes) {
  const popdet::NmsPlan p =
      popdet::plan_nms({rows, keep, bytes, bytes}, kTiles, popdet::default_budget(popdet::kTileBytes));
  std::printf("| NMS %ld -> %ld, %s | %ld tiles x %ld rows, %ld chunk(s) | %ld | %ld |\n", rows, keep,
              bytes == 2 ? "half" : "float", p.column_tiles, p.columns, p.chunks, p.bytes, p.cycles / 1000);
}

void print_roi_align(long channels, long side, long rois, long bins, long bytes, bool backward) {
  const popdet::RoiAlignPlan p =
      popdet::plan_roi_align({1, channels, side, side, rois, 5, bins, bins, 1, bytes, bytes}, backward, kTiles,
                             popdet::default_budget(popdet::kTileBytes));
  std::printf("| RoI-Align %s, %ld RoIs x %ld channels x %ld x %ld on %ld x %ld, %s | %ld groups of %ld channels x %ld of "
              "%ld RoIs | %ld | %ld |\n",
              backward ? "backward" : "forward", rois, channels, bins, bins, side, side, bytes == 2 ? "half" : "float",
              p.channel_groups, p.group_channels, p.roi_groups, p.group_rois, p.bytes, p.cycles / 1000);
}

}  // namespace

int main() {
  for (long bytes : {2, 4}) {
    print_nms(2000, 300, bytes);
    print_nms(12000, 2000, bytes);
  }
  for (long bytes : {2, 4})
    for (bool backward : {false, true}) print_roi_align(1024, 50, 256, 14, bytes, backward);
}
