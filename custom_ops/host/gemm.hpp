// Matrix products with what follows them, for 1x1 convolutions (channels-last, so that a map is a matrix of pixels x
// channels) and for Winograd's points:
//
//   out[m, n] = clip(sum over k of a[m, k] * b[k, n] + bias[n] + addend[m, n])
//
// b is packed ahead: panels of 32 columns, in each row k after row k, the last panel filled up with zeros. Innermost, a
// block of rows times two vectors of columns is summed up in registers, which bounds it by arithmetic alone: rows of a
// come from level 1 or 2 of the cache, a panel of b from level 2. Each element is one sum over k in order, so that neither
// the blocks nor the number of threads show.
#pragma once

#include <limits>

#include "simd.hpp"

namespace popdet {

constexpr long kPanel = 32;             // columns
constexpr long kRowBytes = 256 * 1024;  // of a, as many rows as a task keeps in the level 2 cache
constexpr long kFewTasks = 16;          // with fewer blocks of rows, columns are cut as well
constexpr long kSetBytes = 4096;        // rows of a that far apart fall in the same few lines of the level 1 cache

struct Gemm {
  long batch, rows, columns, depth;  // a is [batch, rows, depth], b [batch, depth, columns], out [batch, rows, columns]

  long panels() const { return ceil_divide(columns, kPanel); }
  long packed() const { return panels() * depth * kPanel; }  // elements, of one of the batch
};

// Where the elements of a matrix are: at[row * row_step + k * depth_step].
template <typename T>
struct Rows {
  const T* at;
  long row_step, depth_step;

  Rows from(long row) const { return {at + row * row_step, row_step, depth_step}; }
};

// b, whose columns are the rows here -> packed [panels, depth, 32]
template <typename T>
void gemm_pack(const Gemm& s, const Rows<T>& b, int threads, T* packed) {
  parallel_for(s.panels(), threads, [&](long panel) {
    const long count = std::min(kPanel, s.columns - panel * kPanel);
    const Rows<T> source = b.from(panel * kPanel);
    T* target = packed + panel * s.depth * kPanel;
    for (long k = 0; k < s.depth; ++k, target += kPanel) {
      for (long n = 0; n < count; ++n) target[n] = source.at[n * source.row_step + k * source.depth_step];
      std::fill(target + count, target + kPanel, T(0));
    }
  });
}

// What is done with a sum; bias and addend may be null.
template <typename T>
struct Epilogue {
  const T *bias, *addend;
  Bounds<T> after;
};

template <typename T>
Epilogue<T> unbounded() {
  const T infinity = std::numeric_limits<T>::infinity();
  return {nullptr, nullptr, {-infinity, infinity}};
}

// rows x two vectors of columns: b at b[k * kPanel]
template <int rows, typename T>
inline void gemm_block(const Rows<T>& a, long depth, const T* b, T* out) {
  using V = typename WideVectorOf<T>::type;
  constexpr long lanes = sizeof(V) / sizeof(T);
  V sums[rows][2];
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row) sums[row][0] = sums[row][1] = V{};
  const T* factors = a.at;
  for (long k = 0; k < depth; ++k, factors += a.depth_step) {
    const V left = load<V>(b + k * kPanel), right = load<V>(b + k * kPanel + lanes);
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row) {
      const T factor = factors[row * a.row_step];
      sums[row][0] = multiply_add(factor, left, sums[row][0]);
      sums[row][1] = multiply_add(factor, right, sums[row][1]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row) {
    store(out + row * kPanel, sums[row][0]);
    store(out + row * kPanel + lanes, sums[row][1]);
  }
}

template <int rows, typename T>
struct BlockOf {  // the block with `count` <= rows rows
  static void run(long count, const Rows<T>& a, long depth, const T* b, T* out) {
    count == rows ? gemm_block<rows>(a, depth, b, out) : BlockOf<rows - 1, T>::run(count, a, depth, b, out);
  }
};

template <typename T>
struct BlockOf<0, T> {
  static void run(long, const Rows<T>&, long, const T*, T*) {}
};

// `count` rows -> blocks of `height` rows, in each the first of every row, the second of every row, ..
template <typename T>
std::vector<T> packed_rows(const Rows<T>& a, long count, long depth, long height) {
  std::vector<T> result(ceil_divide(count, height) * height * depth);
  for (long first = 0; first < count; first += height) {
    const Rows<T> source = a.from(first);
    const long rows = std::min(height, count - first);
    T* target = result.data() + first * depth;
    for (long k = 0; k < depth; ++k)
      for (long row = 0; row < rows; ++row)
        target[k * height + row] = source.at[row * source.row_step + k * source.depth_step];
  }
  return result;
}

// One row of a panel, sums -> out.
template <typename T>
inline void finish_row(const Epilogue<T>& epilogue, const T* sums, long column, long at, long count, T* out) {
  for_each_wide_vector<T>(count, [&](auto zero, long c) {
    using V = decltype(zero);
    V value = load<V>(sums + c);
    if (epilogue.bias) value += load<V>(epilogue.bias + column + c);
    if (epilogue.addend) value += load<V>(epilogue.addend + at + c);
    store(out + at + c, epilogue.after.clip(value));
  });
}

// a, of which each of the batch is batch_step behind the one before, and packed b -> out [batch, rows, columns]; the addend
// is laid out as out is, and may be out.
template <typename T>
void gemm(const Gemm& s, const Rows<T>& a, long batch_step, const T* packed, const Epilogue<T>& epilogue, int threads,
          T* out) {
  using V = typename WideVectorOf<T>::type;
  constexpr long lanes = sizeof(V) / sizeof(T), height = kWideRegisters / 2 - 2;
  const long fitting = std::max(1l, kRowBytes / (std::max(1l, s.depth) * static_cast<long>(sizeof(T)) * height)) * height;
  const long block = std::min(fitting, 16 * height), blocks = ceil_divide(s.rows, block);
  const long wanted = ceil_divide(kFewTasks, std::max(1l, s.batch * blocks));
  const long chunk = ceil_divide(s.panels(), std::min(wanted, s.panels())), chunks = ceil_divide(s.panels(), chunk);
  const bool in_place = a.depth_step == 1 && a.row_step * sizeof(T) % kSetBytes != 0;
  parallel_for(s.batch * blocks * chunks, threads, [&](long task) {
    const long number = task / (blocks * chunks), first_panel = task % chunks * chunk;
    const long first = task / chunks % blocks * block, last = std::min(s.rows, first + block);
    const Rows<T> mine = Rows<T>{a.at + number * batch_step, a.row_step, a.depth_step}.from(first);
    std::vector<T> copied;
    if (!in_place) copied = packed_rows(mine, last - first, s.depth, height);
    alignas(64) T sums[height * kPanel];
    for (long panel = first_panel; panel < std::min(s.panels(), first_panel + chunk); ++panel) {
      const T* b = packed + number * s.packed() + panel * s.depth * kPanel;
      const long column = panel * kPanel, count = std::min(kPanel, s.columns - column);
      for (long row = first; row < last; row += height) {
        const long rows = std::min(height, last - row);
        const Rows<T> part_of_a =
            in_place ? mine.from(row - first) : Rows<T>{copied.data() + (row - first) * s.depth, 1, height};
        for (long part = 0; part < kPanel; part += 2 * lanes)
          BlockOf<height, T>::run(rows, part_of_a, s.depth, b + part, sums + part);
        for (long i = 0; i < rows; ++i)
          finish_row(epilogue, sums + i * kPanel, column, (number * s.rows + row + i) * s.columns + column, count, out);
      }
    }
  });
}

}  // namespace popdet
