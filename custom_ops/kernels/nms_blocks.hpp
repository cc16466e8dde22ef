// Greedy non-maximum suppression cut into steps that many tiles can share; the result is that of nms_greedy, row by row.
//
//   key      every row: its score, or the score threshold if the row is absent
//   rank     every row: how many rows come before it, by falling key and rising index; absent rows get no rank
//   place    every slot of the sorted table: the row that has this rank, and its box
//   overlap  every slot c: one bit for each slot r < c, set where IoU(r, c) is above the threshold
//   resolve  64 slots at a time, in one place: which of them are kept, given which are suppressed already
//   suppress every slot: suppressed, if one of those 64 is kept and overlaps it
//
// Bit masks over slots instead of a list of kept boxes: the overlaps, nearly all of the work, need no order, and the part
// that does need one touches two words a slot. The idea is that of the well-known CUDA implementations of NMS.
#pragma once

#include "nms.hpp"

namespace popdet {

constexpr int kWordBits = 32;
constexpr int kNmsBlock = 64;  // slots that resolve takes at once
constexpr int kBlockWords = kNmsBlock / kWordBits;

// The key of a row. An absent row gets the threshold itself, below every row that is present.
template <typename S, typename B>
inline float nms_key(S score, const B* box, float score_threshold) {
  const float corners[4] = {static_cast<float>(Scalar<B>::load(box[0])), static_cast<float>(Scalar<B>::load(box[1])),
                            static_cast<float>(Scalar<B>::load(box[2])), static_cast<float>(Scalar<B>::load(box[3]))};
  const float value = static_cast<float>(Scalar<S>::load(score));
  return nms_row_is_live(value, corners, score_threshold) ? value : score_threshold;
}

// How many of the rows begin .. begin + count - 1, whose keys these are, come before `row`, whose key is `key`.
inline int nms_rank(const float* keys, int begin, int count, int row, float key) {
  int before = 0;
  const int lower = smaller(larger(row - begin, 0), count);  // the rows of lower index: on equal keys they come first
  for (int i = 0; i < lower; ++i) before += keys[i] >= key;
  for (int i = lower; i < count; ++i) before += keys[i] > key;
  return before;
}

// The position among ranks [count] of the row that has rank `slot`, or -1.
inline int nms_find_rank(const int* ranks, int count, int slot) {
  for (int i = 0; i < count; ++i)
    if (ranks[i] == slot) return i;
  return -1;
}

// One word of the overlap bits of several slots. Bit i of out[c * stride] says that slot `row_slot + i` comes before slot
// `column_slot + c` and overlaps it.
//   rows [count, 4], count <= 32      columns [column_count, 4]
template <typename T>
inline void nms_overlap_word(const T* rows, int row_slot, int count, const T* columns, int column_slot,
                             int column_count, float iou_threshold, unsigned* out, int stride) {
  constexpr int strip = 8;  // columns whose boxes are put in order once for all rows
  for (int begin = 0; begin < column_count; begin += strip) {
    const int end = smaller(begin + strip, column_count);
    OrderedBox<float> ordered[strip];
    for (int c = begin; c < end; ++c) {
      ordered[c - begin] = ordered_box(columns + 4 * c);
      out[c * stride] = 0u;
    }
    for (int i = 0; i < count; ++i) {
      const OrderedBox<float> row = ordered_box(rows + 4 * i);
      // Columns at or below this row are not asked: a slot is suppressed only by a slot before it.
      for (int c = larger(row_slot + i + 1 - column_slot, begin); c < end; ++c)
        if (nms_overlaps(row, ordered[c - begin], iou_threshold)) out[c * stride] |= 1u << i;
    }
  }
}

// Where the resolving tile stands. `live` is how many slots hold a row.
struct NmsState {
  int block, kept, live;
};

// Flags of slots, one after another. Slot s is column s % columns of tile s / columns, and its flag is a bit of that
// tile's `words` words.
struct FlagReader {
  const unsigned* flags;
  int columns, words, tile, column;

  FlagReader(const unsigned* all, int columns_a_tile, int words_a_tile, int slot)
      : flags(all), columns(columns_a_tile), words(words_a_tile), tile(slot / columns_a_tile),
        column(slot - tile * columns_a_tile) {}

  unsigned next() {
    const unsigned flag = (flags[tile * words + column / kWordBits] >> (column % kWordBits)) & 1u;
    if (++column == columns) {
      column = 0;
      ++tile;
    }
    return flag;
  }
};

// How many slots are not flagged, when those flagged are all at the end.
inline int nms_count_live(const unsigned* flags, int columns, int words, int slots) {
  int low = 0, high = slots;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (FlagReader(flags, columns, words, middle).next())
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Decides the slots of block state.block, appends those kept to keep [max_keep] and advances the state.
//   diagonal  [kNmsBlock, kBlockWords]: the overlap bits of these slots with each other
//   mask      [1 + kBlockWords]: the block's number, then a bit for each slot of it that was kept
// Returns whether another block is needed.
inline bool nms_resolve_block(const unsigned* flags, int columns, int words, const unsigned* diagonal, int max_keep,
                              NmsState& state, int* keep, unsigned* mask) {
  const int first = state.block * kNmsBlock;
  mask[0] = static_cast<unsigned>(state.block);
  for (int w = 0; w < kBlockWords; ++w) mask[1 + w] = 0u;
  const int count = smaller(state.live - first, kNmsBlock);
  FlagReader reader(flags, columns, words, first);
  for (int i = 0; i < count && state.kept < max_keep; ++i) {
    unsigned hits = reader.next();
    for (int w = 0; w < kBlockWords; ++w) hits |= diagonal[i * kBlockWords + w] & mask[1 + w];
    if (hits) continue;
    mask[1 + i / kWordBits] |= 1u << (i % kWordBits);
    keep[state.kept++] = first + i;
  }
  ++state.block;
  return state.kept < max_keep && state.block * kNmsBlock < state.live;
}

// Is a slot, whose overlap bits these are, suppressed by what `mask` (see nms_resolve_block) says was kept?
inline bool nms_is_suppressed(const unsigned* bits, const unsigned* mask) {
  const unsigned* of_block = bits + mask[0] * kBlockWords;
  unsigned hits = 0u;
  for (int w = 0; w < kBlockWords; ++w) hits |= of_block[w] & mask[1 + w];
  return hits != 0u;
}

}  // namespace popdet
