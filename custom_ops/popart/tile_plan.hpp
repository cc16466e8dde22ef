// How NMS and RoI-Align are split over the tiles of an IPU: pure arithmetic, shared by the Opx classes and the tests.
//
// A plan says which tile works on what, how many bytes the busiest tile holds meanwhile, and about how many cycles the op
// takes (tile_cycles.hpp). C++14, no Poplar, no allocation.
#pragma once

#include "tile_cycles.hpp"

namespace popdet {

constexpr long kTileBytes = 638976;     // SRAM of one tile, Mk2 and Bow: 624 KiB
constexpr double kShareOfTile = 0.6;    // what one op may use of it while it runs; weights and code live there too
constexpr long kOverheadBytes = 16384;  // vertex state, exchange and codelet code of an op, a guess on the safe side

inline long min_of(long a, long b) { return b < a ? b : a; }
inline long max_of(long a, long b) { return a < b ? b : a; }

// Part `index` of `total` things cut into parts of `part`; the last may be smaller.
struct Range {
  long first, count;
};

inline Range part_of(long total, long part, long index) {
  const long first = min_of(total, index * part);
  return {first, min_of(part, total - first)};
}

inline long default_budget(long tile_bytes) { return static_cast<long>(kShareOfTile * tile_bytes) - kOverheadBytes; }

// Of two plans the one that fits, or that comes nearer; if both fit the cheaper one, where a tile filled to the half
// doubles the price of a cycle.
template <typename Plan>
inline Plan better_plan(const Plan& a, const Plan& b) {
  if (a.fits != b.fits) return a.fits ? a : b;
  if (!a.fits) return b.bytes < a.bytes ? b : a;
  const double cost_a = static_cast<double>(a.cycles) * (1.0 + a.bytes * 2.0 / kTileBytes);
  const double cost_b = static_cast<double>(b.cycles) * (1.0 + b.bytes * 2.0 / kTileBytes);
  return cost_b < cost_a ? b : a;
}

// NMS ----------------------------------------------------------------------------------------------------------------

struct NmsShape {
  long rows, keep;                     // N and K
  long score_bytes, box_bytes;         // of one number: 2 or 4
};

// One image at a time, on all tiles. Slot s of the sorted table is column s % columns of tile s / columns; rows of the
// unsorted inputs are cut likewise. Tables that every tile must see (keys, ranks, boxes) pass in chunks.
struct NmsPlan {
  NmsShape shape;
  long columns, column_tiles;          // slots a tile, tiles that have any
  long chunk, chunks;                  // rows of a table that are sent to all tiles at once
  long words, flag_words;              // overlap bits of a slot; flags of a tile; in words of 32 bits
  long blocks;                         // of 64 slots
  long output_rows, output_tiles;      // of the result: rows a tile, tiles that have any
  long resolver;                       // number of the tile that decides
  long bytes, resolver_bytes;          // on a tile, at the worst moment; on the resolving tile
  long cycles;                         // if all blocks are needed
  bool fits;
};

constexpr long kNmsBlockSlots = 64;
constexpr long kMaxColumns = 512;

// Cycles of a plan: the compute sets, the loop over blocks, and what the tiles receive.
inline long nms_cycles(const NmsPlan& p) {
  const long rows = p.shape.rows, box = 4 * p.shape.box_bytes, n = p.columns;
  const long once = nms_keys_cycles(n) + nms_rank_cycles(n, rows) + nms_place_cycles(n, rows) + nms_overlap_cycles(n, rows) +
                    nms_flags_cycles(n) + nms_begin_cycles(p.shape.keep) + nms_emit_cycles(p.output_rows) * p.chunks;
  const long flags = p.column_tiles * p.flag_words * 4 / kExchangeBytes;
  const long block = nms_resolve_cycles() + nms_suppress_cycles(n) + flags + 2 * kSyncCycles;
  const long received = rows * (4 + (4 + box) + box + (4 + box)) / kExchangeBytes;
  return once + p.blocks * block + received + (3 + 4 * p.chunks) * kSyncCycles;
}

// Bytes on a tile that hold as long as the op runs: keys, ranks, sorted table, bits, flags, and the result.
inline long nms_resident_bytes(const NmsPlan& p) {
  const long box = 4 * p.shape.box_bytes;
  const long row = p.shape.score_bytes + box + 4 + 4;               // score, box, key, rank of an unsorted row
  const long slot = 4 + box + 4 * p.words + 8;                      // order, box, bits, diagonal words
  return p.columns * (row + slot) + 4 * p.flag_words + 12 + p.output_rows * (8 + box);
}

inline NmsPlan nms_plan_of(const NmsShape& shape, long tiles, long budget, long columns) {
  NmsPlan p{};
  p.shape = shape;
  p.columns = columns;
  p.column_tiles = ceil_div(shape.rows, columns);
  p.blocks = ceil_div(shape.rows, kNmsBlockSlots);
  p.words = p.blocks * (kNmsBlockSlots / 32);
  p.flag_words = ceil_div(columns, 32);
  p.output_rows = ceil_div(shape.keep, tiles);
  p.output_tiles = ceil_div(shape.keep, p.output_rows);
  p.resolver = tiles - 1;  // the tile with the fewest slots, often none
  const long resident = nms_resident_bytes(p);
  const long row = 8 + 4 * shape.box_bytes;  // of a chunk: a rank or a row number, a box, rounded up
  const long whole = p.blocks * kNmsBlockSlots;
  p.chunk = min_of(whole, (budget - resident) / row / kNmsBlockSlots * kNmsBlockSlots);
  p.resolver_bytes = p.blocks * kNmsBlockSlots * 8 + p.column_tiles * p.flag_words * 4 + shape.keep * 4 + 32 + resident;
  p.fits = p.chunk >= kNmsBlockSlots && p.resolver_bytes <= budget;
  p.chunks = p.fits ? ceil_div(shape.rows, p.chunk) : 0;
  p.bytes = max_of(resident + max_of(p.chunk, 0) * row, p.resolver_bytes);
  p.cycles = nms_cycles(p);
  return p;
}

// rows >= 1. `fits` is false where no split keeps the busiest tile within `budget` bytes.
inline NmsPlan plan_nms(const NmsShape& shape, long tiles, long budget) {
  const long fewest = max_of(1, ceil_div(shape.rows, tiles));
  NmsPlan best = nms_plan_of(shape, tiles, budget, fewest);
  for (long columns = fewest + 1; columns <= min_of(kMaxColumns, shape.rows); ++columns)
    best = better_plan(best, nms_plan_of(shape, tiles, budget, columns));
  return best;
}

// RoI-Align ----------------------------------------------------------------------------------------------------------

struct RoiAlignSizes {
  long batch, channels, height, width, rois, roi_columns, out_height, out_width, ratio;
  long value_bytes, roi_bytes;         // of one number of features and of rois: 2 or 4

  long pixels() const { return height * width; }
  long bins() const { return out_height * out_width; }
};

// Cells (image, group of channels, group of RoIs) are dealt to the tiles in turn. A cell holds its channels of the whole
// map. Backward, a cell holds float sums of the whole map, and the cells of one group of channels add theirs, each a
// share of the map.
struct RoiAlignPlan {
  RoiAlignSizes sizes;
  bool backward;
  long tiles;
  long group_channels, channel_groups;
  long group_rois, roi_groups;
  long share;                          // backward: values of [pixels, channels of the group] that one cell adds up
  long cells, cells_per_tile;
  long scratch;                        // bytes of sample tables a worker needs
  long bytes, cycles;
  bool fits;

  long cell(long image, long channel_group, long roi_group) const {
    return (image * channel_groups + channel_group) * roi_groups + roi_group;
  }
  long tile(long cell) const { return cell % tiles; }
  Range channels_of(long group) const { return part_of(sizes.channels, group_channels, group); }
  Range rois_of(long group) const { return part_of(sizes.rois, group_rois, group); }
  Range share_of(long channels, long group) const { return part_of(sizes.pixels() * channels, share, group); }
};

// Axis samples of one bin (16 bytes each, `ratio` an axis) and its bilinear samples (32 bytes each).
inline long roi_align_scratch(long ratio) { return 2 * ratio * 16 + ratio * ratio * 32; }

inline long roi_align_cycles(const RoiAlignPlan& p) {
  const RoiAlignSizes& s = p.sizes;
  const long items = p.group_rois * s.bins();
  if (!p.backward) {
    const long received = s.pixels() * p.group_channels * s.value_bytes / kExchangeBytes;
    return p.cells_per_tile * (roi_align_forward_cycles(items, p.group_channels, s.ratio) + received) + kSyncCycles;
  }
  const long received = (items * p.group_channels * s.value_bytes + p.share * p.roi_groups * 4) / kExchangeBytes;
  const long work = roi_align_backward_cycles(items, p.group_channels, s.ratio, s.pixels()) +
                    roi_align_sum_cycles(p.share, p.roi_groups);
  return p.cells_per_tile * (work + received) + 2 * kSyncCycles;
}

inline long roi_align_bytes(const RoiAlignPlan& p) {
  const RoiAlignSizes& s = p.sizes;
  const long map = s.pixels() * p.group_channels, aligned = p.group_rois * s.bins() * p.group_channels;
  const long common = aligned * s.value_bytes + p.group_rois * s.roi_columns * s.roi_bytes + kWorkers * p.scratch;
  if (!p.backward) return p.cells_per_tile * (common + map * s.value_bytes);
  const long adding = p.share * (p.roi_groups * 4 + s.value_bytes);  // the gradients are no longer needed by then
  return p.cells_per_tile * (map * 4 + max_of(common, adding));
}

inline RoiAlignPlan roi_align_plan_of(const RoiAlignSizes& sizes, bool backward, long tiles, long budget,
                                      long group_channels) {
  RoiAlignPlan p{};
  p.sizes = sizes;
  p.backward = backward;
  p.tiles = tiles;
  p.group_channels = group_channels;
  p.channel_groups = ceil_div(sizes.channels, group_channels);
  const long room = max_of(1, tiles / (sizes.batch * p.channel_groups));
  p.group_rois = max_of(1, ceil_div(sizes.rois, room));
  p.roi_groups = max_of(1, ceil_div(sizes.rois, p.group_rois));
  // An even share: two numbers of 16 bits make a word, and a word must have one writer.
  p.share = ceil_div(ceil_div(sizes.pixels() * group_channels, p.roi_groups), 2) * 2;
  p.cells = sizes.batch * p.channel_groups * p.roi_groups;
  p.cells_per_tile = ceil_div(p.cells, tiles);
  p.scratch = roi_align_scratch(sizes.ratio);
  p.bytes = roi_align_bytes(p);
  p.cycles = roi_align_cycles(p);
  p.fits = p.bytes <= budget;
  return p;
}

// rois >= 1. `fits` is false where no split keeps the busiest tile within `budget` bytes.
inline RoiAlignPlan plan_roi_align(const RoiAlignSizes& sizes, bool backward, long tiles, long budget) {
  RoiAlignPlan best = roi_align_plan_of(sizes, backward, tiles, budget, 1);
  for (long channels = 2; channels <= sizes.channels; channels += channels < 4 ? 2 : 4)
    best = better_plan(best, roi_align_plan_of(sizes, backward, tiles, budget, channels));
  return best;
}

}  // namespace popdet
