// Matrices that are a shared one plus sparse entries, made row by row.
#include "rows.h"

namespace ders {
namespace {

// Shared matrix W (O, I) and the entries of E matrices, N each, by rows.
template <class T> struct Sum {
  using W = wide_t<T>;
  const T *shared, *values;
  const int32_t *columns, *starts;
  int64_t O, I, N;

  template <class To> void make(int64_t e, int64_t o, int64_t begin, int64_t end, int64_t ahead, To* to) const {
    const T* row = shared + o * I;
    to -= begin;
    int64_t i = begin;
    for (; i + machine_lanes<W> <= end; i += machine_lanes<W>) {
      fetch(row + i + ahead);
      write(to + i, read<vec<W>>(row + i));
    }
    for (; i < end; i++) store(to[i], load(row[i]));
    const int32_t *start = starts + e * (O + 1) + o, *own = columns + e * N;
    int64_t n = begin ? std::lower_bound(own + start[0], own + start[1], begin) - own : start[0];
    for (; n < start[1] && own[n] < end; n++) store(to[own[n]], load(to[own[n]]) + load(values[e * N + n]));
  }
  bool direct() const { return false; }
  template <int C> void multiply(int64_t, int64_t, int64_t, const W*, int64_t, W*) const {}
};

}  // namespace

// y_s = (W + Δ_{e(s)}) x_s; 0 for a slot of no expert.
template <class T>
void sum_product(const T* x, const int64_t* expert, Sum<T> sum, T* y, int64_t S, int64_t E, int64_t threads) {
  product_by_rows(x, expert, y, S, E, sum.O, sum.I, threads, sum);
}

// Rows begin … end of W + Δ_e.
template <class T> void sum_rows(Sum<T> sum, T* to, int64_t e, int64_t begin, int64_t end, int64_t threads) {
  made_rows(sum, to, e, sum.I, begin, end, threads);
}

// The entries of rows begin … end of a dense block of those rows, in the order of the sparse matrix e.
template <class T>
void entries_of_rows(const T* block, const int32_t* columns, const int32_t* starts, T* to, int64_t I, int64_t begin,
                     int64_t end, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t o = begin; o < end; o++)
    for (int64_t n = starts[o]; n < starts[o + 1]; n++) to[n] = block[(o - begin) * I + columns[n]];
}

}  // namespace ders

using ders::Pointer;

DERS_EXPORT(sum_product,
            (Pointer x, const int64_t* expert, Pointer shared, Pointer values, const int32_t* columns,
             const int32_t* starts, Pointer y, int64_t S, int64_t E, int64_t O, int64_t I, int64_t N, int64_t threads),
            (x, expert, {shared, values, columns, starts, O, I, N}, y, S, E, threads))
DERS_EXPORT(sum_rows,
            (Pointer shared, Pointer values, const int32_t* columns, const int32_t* starts, Pointer to, int64_t O,
             int64_t I, int64_t N, int64_t e, int64_t begin, int64_t end, int64_t threads),
            ({shared, values, columns, starts, O, I, N}, to, e, begin, end, threads))
DERS_EXPORT(entries_of_rows,
            (Pointer block, const int32_t* columns, const int32_t* starts, Pointer to, int64_t I, int64_t begin,
             int64_t end, int64_t threads),
            (block, columns, starts, to, I, begin, end, threads))
