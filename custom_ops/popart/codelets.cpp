// The vertices of NMS, RoI-Align and box decoding. All arithmetic is in ../kernels; here is who does which part of it.
//
// A MultiVertex runs on the six workers of a tile at once, with no order among them: each writes words of 32 bits that no
// other worker writes. That matters for half, two of which share a word. Results do not depend on the workers.
#include <cmath>

#include <poplar/HalfFloat.hpp>
#include <poplar/Vertex.hpp>

#include "../kernels/box_decode.hpp"
#include "../kernels/nms_blocks.hpp"
#include "../kernels/roi_align.hpp"

#pragma STDC FP_CONTRACT OFF  // round after every operation, as the host library does

using namespace poplar;

namespace popdet {

// half is stored, float is computed with.
template <>
struct Scalar<half> {
  using Compute = float;
  static float load(half value) { return static_cast<float>(value); }
  static half store(float value) { return static_cast<half>(value); }
};

template <typename T>
using Row = Vector<T, VectorLayout::SPAN, 8>;  // aligned to 8 bytes, as one box of half is

// NMS ----------------------------------------------------------------------------------------------------------------

// scores [n], boxes [n, 4] -> keys [n].
template <typename S, typename B>
class NmsKeys : public MultiVertex {
 public:
  Input<Row<S>> scores;
  Input<Row<B>> boxes;
  Output<Row<float>> keys;
  float scoreThreshold;

  void compute(unsigned worker) {
    for (unsigned i = worker; i < keys.size(); i += numWorkers())
      keys[i] = nms_key(scores[i], &boxes[4 * i], scoreThreshold);
  }
};
template class NmsKeys<float, float>;
template class NmsKeys<float, half>;
template class NmsKeys<half, float>;
template class NmsKeys<half, half>;

// Adds to ranks [n], of the rows with these keys, the rows before them in one chunk: rows chunkBegin and on. The chunks
// come in order. A row whose key is not above the threshold gets rank -1.
class NmsRank : public MultiVertex {
 public:
  Input<Row<float>> keys;
  Input<Row<float>> chunk;
  InOut<Row<int>> ranks;
  float scoreThreshold;
  int firstRow, chunkBegin;

  void compute(unsigned worker) {
    for (unsigned i = worker; i < ranks.size(); i += numWorkers()) {
      const int before = nms_rank(&chunk[0], chunkBegin, chunk.size(), firstRow + i, keys[i]);
      if (!(keys[i] > scoreThreshold))
        ranks[i] = -1;
      else
        ranks[i] = chunkBegin == 0 ? before : ranks[i] + before;
    }
  }
};

// Takes the rows that rank in firstSlot .. firstSlot + n - 1 out of one chunk: order [n], row numbers, -1 in a slot that
// no row takes, and sorted [n, 4], their boxes, 0 in such a slot. The chunks come in order.
template <typename T>
class NmsPlace : public MultiVertex {
 public:
  Input<Row<int>> ranks;
  Input<Row<T>> boxes;
  InOut<Row<int>> order;
  InOut<Row<T>> sorted;
  int firstSlot, chunkBegin;

  void compute(unsigned worker) {
    for (unsigned i = worker; i < order.size(); i += numWorkers()) {
      if (chunkBegin == 0) {
        order[i] = -1;
        for (unsigned j = 0; j < 4; ++j) sorted[4 * i + j] = Scalar<T>::store(0.0f);
      }
      const int at = nms_find_rank(&ranks[0], ranks.size(), firstSlot + i);
      if (at < 0) continue;
      order[i] = chunkBegin + at;
      for (unsigned j = 0; j < 4; ++j) sorted[4 * i + j] = boxes[4 * at + j];
    }
  }
};
template class NmsPlace<float>;
template class NmsPlace<half>;

// The overlap bits of the slots of one tile with one chunk of the sorted table: bits [n, words], of which the words of the
// chunk are written; diagonal [n, 2], the words of a slot's own block of 64.
template <typename T>
class NmsOverlap : public MultiVertex {
 public:
  Input<Row<T>> chunk;
  Input<Row<T>> sorted;
  InOut<Row<unsigned>> bits;
  InOut<Row<unsigned>> diagonal;
  float iouThreshold;
  int firstSlot, chunkBegin;

  void compute(unsigned worker) {
    const int rows = chunk.size() / 4, columns = sorted.size() / 4, words = bits.size() / columns;
    const int chunkWords = (rows + kWordBits - 1) / kWordBits, firstWord = chunkBegin / kWordBits;
    for (int w = worker; w < chunkWords; w += numWorkers()) {
      const int begin = w * kWordBits, word = firstWord + w;
      nms_overlap_word(&chunk[4 * begin], chunkBegin + begin, smaller(rows - begin, kWordBits), &sorted[0], firstSlot,
                       columns, iouThreshold, &bits[word], words);
      for (int c = 0; c < columns; ++c) {
        const int ofBlock = word - (firstSlot + c) / kNmsBlock * kBlockWords;
        if (0 <= ofBlock && ofBlock < kBlockWords) diagonal[c * kBlockWords + ofBlock] = bits[c * words + word];
      }
    }
  }
};
template class NmsOverlap<float>;
template class NmsOverlap<half>;

// flags: one bit for each slot of a tile, set where order [n] has no row.
class NmsFlags : public Vertex {
 public:
  Input<Row<int>> order;
  Output<Row<unsigned>> flags;

  void compute() {
    for (unsigned w = 0; w < flags.size(); ++w) flags[w] = 0u;
    for (unsigned i = 0; i < order.size(); ++i)
      if (order[i] < 0) flags[i / kWordBits] |= 1u << (i % kWordBits);
  }
};

// On the resolving tile, before the first block: state [3] (see NmsState), keep [K] all -1.
class NmsBegin : public Vertex {
 public:
  Input<Row<unsigned>> flags;  // of all tiles, `flagWords` each
  Output<Row<int>> state;
  Output<Row<int>> keep;
  int columns, flagWords, slots;

  void compute() {
    state[0] = 0;
    state[1] = 0;
    state[2] = nms_count_live(&flags[0], columns, flagWords, slots);
    for (unsigned i = 0; i < keep.size(); ++i) keep[i] = -1;
  }
};

// On the resolving tile: one block of 64 slots. keep [K] takes the slots that are kept, mask [3] says which of this block
// they are, more whether another block is needed.
class NmsResolve : public Vertex {
 public:
  Input<Row<unsigned>> flags;
  Input<Row<unsigned>> diagonal;  // [slots, 2]
  InOut<Row<int>> state;
  InOut<Row<int>> keep;
  Output<Row<unsigned>> mask;
  Output<bool> more;
  int columns, flagWords;

  void compute() {
    NmsState now = {state[0], state[1], state[2]};
    const unsigned* ofBlock = &diagonal[now.live > 0 ? now.block * kNmsBlock * kBlockWords : 0];
    *more = nms_resolve_block(&flags[0], columns, flagWords, ofBlock, keep.size(), now, &keep[0], &mask[0]);
    state[0] = now.block;
    state[1] = now.kept;
  }
};

// Flags the slots of one tile that a slot kept just now suppresses. bits [n, words], mask as NmsResolve writes it.
class NmsSuppress : public Vertex {
 public:
  Input<Row<unsigned>> bits;
  Input<Row<unsigned>> mask;
  InOut<Row<unsigned>> flags;
  int columns;

  void compute() {
    const int words = bits.size() / columns;
    for (int c = 0; c < columns; ++c)
      if (nms_is_suppressed(&bits[c * words], &mask[0])) flags[c / kWordBits] |= 1u << (c % kWordBits);
  }
};

// The rows of the result that one tile holds: slots [n], of which those in one chunk of the sorted table, slots chunkBegin
// and on, are turned into rows [n] and boxes [n, 4]. A slot of -1 gives row -1 and a box of 0. The chunks come in order.
template <typename T>
class NmsEmit : public MultiVertex {
 public:
  Input<Row<int>> slots;
  Input<Row<int>> order;   // of the chunk
  Input<Row<T>> sorted;    // of the chunk, [order.size(), 4]
  InOut<Row<int>> rows;
  InOut<Row<T>> boxes;
  int chunkBegin;

  void compute(unsigned worker) {
    for (unsigned i = worker; i < slots.size(); i += numWorkers()) {
      if (chunkBegin == 0) {
        rows[i] = -1;
        for (unsigned j = 0; j < 4; ++j) boxes[4 * i + j] = Scalar<T>::store(0.0f);
      }
      const int at = slots[i] - chunkBegin;  // negative for a slot of -1, too
      if (at < 0 || at >= static_cast<int>(order.size())) continue;
      rows[i] = order[at];
      for (unsigned j = 0; j < 4; ++j) boxes[4 * i + j] = sorted[4 * at + j];
    }
  }
};
template class NmsEmit<float>;
template class NmsEmit<half>;

// RoI-Align ----------------------------------------------------------------------------------------------------------

// What both directions are told, and the samples of bin after bin. A vertex copies its fields here.
template <typename R>
struct BinSampler {
  const R* rois;
  unsigned columns, height, width, outHeight, outWidth, ratio;
  float scale;
  AxisSample<float>* axes;             // scratch: y [ratio], x [ratio]
  BilinearSample<float, int>* samples;  // scratch: [ratio * ratio]
  AxisGrid<float> y, x;
  unsigned roi, row, column;

  void take_roi() {
    float edges[4];
    for (unsigned i = 0; i < 4; ++i) edges[i] = Scalar<R>::load(rois[roi * columns + i]);
    y = axis_grid<float>(edges[1], edges[3], scale, outHeight, ratio, height);
    x = axis_grid<float>(edges[0], edges[2], scale, outWidth, ratio, width);
    take_row();
  }

  void take_row() {
    for (unsigned s = 0; s < ratio; ++s) axes[s] = y.at(row, s);
  }

  // Begins at bin `item` of [rois, outHeight, outWidth].
  void seek(unsigned item) {
    roi = item / (outHeight * outWidth);
    row = item / outWidth % outHeight;
    column = item % outWidth;
    take_roi();
  }

  // The samples of this bin; returns how many lie inside.
  long sample() {
    for (unsigned s = 0; s < ratio; ++s) axes[ratio + s] = x.at(column, s);
    return bin_samples<float, int>(axes, axes + ratio, ratio, width, samples);
  }

  // To the next bin; `more` says that there is one.
  void advance(bool more) {
    if (++column < outWidth || !more) return;
    column = 0;
    if (++row < outHeight) return take_row();
    row = 0;
    ++roi;
    take_roi();
  }
};

// The sampler of a vertex, whose fields both directions name alike. `scratch` is what one worker may use.
template <typename R, typename V>
inline BinSampler<R> make_sampler(const V& vertex, unsigned* scratch) {
  BinSampler<R> result;
  result.rois = &vertex.rois[0];
  result.columns = vertex.columns;
  result.height = vertex.height;
  result.width = vertex.width;
  result.outHeight = vertex.outHeight;
  result.outWidth = vertex.outWidth;
  result.ratio = vertex.ratio;
  result.scale = vertex.scale;
  result.axes = reinterpret_cast<AxisSample<float>*>(scratch);
  result.samples = reinterpret_cast<BilinearSample<float, int>*>(result.axes + 2 * vertex.ratio);
  return result;
}
static_assert(sizeof(AxisSample<float>) == 16 && sizeof(BilinearSample<float, int>) == 32, "as tile_plan.hpp counts");

// features [height * width, channels], rois -> aligned [n, outHeight * outWidth, channels].
template <typename T, typename R>
class RoiAlignForward : public MultiVertex {
 public:
  Input<Row<T>> features;
  Output<Row<T>> aligned;
  Input<Row<R>> rois;  // [n, columns]
  InOut<Row<unsigned>> scratch;  // a part for each worker
  float scale;
  unsigned columns, channels, height, width, outHeight, outWidth, ratio;

  void compute(unsigned worker) {
    // Bins go to workers in pairs: a pair of rows of half fills whole words, whatever the number of channels.
    const unsigned items = aligned.size() / channels, pairs = (items + 1) / 2;
    const unsigned begin = 2 * (pairs * worker / numWorkers());
    const unsigned end = smaller(2 * (pairs * (worker + 1) / numWorkers()), items);
    if (begin >= end) return;
    BinSampler<R> bins = make_sampler<R>(*this, &scratch[worker * (scratch.size() / numWorkers())]);
    bins.seek(begin);
    for (unsigned item = begin; item < end; ++item) {
      const long count = bins.sample();
      roi_align_bin_forward<T>(bins.samples, count, ratio * ratio, &features[0], channels,
                               channels, &aligned[item * channels]);
      bins.advance(item + 1 < end);
    }
  }
};
template class RoiAlignForward<float, float>;
template class RoiAlignForward<float, half>;
template class RoiAlignForward<half, float>;
template class RoiAlignForward<half, half>;

// grad [n, outHeight * outWidth, channels], rois -> sums float [height * width, channels]. Each worker owns channels.
template <typename T, typename R>
class RoiAlignBackward : public MultiVertex {
 public:
  Input<Row<T>> grad;
  Output<Row<float>> sums;
  Input<Row<R>> rois;  // [n, columns]
  InOut<Row<unsigned>> scratch;  // a part for each worker
  float scale;
  unsigned columns, channels, height, width, outHeight, outWidth, ratio;

  void compute(unsigned worker) {
    const unsigned first = channels * worker / numWorkers();
    const unsigned own = channels * (worker + 1) / numWorkers() - first;
    if (own == 0) return;
    for (unsigned pixel = 0; pixel < sums.size() / channels; ++pixel)
      for (unsigned c = 0; c < own; ++c) sums[pixel * channels + first + c] = 0.0f;
    const unsigned items = grad.size() / channels;
    BinSampler<R> bins = make_sampler<R>(*this, &scratch[worker * (scratch.size() / numWorkers())]);
    bins.seek(0);
    for (unsigned item = 0; item < items; ++item) {
      const long count = bins.sample();
      roi_align_bin_backward<T>(bins.samples, count, ratio * ratio, &grad[item * channels + first], channels,
                                own, &sums[first]);
      bins.advance(item + 1 < items);
    }
  }
};
template class RoiAlignBackward<float, float>;
template class RoiAlignBackward<float, half>;
template class RoiAlignBackward<half, float>;
template class RoiAlignBackward<half, half>;

// sums [parts, n], float -> grad [n]: added in the order of the parts, rounded once.
template <typename T>
class RoiAlignSum : public MultiVertex {
 public:
  Input<Row<float>> sums;
  Output<Row<T>> grad;

  void compute(unsigned worker) {
    const unsigned size = grad.size(), parts = sums.size() / size;
    for (unsigned pair = worker; 2 * pair < size; pair += numWorkers()) {
      for (unsigned i = 2 * pair; i < smaller(2 * pair + 2, size); ++i) {
        float sum = sums[i];
        for (unsigned part = 1; part < parts; ++part) sum += sums[part * size + i];
        grad[i] = Scalar<T>::store(sum);
      }
    }
  }
};
template class RoiAlignSum<float>;
template class RoiAlignSum<half>;

// Boxes --------------------------------------------------------------------------------------------------------------

// anchors [n, 4], deltas [n, 4] -> boxes [n, 4]; stds as BoxCode has them; height and width of the image in pixels.
template <typename T>
class BoxDecode : public MultiVertex {
 public:
  Input<Row<T>> anchors;
  Input<Row<T>> deltas;
  Output<Row<T>> boxes;
  float stdX, stdY, stdWidth, stdHeight, height, width;

  void compute(unsigned worker) {
    const BoxCode<float> code = {{stdX, stdY, stdWidth, stdHeight}, height, width};
    const auto exponential = [](float value) { return std::exp(value); };
    for (unsigned i = worker; i < boxes.size() / 4; i += numWorkers())
      box_decode(&anchors[4 * i], &deltas[4 * i], code, exponential, &boxes[4 * i]);
  }
};
template class BoxDecode<float>;
template class BoxDecode<half>;

}  // namespace popdet
