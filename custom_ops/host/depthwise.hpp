// Depthwise 3x3 convolution with the clips on both sides of it, channels-last, forward and backward:
//   y = clip(conv(clip(x)) + bias), padding 1, stride 1 or 2, one filter a channel.
//
// Bounded by memory, so that each tensor is read or written once: a clip costs nothing here, and as its gradient is 1
// strictly between the bounds (and 0 on them), the backward pass needs no more than x and y. Work is cut into bands of
// rows by the shape alone, and sums are taken in one order within and across bands: the number of threads does not show.
//
// Innermost is a vector of channels at up to four pixels side by side: they share what they read, and their sums are in
// registers. The last channels, too few for a vector, go through the same code with V = T.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "parallel.hpp"

namespace popdet {

constexpr int kTaps = 9, kSide = 3, kSums = kTaps + 1;  // kSums: gradients a channel, the bias last
constexpr long kLine = 64;               // bytes: blocks of channels are whole cache lines of an aligned tensor
constexpr long kBlockBytes = 4096;       // of one pixel: long runs of memory are read faster than short ones
constexpr long kRingBytes = 256 * 1024;  // three rows of a block, in the level 2 cache
constexpr long kBandBytes = 512 * 1024;  // forward: input of a band, which reads one row more on each side
constexpr long kBandRows = 16;           // backward: at most so many; a band masks one row more on each side
constexpr long kTasks = 64;              // backward: at least so many where there are as many bands, less than twice
#ifdef __AVX__
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};

template <typename V, typename T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof value);  // needs no alignment
  return value;
}

template <typename V, typename T>
inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

// Asks for what is soon needed: `bytes` from p + offset on, which need not be there. A row is too far from the next for
// the processor to guess; this takes a third off maps that do not fit its caches.
template <long bytes, typename T>
inline void read_ahead(const T* p, long offset) {
  const auto address = reinterpret_cast<std::uintptr_t>(p) + offset * sizeof(T);
#pragma GCC unroll 8
  for (long b = 0; b < bytes; b += kLine) __builtin_prefetch(reinterpret_cast<const void*>(address + b));
}

template <typename T>
struct Bounds {
  T low, high;

  template <typename V>
  V clip(V value) const {  // in two steps, each of which is one instruction; NaN stays
    const V least = low - V{}, most = high - V{};
    const V raised = value < least ? least : value;
    return raised > most ? most : raised;
  }

  // `gradient` where value is strictly between the bounds, else 0.
  template <typename V>
  V pass(V value, V gradient) const {
    const V least = low - V{}, most = high - V{};
    return (value > least) & (value < most) ? gradient : V{};
  }
};

template <typename T>
struct Depthwise {
  long batch, height, width, channels, stride;
  Bounds<T> before, after;

  long out_height() const { return (height - 1) / stride + 1; }
  long out_width() const { return (width - 1) / stride + 1; }
};

inline long ceil_divide(long a, long b) { return (a + b - 1) / b; }

// use(V(), c): V is a vector of channels c, c + 1, .., or T for each of the last ones.
template <typename T, typename Use>
inline void for_each_vector(long channels, Use use) {
  using V = typename VectorOf<T>::type;
  constexpr long lanes = sizeof(V) / sizeof(T);
  long c = 0;
  for (; c + lanes <= channels; c += lanes) use(V(), c);
  for (; c < channels; ++c) use(T(), c);
}

// Filters and sums, n a channel, are packed: vector after vector (then channel after channel, of the last ones), and in
// each the first of every channel, the second of every channel and so on. What begins with channel c begins at n * c.
// Here: where number i of channel c is.
template <typename T>
inline long packed_at(long channels, long n, long c, long i) {
  constexpr long lanes = sizeof(typename VectorOf<T>::type) / sizeof(T);
  return c < channels / lanes * lanes ? c / lanes * lanes * n + i * lanes + c % lanes : c * n + i;
}

// filters [channels, 3, 3], packed
template <typename T>
std::vector<T> packed_filters(const T* filters, long channels) {
  std::vector<T> result(kTaps * channels);
  for (long c = 0; c < channels; ++c)
    for (long tap = 0; tap < kTaps; ++tap) result[packed_at<T>(channels, kTaps, c, tap)] = filters[c * kTaps + tap];
  return result;
}

// use(count, column) from left to right, for count pixels at once; count::value is known to the compiler.
template <typename Use>
inline void for_each_group(long columns, Use use) {
  long column = 0;
  for (; column + 4 <= columns; column += 4) use(std::integral_constant<int, 4>(), column);
  if (columns - column == 3) use(std::integral_constant<int, 3>(), column);
  if (columns - column == 2) use(std::integral_constant<int, 2>(), column);
  if (columns - column == 1) use(std::integral_constant<int, 1>(), column);
}

// use(first, count) for blocks of channels; three rows of one are at most kRingBytes, unless it is but a line wide.
template <typename T, typename Use>
inline void for_each_block(const Depthwise<T>& d, Use use) {
  const long bytes = std::max(std::min(kBlockBytes, kRingBytes / (kSide * d.width)), kLine);
  const long widest = bytes / kLine * kLine / sizeof(T);
  for (long first = 0; first < d.channels; first += widest) use(first, std::min(widest, d.channels - first));
}

// What output pixels side by side read: rows first_row .. last_row - 1 of their window and all of its columns, but for
// the first or last one where that is padding.
struct Window {
  long start;  // offset of its top left in the image; negative where that is padding
  long first_row, last_row;
  bool skip_left, skip_right;
};

// N output pixels, `channels` from the pointers on. Not inline: or GCC keeps addresses where the sums should be.
template <int S, int N, typename T>
__attribute__((noinline)) void forward_pixels(const Depthwise<T>& d, Window w, long channels, const T* x, const T* filters,
                                              const T* bias, T* y) {
  constexpr int columns = S * (N - 1) + kSide;
  const long step = d.channels, row_step = d.width * step;
  const Bounds<T> before = d.before, after = d.after;
  for_each_vector<T>(channels, [=](auto vector, long c) {
    using V = decltype(vector);
    constexpr long lanes = sizeof(V) / sizeof(T);
    V sum[N];
    for (int i = kSide; i < kSide + S; ++i) read_ahead<S * N * sizeof(V)>(x, w.start + step + i * row_step + S * N * c);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[n] = load<V>(bias + c);
    for (long i = w.first_row; i < w.last_row; ++i) {
      const T* filter = filters + kTaps * c + i * kSide * lanes;
      const V taps[kSide] = {load<V>(filter), load<V>(filter + lanes), load<V>(filter + 2 * lanes)};
      const T* from = x + (w.start + i * row_step + c);
#pragma GCC unroll 9
      for (int k = 0; k < columns; ++k) {
        if ((k == 0 && w.skip_left) || (k == columns - 1 && w.skip_right)) continue;
        const V value = before.clip(load<V>(from + k * step));
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
          if (k - S * n >= 0 && k - S * n < kSide) sum[n] += value * taps[k - S * n];
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(y + n * step + c, after.clip(sum[n]));
  });
}

// Output rows first .. last - 1 of the image at x and y.
template <int S, typename T>
void forward_band(const Depthwise<T>& d, long first, long last, const T* x, const T* filters, const T* bias, T* y) {
  const long columns = d.out_width();
  for_each_block(d, [&](long c, long channels) {
    for (long row = first; row < last; ++row) {
      for_each_group(columns, [&](auto count, long column) {
        constexpr int N = decltype(count)::value;
        const long top = row * S - 1, left = column * S - 1;
        const Window window = {(top * d.width + left) * d.channels + c, top < 0, std::min<long>(kSide, d.height - top),
                               left < 0, left + S * (N - 1) + kSide > d.width};
        forward_pixels<S, N>(d, window, channels, x, filters + kTaps * c, bias + c,
                             y + (row * columns + column) * d.channels + c);
      });
    }
  });
}

// x [batch, height, width, channels], filters [channels, 3, 3], bias [channels] ->
// y [batch, out_height, out_width, channels]
template <typename T>
void depthwise_forward(const Depthwise<T>& d, const T* x, const T* filters, const T* bias, int threads, T* y) {
  const std::vector<T> packed = packed_filters(filters, d.channels);
  const long rows = d.out_height(), row_bytes = d.stride * d.width * d.channels * sizeof(T);
  const long bands = ceil_divide(rows, std::max(kBandBytes / row_bytes, 1L));
  const auto band = d.stride == 1 ? forward_band<1, T> : forward_band<2, T>;
  parallel_for(d.batch * bands, threads, [&](long task) {
    const long image = task / bands, b = task % bands;
    band(d, rows * b / bands, rows * (b + 1) / bands, x + image * d.height * d.width * d.channels, packed.data(), bias,
         y + image * rows * d.out_width() * d.channels);
  });
}

// Which output rows read the input pixels in hand, each with which row of the filter, and which columns there.
struct Readers {
  int count;
  long tap_row[kSide];
  long start[kSide];           // offset of the first of the output columns in the ring; with skip_left, one before the row
  bool skip_left, skip_right;  // the first, the last of the output columns is not there
};

// N input pixels, `channels` from the pointers on; ring: masked output rows, a pixel has `channels` there.
template <int S, int N, typename T>
__attribute__((noinline)) void backward_pixels(const Depthwise<T>& d, const Readers& readers, long channels, const T* ring,
                                               const T* x, const T* filters, T* grad_x, T* sums) {
  constexpr int columns = S == 1 ? N + 2 : N / 2 + 1;  // of the output
  const long step = d.channels, row_step = d.width * step;
  const bool skip_left = readers.skip_left, skip_right = readers.skip_right;
  const int count = readers.count;
  const Bounds<T> before = d.before;
  for_each_vector<T>(channels, [=, &readers](auto vector, long c) {
    using V = decltype(vector);
    constexpr long lanes = sizeof(V) / sizeof(T);
    V value[N], sum[N];
    read_ahead<N * sizeof(V)>(x, row_step + N * c);
    read_ahead<N * sizeof(V)>(grad_x, row_step + N * c);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      value[n] = before.clip(load<V>(x + n * step + c));
      sum[n] = V{};
    }
    for (int i = 0; i < count; ++i) {
      const long first_tap = readers.tap_row[i] * kSide * lanes;
      const T* filter = filters + kTaps * c + first_tap;
      T* tap_sums = sums + kSums * c + first_tap;
      V taps[kSide], added[kSide];
#pragma GCC unroll 3
      for (int j = 0; j < kSide; ++j) {
        taps[j] = load<V>(filter + j * lanes);
        added[j] = load<V>(tap_sums + j * lanes);
      }
      const T* from = ring + (readers.start[i] + c);
#pragma GCC unroll 6
      for (int k = 0; k < columns; ++k) {
        if ((k == 0 && skip_left) || (k == columns - 1 && skip_right)) continue;
        const V gradient = load<V>(from + k * channels);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          // Output column o reads input column S * o + j - 1 with tap j; k = 0 is `left` in backward_block.
          const int j = n + 1 - (S == 1 ? k - 1 : S * k);
          if (j < 0 || j >= kSide) continue;
          sum[n] += gradient * taps[j];
          added[j] += gradient * value[n];
        }
      }
#pragma GCC unroll 3
      for (int j = 0; j < kSide; ++j) store(tap_sums + j * lanes, added[j]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(grad_x + n * step + c, before.pass(load<V>(x + n * step + c), sum[n]));
  });
}

// One output row of gradients that pass the clip -> masked [out_width, channels]; added to sums, where not null.
template <typename T>
void mask_row(const Depthwise<T>& d, long channels, const T* grad, const T* y, T* masked, T* sums) {
  const Bounds<T> after = d.after;
  for (long column = 0; column < d.out_width(); ++column) {
    for_each_vector<T>(channels, [=](auto vector, long c) {
      using V = decltype(vector);
      const V value = after.pass(load<V>(y + c), load<V>(grad + c));
      store(masked + c, value);
      if (sums == nullptr) return;
      T* bias_sum = sums + kSums * c + kTaps * sizeof(V) / sizeof(T);
      store(bias_sum, load<V>(bias_sum) + value);
    });
    grad += d.channels;
    y += d.channels;
    masked += channels;
  }
}

// Input rows first .. last - 1 of one image, `channels` from the pointers on. Adds to sums, packed: nine taps and the
// bias. ring: scratch [3, out_width, channels].
template <int S, typename T>
void backward_block(const Depthwise<T>& d, long first, long last, long channels, const T* grad, const T* y, const T* x,
                    const T* filters, T* grad_x, T* sums, T* ring) {
  const long rows = d.out_height(), columns = d.out_width();
  const auto in_ring = [&](long row) { return row % kSide * columns * channels; };
  long next = std::max(0L, ceil_divide(first - 1, S));  // output row to mask
  for (long row = first; row < last; ++row) {
    for (; next < rows && next * S <= row + 1; ++next) {
      const long at = next * columns * d.channels;
      const bool counts = next * S >= first && next * S < last;  // each output row in one band
      mask_row(d, channels, grad + at, y + at, ring + in_ring(next), counts ? sums : nullptr);
    }
    for_each_group(d.width, [&](auto count, long column) {
      constexpr int N = decltype(count)::value;
      const long left = S == 1 ? column - 1 : column / S, right = (column + N) / S;
      Readers readers;
      readers.count = 0;
      readers.skip_left = left < 0;
      readers.skip_right = right >= columns;
      for (long i = 0; i < kSide; ++i) {
        const long below = row + 1 - i;  // S * the output row that reads this row with row i of the filter
        if (below < 0 || below % S != 0 || below / S >= rows) continue;
        readers.start[readers.count] = in_ring(below / S) + left * channels;
        readers.tap_row[readers.count++] = i;
      }
      const long at = (row * d.width + column) * d.channels;
      backward_pixels<S, N>(d, readers, channels, ring, x + at, filters, grad_x + at, sums);
    });
  }
}

// grad and y [batch, out_height, out_width, channels], x as forward -> grad_x like x, grad_filters [channels, 3, 3],
// grad_bias [channels].
template <typename T>
void depthwise_backward(const Depthwise<T>& d, const T* grad, const T* y, const T* x, const T* filters, int threads,
                        T* grad_x, T* grad_filters, T* grad_bias) {
  const std::vector<T> packed = packed_filters(filters, d.channels);
  const long pixels = d.height * d.width, out_pixels = d.out_height() * d.out_width(), sums_size = kSums * d.channels;
  const long bands = ceil_divide(d.height, kBandRows), all_bands = d.batch * bands;
  const long together = std::max(1L, all_bands / kTasks), tasks = ceil_divide(all_bands, together);
  const auto block = d.stride == 1 ? backward_block<1, T> : backward_block<2, T>;
  std::vector<T> sums(std::max(tasks, 1L) * sums_size);
  parallel_for(tasks, threads, [&](long task) {
    std::vector<T> ring;
    for (long i = task * together; i < std::min((task + 1) * together, all_bands); ++i) {
      const long image = i / bands, band = i % bands;
      for_each_block(d, [&](long c, long channels) {
        ring.resize(std::max<size_t>(ring.size(), kSide * d.out_width() * channels));
        const long at = image * pixels * d.channels + c, out_at = image * out_pixels * d.channels + c;
        block(d, d.height * band / bands, d.height * (band + 1) / bands, channels, grad + out_at, y + out_at, x + at,
              packed.data() + kTaps * c, grad_x + at, sums.data() + task * sums_size + kSums * c, ring.data());
      });
    }
  });
  for (long task = 1; task < tasks; ++task)
    for (long i = 0; i < sums_size; ++i) sums[i] += sums[task * sums_size + i];
  for (long c = 0; c < d.channels; ++c) {
    const auto sum = [&](long i) { return sums[packed_at<T>(d.channels, kSums, c, i)]; };
    for (long tap = 0; tap < kTaps; ++tap) grad_filters[c * kTaps + tap] = sum(tap);
    grad_bias[c] = sum(kTaps);
  }
}

}  // namespace popdet
