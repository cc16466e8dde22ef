// About how many cycles a vertex takes on its tile: instructions counted by hand, six workers taking turns.
//
// A tile issues one instruction a cycle and goes from worker to worker, so a vertex that keeps all six busy takes as many
// cycles as it has instructions, and one that runs alone takes six times as many. Nobody has measured these numbers; they
// serve to choose a plan, and as perf estimates of an IpuModel.
#pragma once

namespace popdet {

constexpr long kWorkers = 6;
constexpr long kExchangeBytes = 4;  // received by a tile in one cycle
constexpr long kSyncCycles = 150;   // of one compute set or exchange

inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

// `count` equal pieces of work over the workers: the busiest one's share, in cycles of the tile.
inline long shared_cycles(long count, long instructions) {
  return ceil_div(count, kWorkers) * instructions * kWorkers;
}

// n: rows or slots of the tile; m: rows of the chunk.
inline long nms_keys_cycles(long n) { return shared_cycles(n, 20); }
inline long nms_rank_cycles(long n, long m) { return shared_cycles(n, 20 + m * 4); }
inline long nms_place_cycles(long n, long m) { return shared_cycles(n, 30 + m * 3); }
inline long nms_overlap_cycles(long n, long m) { return shared_cycles(ceil_div(m, 32), 32 * (12 * ceil_div(n, 8) + n * 22)); }
inline long nms_flags_cycles(long n) { return (20 + n * 8) * kWorkers; }
inline long nms_begin_cycles(long keep) { return (500 + keep * 2) * kWorkers; }
inline long nms_resolve_cycles() { return (100 + 64 * 16) * kWorkers; }
inline long nms_suppress_cycles(long n) { return (40 + n * 10) * kWorkers; }
inline long nms_emit_cycles(long n) { return shared_cycles(n, 40); }

// Setting up the samples of one bin.
inline long roi_align_sample_cycles(long ratio) { return 60 + ratio * ratio * 40; }

// items: bins of all RoIs of the cell; channels: of the cell.
inline long roi_align_forward_cycles(long items, long channels, long ratio) {
  return shared_cycles(items, roi_align_sample_cycles(ratio) + channels * (ratio * ratio * 9 + 3));
}

// Each worker owns channels, and sets up every sample for itself.
inline long roi_align_backward_cycles(long items, long channels, long ratio, long pixels) {
  const long own = ceil_div(channels, kWorkers);
  return (items * (roi_align_sample_cycles(ratio) + own * ratio * ratio * 16) + pixels * own) * kWorkers;
}

inline long roi_align_sum_cycles(long values, long parts) { return shared_cycles(values, 3 * parts + 3); }

}  // namespace popdet
