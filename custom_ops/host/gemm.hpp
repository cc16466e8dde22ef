// Matrix products with what follows them, for 1x1 convolutions (channels-last, so that a map is a matrix of pixels x
// channels) and for Winograd's points:
//
//   out[m, n] = clip(sum over k of a[m, k] * b[k, n] + bias[n] + addend[m, n])
//
// or the means of that over rows side by side, which are the pixels of an image.
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
constexpr long kHeight = kWideRegisters / 2 - 2;  // rows whose sums are in registers at once
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

  // of sums in columns `column`, .., where the addend has element `at`, ..
  template <typename V>
  V finished(V sum, long column, long at) const {
    if (bias) sum += load<V>(bias + column);
    if (addend) sum += load<V>(addend + at);
    return after.clip(sum);
  }
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

// How many rows of a a task takes.
template <typename T>
long fitting_rows(long depth) {
  const long bytes = std::max(1l, depth) * static_cast<long>(sizeof(T)) * kHeight;
  return std::min(16l, std::max(1l, kRowBytes / bytes)) * kHeight;
}

// a, of which each of the batch is batch_step behind the one before, and packed b -> finish(sums, row, column, count) for
// parts of rows: `count` sums from `column` on of a row, which counts on from one of the batch to the next. Rows that
// are in the same `block` of them are finished in order by one thread, as far as a column is concerned.
template <typename T, typename Finish>
void gemm_rows(const Gemm& s, const Rows<T>& a, long batch_step, const T* packed, long block, int threads,
               Finish finish) {
  constexpr long lanes = kWideBytes / sizeof(T);
  const long blocks = ceil_divide(s.rows, block);
  const long wanted = ceil_divide(kFewTasks, std::max(1l, s.batch * blocks));
  const long chunk = ceil_divide(s.panels(), std::min(wanted, s.panels())), chunks = ceil_divide(s.panels(), chunk);
  const bool in_place = a.depth_step == 1 && a.row_step * sizeof(T) % kSetBytes != 0;
  parallel_for(s.batch * blocks * chunks, threads, [&](long task) {
    const long number = task / (blocks * chunks), first_panel = task % chunks * chunk;
    const long first = task / chunks % blocks * block, last = std::min(s.rows, first + block);
    const Rows<T> mine = Rows<T>{a.at + number * batch_step, a.row_step, a.depth_step}.from(first);
    std::vector<T> copied;
    if (!in_place) copied = packed_rows(mine, last - first, s.depth, kHeight);
    alignas(64) T sums[kHeight * kPanel];
    for (long panel = first_panel; panel < std::min(s.panels(), first_panel + chunk); ++panel) {
      const T* b = packed + number * s.packed() + panel * s.depth * kPanel;
      const long column = panel * kPanel, count = std::min(kPanel, s.columns - column);
      for (long row = first; row < last; row += kHeight) {
        const long rows = std::min(kHeight, last - row);
        const Rows<T> part_of_a =
            in_place ? mine.from(row - first) : Rows<T>{copied.data() + (row - first) * s.depth, 1, kHeight};
        for (long part = 0; part < kPanel; part += 2 * lanes)
          BlockOf<kHeight, T>::run(rows, part_of_a, s.depth, b + part, sums + part);
        for (long i = 0; i < rows; ++i) finish(sums + i * kPanel, number * s.rows + row + i, column, count);
      }
    }
  });
}

// The sums, finished -> out [batch, rows, columns]; the addend is laid out as out is, and may be out.
template <typename T>
void gemm(const Gemm& s, const Rows<T>& a, long batch_step, const T* packed, const Epilogue<T>& epilogue, int threads,
          T* out) {
  gemm_rows(s, a, batch_step, packed, fitting_rows<T>(s.depth), threads,
            [&](const T* sums, long row, long column, long count) {
              const long at = row * s.columns + column;
              for_each_wide_vector<T>(count, [&](auto zero, long c) {
                store(out + at + c, epilogue.finished(load<decltype(zero)>(sums + c), column + c, at + c));
              });
            });
}

// As many images of `pixels` rows as are at most `most` rows, but one at least, and of those numbers the one with which the
// fewest rows of an image are left over for blocks that are not kHeight high.
inline long images_together(long pixels, long most) {
  long best = 1;
  for (long images = 2; images * pixels <= most; ++images)
    if (images * pixels % kHeight * best <= best * pixels % kHeight * images) best = images;
  return best;
}

// Each `pixels` rows are an image -> their means [rows / pixels, columns]. What they are the means of is never written: a
// row is added to its image's sums when it is finished, in order, as a task has whole images.
template <typename T>
void gemm_mean(const Gemm& s, long pixels, const Rows<T>& a, const T* packed, const Epilogue<T>& epilogue, int threads,
               T* means) {
  const long block = images_together(pixels, fitting_rows<T>(s.depth)) * pixels;
  std::fill(means, means + s.rows / pixels * s.columns, T(0));
  gemm_rows(s, a, 0, packed, block, threads, [&](const T* sums, long row, long column, long count) {
    T* target = means + row / pixels * s.columns + column;
    for_each_wide_vector<T>(count, [&](auto zero, long c) {
      using V = decltype(zero);
      const V value = epilogue.finished(load<V>(sums + c), column + c, row * s.columns + column + c);
      store(target + c, load<V>(target + c) + value);
    });
  });
  for (long i = 0; i < s.rows / pixels * s.columns; ++i) means[i] /= static_cast<T>(pixels);
}

}  // namespace popdet
