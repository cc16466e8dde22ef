// 3x3 convolutions with stride 1 and padding 1 by Winograd's minimal filtering F(4x4, 3x3), channels-last, forward and
// backward: y = clip(conv(x) + bias). With a tile's 6x6 input d, filter g and 4x4 output y:
//
//   V = B' d B     U = G g G'     M[p] = V[p] U[p] for the 36 p, over channels     y = A' M A
//
// 36 multiplications take the place of 144. Interpolation is at 0, +-3/4, +-3/2 and infinity instead of the usual 0, +-1,
// +-2, as the powers stay near 1: in float32 y and dx have about 2 times a direct sum's rounding error, dg about 6 times.
// Adjoint transforms are for gradients: dM = A dy A', dU = V' dM, dV = dM U', dx = B dV B' summed where tiles overlap.
//
// Method: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015. Points: B. Barabasz et al.,
// "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", 2018.
#pragma once

#include <memory>

#include "gemm.hpp"
#include "winograd_points.hpp"

namespace popdet {

constexpr long kTile = 4, kWindow = 6, kPoints = kWindow * kWindow;
constexpr long kTilesATask = 8;
constexpr long kTileBytes = 32 << 20;    // of V and M together; images beyond that are taken in turn
constexpr long kFilterBytes = 80 << 20;  // of U and dU together, backward; output channels beyond that are taken in turn

struct Winograd {
  long batch, height, width, inputs, outputs;  // the last two are channels

  long rows() const { return ceil_divide(height, kTile); }
  long columns() const { return ceil_divide(width, kTile); }
  long tiles() const { return batch * rows() * columns(); }
};

// Where a tile is: its first output pixel, and how much of the image its window and its output have.
struct TilePlace {
  long image, row, column;  // of the first output pixel; the window begins one above and one to the left
  long index;
};

inline TilePlace tile_place(const Winograd& s, long tile) {
  const long per_image = s.rows() * s.columns(), within = tile % per_image;
  return {tile / per_image, within / s.columns() * kTile, within % s.columns() * kTile, tile};
}

// work(place) for every tile, some a task.
template <typename Work>
void for_each_tile(const Winograd& s, int threads, Work work) {
  parallel_for(ceil_divide(s.tiles(), kTilesATask), threads, [&](long task) {
    const long end = std::min(s.tiles(), (task + 1) * kTilesATask);
    for (long tile = task * kTilesATask; tile < end; ++tile) work(tile_place(s, tile));
  });
}

// x [batch, height, width, inputs] -> v, where point p of a tile's channel c is at to(p, tile, c)
template <typename T, typename To>
void winograd_input(const Winograd& s, const T* x, int threads, T* v, To to) {
  for_each_tile(s, threads, [&](const TilePlace& place) {
    const T* image = x + place.image * s.height * s.width * s.inputs;
    for_each_vector<T>(s.inputs, [&](auto zero, long c) {
      using V = decltype(zero);
      V window[kPoints], half[kPoints], out[kWindow];
      for (long i = 0; i < kWindow; ++i)
        for (long j = 0; j < kWindow; ++j) {
          const long row = place.row + i - 1, column = place.column + j - 1;
          const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
          window[i * kWindow + j] = inside ? load<V>(image + (row * s.width + column) * s.inputs + c) : V{};
        }
      for (long j = 0; j < kWindow; ++j) Points<T>::input(window + j, kWindow, half + j, kWindow);
      for (long i = 0; i < kWindow; ++i) {
        Points<T>::input(half + i * kWindow, 1, out, 1);
        for (long j = 0; j < kWindow; ++j) store(v + to(i * kWindow + j, place.index, c), out[j]);
      }
    });
  });
}

// v [36, tiles, inputs] -> x [batch, height, width, inputs], the adjoint of winograd_input; `add` to what is there. Tiles of
// an image are summed in order, so that the number of threads does not show.
template <typename T>
void winograd_input_adjoint(const Winograd& s, const T* v, bool add, int threads, T* x) {
  const long plane = s.tiles() * s.inputs, per_image = s.rows() * s.columns(), pixels = s.height * s.width;
  constexpr long kBlock = 128;  // channels a task
  const long blocks = ceil_divide(s.inputs, kBlock);
  parallel_for(s.batch * blocks, threads, [&](long task) {
    const long number = task / blocks, first = task % blocks * kBlock, count = std::min(kBlock, s.inputs - first);
    T* image = x + number * pixels * s.inputs + first;
    for (long pixel = 0; pixel < pixels && !add; ++pixel) std::fill_n(image + pixel * s.inputs, count, T(0));
    for (long tile = number * per_image; tile < (number + 1) * per_image; ++tile) {
      const TilePlace place = tile_place(s, tile);
      const T* source = v + tile * s.inputs + first;
      for_each_vector<T>(count, [&](auto zero, long c) {
        using V = decltype(zero);
        V points[kPoints], half[kPoints], out[kWindow];
        for (long p = 0; p < kPoints; ++p) points[p] = load<V>(source + p * plane + c);
        for (long j = 0; j < kWindow; ++j) Points<T>::input_adjoint(points + j, kWindow, half + j, kWindow);
        for (long i = 0; i < kWindow; ++i) {
          const long row = place.row + i - 1;
          if (row < 0 || row >= s.height) continue;
          Points<T>::input_adjoint(half + i * kWindow, 1, out, 1);
          for (long j = 0; j < kWindow; ++j) {
            const long column = place.column + j - 1;
            if (column < 0 || column >= s.width) continue;
            T* target = image + (row * s.width + column) * s.inputs + c;
            store(target, load<V>(target) + out[j]);
          }
        }
      });
    }
  });
}

// m [36, tiles, outputs], bias [outputs] -> y = clip(A' m A + bias) [batch, height, width, outputs]
template <typename T>
void winograd_output(const Winograd& s, const Bounds<T>& after, const T* m, const T* bias, int threads, T* y) {
  const long plane = s.tiles() * s.outputs;
  for_each_tile(s, threads, [&](const TilePlace& place) {
    T* image = y + place.image * s.height * s.width * s.outputs;
    const T* source = m + place.index * s.outputs;
    const long rows = std::min(kTile, s.height - place.row), columns = std::min(kTile, s.width - place.column);
    for_each_vector<T>(s.outputs, [&](auto zero, long c) {
      using V = decltype(zero);
      V points[kPoints], half[kTile * kWindow], out[kTile];
      const V addend = load<V>(bias + c);
      for (long p = 0; p < kPoints; ++p) points[p] = load<V>(source + p * plane + c);
      for (long j = 0; j < kWindow; ++j) Points<T>::output(points + j, kWindow, half + j, kWindow);
      for (long i = 0; i < rows; ++i) {
        Points<T>::output(half + i * kWindow, 1, out, 1);
        for (long j = 0; j < columns; ++j)
          store(image + ((place.row + i) * s.width + place.column + j) * s.outputs + c, after.clip(out[j] + addend));
      }
    });
  });
}

// The gradient of y, and y [batch, height, width, outputs] -> of `channels` of them from `first` on, m [36, tiles, channels]
// and the bias's gradient [channels] added to what is there, both of what the clip lets through; without a clip y may be
// null. The adjoint of winograd_output.
template <typename T>
void winograd_output_adjoint(const Winograd& s, const Bounds<T>& after, const T* grad, const T* y, long first, long channels,
                             int threads, T* m, T* grad_bias) {
  const long plane = s.tiles() * channels, tasks = ceil_divide(s.tiles(), kTilesATask);
  std::vector<T> sums(tasks * channels);  // a task's; added up in order
  for_each_tile(s, threads, [&](const TilePlace& place) {
    const long origin = place.image * s.height * s.width * s.outputs + first;
    T* target = m + place.index * channels;
    T* sum = sums.data() + place.index / kTilesATask * channels;
    const long rows = std::min(kTile, s.height - place.row), columns = std::min(kTile, s.width - place.column);
    for_each_vector<T>(channels, [&](auto zero, long c) {
      using V = decltype(zero);
      V tile[kTile * kTile], half[kWindow * kTile], out[kWindow], total = load<V>(sum + c);
      for (long i = 0; i < kTile; ++i)
        for (long j = 0; j < kTile; ++j) {
          const long at = origin + ((place.row + i) * s.width + place.column + j) * s.outputs + c;
          const bool inside = i < rows && j < columns;
          tile[i * kTile + j] = !inside ? V{} : y ? after.pass(load<V>(y + at), load<V>(grad + at)) : load<V>(grad + at);
          total += tile[i * kTile + j];
        }
      store(sum + c, total);
      for (long j = 0; j < kTile; ++j) Points<T>::output_adjoint(tile + j, kTile, half + j, kTile);
      for (long i = 0; i < kWindow; ++i) {
        Points<T>::output_adjoint(half + i * kTile, 1, out, 1);
        for (long j = 0; j < kWindow; ++j) store(target + (i * kWindow + j) * plane + c, out[j]);
      }
    });
  });
  for (long task = 0; task < tasks; ++task)
    for (long c = 0; c < channels; ++c) grad_bias[c] += sums[task * channels + c];
}

// Filters, 9 numbers for column n and depth k at filters.at[n * row_step + k * depth_step] -> [36, panels, depth, 32], U
// packed as gemm's b.
template <typename T>
void winograd_filters(long columns, long depth, const Rows<T>& filters, int threads, T* packed) {
  using V = typename VectorOf<T>::type;
  constexpr long lanes = sizeof(V) / sizeof(T);
  const Gemm s{kPoints, 0, columns, depth};
  parallel_for(s.panels(), threads, [&](long panel) {
    for (long k = 0; k < depth; ++k)
      for (long part = 0; part < kPanel; part += lanes) {
        T gathered[kTaps][lanes] = {};
        for (long n = 0; n < std::min(lanes, columns - panel * kPanel - part); ++n)
          for (long tap = 0; tap < kTaps; ++tap)
            gathered[tap][n] = filters.from(panel * kPanel + part + n).at[k * filters.depth_step + tap];
        V taps[kTaps], half[kWindow * kSide], out[kWindow];
        for (long tap = 0; tap < kTaps; ++tap) taps[tap] = load<V>(gathered[tap]);
        for (long j = 0; j < kSide; ++j) Points<T>::filter(taps + j, kSide, half + j, kSide);
        for (long i = 0; i < kWindow; ++i) {
          Points<T>::filter(half + i * kSide, 1, out, 1);
          for (long j = 0; j < kWindow; ++j)
            store(packed + (i * kWindow + j) * s.packed() + (panel * depth + k) * kPanel + part, out[j]);
        }
      }
  });
}

// u [36, outputs, inputs] -> filters [outputs, inputs, 3, 3], the adjoint of winograd_filters
template <typename T>
void winograd_filters_adjoint(long outputs, long inputs, const T* u, int threads, T* filters) {
  parallel_for(outputs, threads, [&](long row) {
    for_each_vector<T>(inputs, [&](auto zero, long c) {
      using V = decltype(zero);
      constexpr long lanes = sizeof(V) / sizeof(T);
      V points[kPoints], half[kSide * kWindow], out[kSide];
      for (long p = 0; p < kPoints; ++p) points[p] = load<V>(u + (p * outputs + row) * inputs + c);
      for (long j = 0; j < kWindow; ++j) Points<T>::filter_adjoint(points + j, kWindow, half + j, kWindow);
      for (long i = 0; i < kSide; ++i) {
        Points<T>::filter_adjoint(half + i * kWindow, 1, out, 1);
        for (long j = 0; j < kSide; ++j) {
          T values[lanes];
          store(values, out[j]);
          for (long n = 0; n < lanes; ++n) filters[(row * inputs + c + n) * kTaps + i * kSide + j] = values[n];
        }
      }
    });
  });
}

// use(part, first): part has as many images as kTileBytes allow with so many channels of V and M together, the first of
// them is number `first`.
template <typename T, typename Use>
void for_each_part(const Winograd& s, long channels, Use use) {
  const long bytes = kPoints * s.rows() * s.columns() * channels * static_cast<long>(sizeof(T));
  const long images = std::max(1l, kTileBytes / bytes);
  for (long first = 0; first < s.batch; first += images) {
    Winograd part = s;
    part.batch = std::min(images, s.batch - first);
    use(part, first);
  }
}

// x [batch, height, width, inputs], packed U of winograd_filters, bias [outputs] -> y [batch, height, width, outputs]
template <typename T>
void winograd_forward(const Winograd& s, const Bounds<T>& after, const T* x, const T* packed, const T* bias, int threads,
                      T* y) {
  for_each_part<T>(s, s.inputs + s.outputs, [&](const Winograd& part, long first) {
    const long tiles = part.tiles(), pixels = first * s.height * s.width, plane = tiles * s.inputs;
    const std::unique_ptr<T[]> v(new T[kPoints * plane]), m(new T[kPoints * tiles * s.outputs]);
    winograd_input(part, x + pixels * s.inputs, threads, v.get(),
                   [&](long p, long tile, long c) { return p * plane + tile * s.inputs + c; });
    gemm<T>({kPoints, tiles, s.outputs, s.inputs}, {v.get(), s.inputs, 1}, plane, packed, unbounded<T>(), threads, m.get());
    winograd_output(part, after, m.get(), bias, threads, y + pixels * s.outputs);
  });
}

// Of `channels` output channels: packed U of `filters` [channels, inputs, 3, 3] with its channels as depth, and room for dU.
template <typename T>
struct WinogradFilters {
  long channels, panels;
  std::unique_ptr<T[]> packed, grad;

  WinogradFilters(long channels, long inputs, const T* filters, int threads)
      : channels(channels),
        panels(ceil_divide(inputs, kPanel)),
        packed(new T[kPoints * panels * channels * kPanel]),
        grad(new T[kPoints * channels * inputs]) {
    winograd_filters<T>(inputs, channels, {filters, kTaps, inputs * kTaps}, threads, packed.get());
  }
};

// The part of winograd_backward that some images and the output channels of u, from `channel` on, have: adds to grad_bias
// and, but for the first images, to u.grad and, but for the first channels, to grad_x.
template <typename T>
void winograd_backward_part(const Winograd& s, const Bounds<T>& after, const WinogradFilters<T>& u, long channel,
                            bool is_first, const T* grad, const T* y, const T* x, int threads, T* grad_x, T* grad_bias) {
  const long tiles = s.tiles(), size = kPoints * tiles * u.panels * kPanel;
  const std::unique_ptr<T[]> v(new T[size]), m(new T[kPoints * tiles * u.channels]);
  std::fill_n(v.get(), s.inputs % kPanel ? size : 0, T(0));
  winograd_output_adjoint(s, after, grad, y, channel, u.channels, threads, m.get(), grad_bias + channel);
  winograd_input(s, x, threads, v.get(), [&](long p, long tile, long c) {
    return ((p * u.panels + c / kPanel) * tiles + tile) * kPanel + c % kPanel;  // packed as gemm's b
  });
  Epilogue<T> sum = unbounded<T>();
  sum.addend = is_first ? nullptr : u.grad.get();
  gemm<T>({kPoints, u.channels, s.inputs, tiles}, {m.get(), 1, u.channels}, tiles * u.channels, v.get(), sum, threads,
          u.grad.get());
  gemm<T>({kPoints, tiles, s.inputs, u.channels}, {m.get(), u.channels, 1}, tiles * u.channels, u.packed.get(),
          unbounded<T>(), threads, v.get());
  winograd_input_adjoint(s, v.get(), channel > 0, threads, grad_x);
}

// The gradient of y, y (null: there was no clip), x, filters [outputs, inputs, 3, 3] -> gradients of x, filters and bias
template <typename T>
void winograd_backward(const Winograd& s, const Bounds<T>& after, const T* grad, const T* y, const T* x, const T* filters,
                       int threads, T* grad_x, T* grad_filters, T* grad_bias) {
  const long fitting = kFilterBytes / (2 * kPoints * s.inputs * static_cast<long>(sizeof(T)));
  const long most = std::max(kPanel, fitting / kPanel * kPanel), taps = s.inputs * kTaps, pixels = s.height * s.width;
  std::fill_n(grad_bias, s.outputs, T(0));
  for (long channel = 0; channel < s.outputs; channel += most) {
    const long channels = std::min(most, s.outputs - channel);
    const WinogradFilters<T> u(channels, s.inputs, filters + channel * taps, threads);
    for_each_part<T>(s, s.inputs + channels, [&](const Winograd& part, long first) {
      const long in = first * pixels * s.inputs, out = first * pixels * s.outputs;
      winograd_backward_part(part, after, u, channel, first == 0, grad + out, y ? y + out : nullptr, x + in, threads, grad_x + in,
                             grad_bias);
    });
    if (s.batch == 0) std::fill_n(u.grad.get(), kPoints * channels * s.inputs, T(0));
    winograd_filters_adjoint(channels, s.inputs, u.grad.get(), threads, grad_filters + channel * taps);
  }
}

}  // namespace popdet
