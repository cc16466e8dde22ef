// NMS and box decoding as the Opx programs them: every vertex with buffers of its own, in the order of the compute sets.
#pragma once

#include "../../../custom_ops/popart/tile_plan.hpp"
#include "tile.hpp"

namespace harness {

using popdet::NmsPlan;
using popdet::part_of;
using popdet::Range;

template <typename S, typename B>
class NmsProgram {
 public:
  NmsProgram(const NmsPlan& plan, float iou, float threshold)
      : plan_(plan), iou_(iou), threshold_(threshold), keys_(rows()), ranks_(rows()), order_(rows()), sorted_(4 * rows()),
        bits_(rows() * plan.words), diagonal_(2 * plan.blocks * popdet::kNmsBlock),
        flags_(plan.column_tiles * plan.flag_words), state_(3), slots_(plan.shape.keep), mask_(3) {}

  // scores [N], boxes [N, 4] -> keep [K], kept [K, 4].
  TileBytes run(const S* scores, const B* boxes, int* keep, B* kept) {
    find_keys(scores, boxes);
    for_each_chunk([&](Range chunk) { rank(chunk); });
    for_each_chunk([&](Range chunk) { place(chunk, boxes); });
    for_each_chunk([&](Range chunk) { overlap(chunk); });
    set_flags();
    begin();
    while (resolve()) suppress();
    for_each_chunk([&](Range chunk) { emit(chunk, keep, kept); });
    return bytes_;
  }

  const int* state() const { return state_.data(); }

 private:
  long rows() const { return plan_.shape.rows; }

  template <typename Use>
  void for_each_tile(Use use) const {
    for (long tile = 0; tile < plan_.column_tiles; ++tile) use(tile, part_of(rows(), plan_.columns, tile));
  }

  template <typename Use>
  void for_each_chunk(Use use) const {
    for (long chunk = 0; chunk < plan_.chunks; ++chunk) use(part_of(rows(), plan_.chunk, chunk));
  }

  void find_keys(const S* scores, const B* boxes) {
    for_each_tile([&](long, Range own) {
      Local<S> score(scores + own.first, own.count);
      Local<B> box(boxes + 4 * own.first, 4 * own.count);
      Local<float> keys(own.count);
      popdet::NmsKeys<S, B> vertex;
      score.connect(vertex.scores);
      box.connect(vertex.boxes);
      keys.connect(vertex.keys);
      vertex.scoreThreshold = threshold_;
      bytes_.see(score, box, keys);
      run_workers(vertex, {Words::of_output(keys)});
      keys.copy_to(&keys_[own.first]);
    });
  }

  void rank(Range chunk) {
    for_each_tile([&](long, Range own) {
      Local<float> keys(&keys_[own.first], own.count), others(&keys_[chunk.first], chunk.count);
      Local<int> ranks(&ranks_[own.first], own.count);
      popdet::NmsRank vertex;
      keys.connect(vertex.keys);
      others.connect(vertex.chunk);
      ranks.connect(vertex.ranks);
      vertex.scoreThreshold = threshold_;
      vertex.firstRow = own.first;
      vertex.chunkBegin = chunk.first;
      bytes_.see(keys, others, ranks);
      run_workers(vertex, {Words::of_in_out(ranks)});
      ranks.copy_to(&ranks_[own.first]);
    });
  }

  void place(Range chunk, const B* boxes) {
    for_each_tile([&](long, Range own) {
      Local<int> ranks(&ranks_[chunk.first], chunk.count), order(&order_[own.first], own.count);
      Local<B> box(boxes + 4 * chunk.first, 4 * chunk.count), sorted(&sorted_[4 * own.first], 4 * own.count);
      popdet::NmsPlace<B> vertex;
      ranks.connect(vertex.ranks);
      box.connect(vertex.boxes);
      order.connect(vertex.order);
      sorted.connect(vertex.sorted);
      vertex.firstSlot = own.first;
      vertex.chunkBegin = chunk.first;
      bytes_.see(ranks, order, box, sorted);
      run_workers(vertex, {Words::of_in_out(order), Words::of_in_out(sorted)});
      order.copy_to(&order_[own.first]);
      sorted.copy_to(&sorted_[4 * own.first]);
    });
  }

  void overlap(Range chunk) {
    for_each_tile([&](long, Range own) {
      Local<B> others(&sorted_[4 * chunk.first], 4 * chunk.count), sorted(&sorted_[4 * own.first], 4 * own.count);
      Local<unsigned> bits(&bits_[own.first * plan_.words], own.count * plan_.words);
      Local<unsigned> diagonal(&diagonal_[2 * own.first], 2 * own.count);
      popdet::NmsOverlap<B> vertex;
      others.connect(vertex.chunk);
      sorted.connect(vertex.sorted);
      bits.connect(vertex.bits);
      diagonal.connect(vertex.diagonal);
      vertex.iouThreshold = iou_;
      vertex.firstSlot = own.first;
      vertex.chunkBegin = chunk.first;
      bytes_.see(others, sorted, bits, diagonal);
      run_workers(vertex, {Words::of_in_out(bits), Words::of_in_out(diagonal)});
      bits.copy_to(&bits_[own.first * plan_.words]);
      diagonal.copy_to(&diagonal_[2 * own.first]);
    });
  }

  void set_flags() {
    for_each_tile([&](long tile, Range own) {
      Local<int> order(&order_[own.first], own.count);
      Local<unsigned> flags(plan_.flag_words);
      popdet::NmsFlags vertex;
      order.connect(vertex.order);
      flags.connect(vertex.flags);
      bytes_.see(order, flags);
      vertex.compute();
      flags.copy_to(&flags_[tile * plan_.flag_words]);
    });
  }

  void begin() {
    Local<unsigned> flags(flags_.data(), flags_.size());
    Local<int> state(3), keep(plan_.shape.keep);
    popdet::NmsBegin vertex;
    flags.connect(vertex.flags);
    state.connect(vertex.state);
    keep.connect(vertex.keep);
    vertex.columns = plan_.columns;
    vertex.flagWords = plan_.flag_words;
    vertex.slots = rows();
    bytes_.see(flags, state, keep);
    vertex.compute();
    state.copy_to(state_.data());
    keep.copy_to(slots_.data());
  }

  bool resolve() {
    Local<unsigned> flags(flags_.data(), flags_.size()), diagonal(diagonal_.data(), 2 * rows()), mask(3);
    Local<int> state(state_.data(), 3), keep(slots_.data(), plan_.shape.keep);
    bool more = false;
    popdet::NmsResolve vertex;
    flags.connect(vertex.flags);
    diagonal.connect(vertex.diagonal);
    state.connect(vertex.state);
    keep.connect(vertex.keep);
    mask.connect(vertex.mask);
    vertex.more.connect(&more);
    vertex.columns = plan_.columns;
    vertex.flagWords = plan_.flag_words;
    bytes_.see(flags, diagonal, mask, state, keep);
    vertex.compute();
    state.copy_to(state_.data());
    keep.copy_to(slots_.data());
    mask.copy_to(mask_.data());
    return more;
  }

  void suppress() {
    for_each_tile([&](long tile, Range own) {
      Local<unsigned> bits(&bits_[own.first * plan_.words], own.count * plan_.words), mask(mask_.data(), 3);
      Local<unsigned> flags(&flags_[tile * plan_.flag_words], plan_.flag_words);
      popdet::NmsSuppress vertex;
      bits.connect(vertex.bits);
      mask.connect(vertex.mask);
      flags.connect(vertex.flags);
      vertex.columns = own.count;
      bytes_.see(bits, mask, flags);
      vertex.compute();
      flags.copy_to(&flags_[tile * plan_.flag_words]);
    });
  }

  void emit(Range chunk, int* keep, B* kept) {
    for (long tile = 0; tile < plan_.output_tiles; ++tile) {
      const Range own = part_of(plan_.shape.keep, plan_.output_rows, tile);
      Local<int> slots(&slots_[own.first], own.count), order(&order_[chunk.first], chunk.count);
      Local<B> sorted(&sorted_[4 * chunk.first], 4 * chunk.count), boxes(kept + 4 * own.first, 4 * own.count);
      Local<int> rows(keep + own.first, own.count);
      popdet::NmsEmit<B> vertex;
      slots.connect(vertex.slots);
      order.connect(vertex.order);
      sorted.connect(vertex.sorted);
      rows.connect(vertex.rows);
      boxes.connect(vertex.boxes);
      vertex.chunkBegin = chunk.first;
      bytes_.see(slots, order, sorted, boxes, rows);
      run_workers(vertex, {Words::of_in_out(rows), Words::of_in_out(boxes)});
      rows.copy_to(keep + own.first);
      boxes.copy_to(kept + 4 * own.first);
    }
  }

  NmsPlan plan_;
  float iou_, threshold_;
  std::vector<float> keys_;
  std::vector<int> ranks_, order_;
  std::vector<B> sorted_;
  std::vector<unsigned> bits_, diagonal_, flags_;
  std::vector<int> state_, slots_;
  std::vector<unsigned> mask_;
  TileBytes bytes_;
};

// anchors, deltas [n, 4] -> boxes [n, 4]; settings: four stds, height, width. `tiles` share the rows evenly.
template <typename T>
void box_decode(const T* anchors, const T* deltas, long rows, const float* settings, long tiles, T* boxes) {
  const long each = popdet::ceil_div(rows, tiles);
  for (long first = 0; first < rows; first += each) {
    const long count = popdet::min_of(each, rows - first);
    Local<T> anchor(anchors + 4 * first, 4 * count), delta(deltas + 4 * first, 4 * count), box(4 * count);
    popdet::BoxDecode<T> vertex;
    anchor.connect(vertex.anchors);
    delta.connect(vertex.deltas);
    box.connect(vertex.boxes);
    vertex.stdX = settings[0];
    vertex.stdY = settings[1];
    vertex.stdWidth = settings[2];
    vertex.stdHeight = settings[3];
    vertex.height = settings[4];
    vertex.width = settings[5];
    run_workers(vertex, {Words::of_output(box)});
    box.copy_to(boxes + 4 * first);
  }
}

}  // namespace harness
