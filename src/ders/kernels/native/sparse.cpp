// Products with E sparse matrices, compressed by rows, each slot with the matrix of its expert.
//
// Slots of one expert lie side by side as the lanes of vectors, so that an entry is read once for up to 32 of them and
// costs one multiplication per vector; a slot alone gathers along the rows instead.
#include "lanes.h"

namespace ders {
namespace {

struct Matrix {
  const int32_t *columns, *starts;
};

// Up to `lanes` slots of one expert.
struct Tile {
  int64_t expert, count;
  const int64_t* slots;
  int lanes;
  int64_t offset;  // of its first lane among all lanes
};

struct Tiles {
  Tiles(const Slots& slots, int least, int most) {
    for (size_t e = 0; e + 1 < slots.starts.size(); e++)
      for (int64_t s = slots.starts[e]; s < slots.starts[e + 1];) {
        int64_t count = std::min<int64_t>(slots.starts[e + 1] - s, most);
        int lanes = least;
        while (lanes < count) lanes = std::max(4, lanes * 2);
        all.push_back({int64_t(e), count, &slots.order[s], lanes, lanes_in_all});
        lanes_in_all += lanes;
        s += count;
      }
  }
  std::vector<Tile> all;
  int64_t lanes_in_all = 0;
};

constexpr int64_t column_block = 512;

// x[slots] (count, width) from column `begin` on → to (width, lanes); absent slots are zero.
template <class T, class W>
void into_lanes(const T* x, const Tile& tile, int64_t width, int64_t begin, int64_t end, W* to) {
  for (int64_t block = begin; block < end; block += 16) {
    int64_t stop = std::min(block + 16, end);
    for (int l = 0; l < tile.lanes; l++)
      if (l < tile.count) {
        const T* row = x + tile.slots[l] * width;
        for (int64_t i = block; i < stop; i++) to[i * tile.lanes + l] = load(row[i]);
      } else {
        for (int64_t i = block; i < stop; i++) to[i * tile.lanes + l] = 0;
      }
  }
}

// All tiles of x (S, width) as lanes, one after the other; to be called by all threads of a team.
template <class T, class W> void all_into_lanes(const T* x, const std::vector<Tile>& tiles, int64_t width, const Scratch<W>& to) {
  int64_t blocks = (width + column_block - 1) / column_block;
#pragma omp for schedule(static) collapse(2)
  for (size_t t = 0; t < tiles.size(); t++)
    for (int64_t b = 0; b < blocks; b++)
      into_lanes(x, tiles[t], width, b * column_block, std::min((b + 1) * column_block, width), to + tiles[t].offset * width);
}

// from (rows, lanes), rows begin … end of a matrix (S, width) → y[slots, begin … end].
template <class T, class W>
void out_of_lanes(const W* from, const Tile& tile, int64_t width, int64_t begin, int64_t end, T* y) {
  for (int64_t l = 0; l < tile.count; l++) {
    T* row = y + tile.slots[l] * width;
    for (int64_t o = begin; o < end; o++) store(row[o], from[(o - begin) * tile.lanes + l]);
  }
}

// The rows whose entries begin in the given part of a matrix's entries.
Range rows_of_part(const int32_t* starts, int64_t rows, int64_t part, int64_t parts) {
  auto at = [&](int64_t p) -> int64_t {
    if (p == 0) return 0;
    if (p == parts) return rows;
    return std::lower_bound(starts, starts + rows, int32_t(int64_t(starts[rows]) * p / parts)) - starts;
  };
  return {at(part), at(part + 1)};
}

// Parts into which the rows of each of `items` are split: enough for all threads to end at about the same time.
int64_t parts_for(int64_t items, int64_t threads) {
  return items >= 8 * threads || threads == 1 ? 1 : (8 * threads + items - 1) / std::max<int64_t>(items, 1);
}

// Rows are short: the processor, which fetches ahead by itself, lags behind where they end.
template <class T> inline void fetch_ahead(const T* at) { fetch(at + 512); }

template <int L, class T, class W>
void row_in_lanes(const T* values, const int32_t* columns, int64_t begin, int64_t end, const W* x, W* y) {
  constexpr int width = std::min(L, machine_lanes<W>), vectors = L / width;
  // Sums that do not wait for one another.
  constexpr int chains = vectors >= 4 ? 1 : 4 / vectors;
  using V = vec<W, width>;
  V sums[chains][vectors] = {};
  int64_t n = begin;
  for (; n + chains <= end; n += chains) {
    fetch_ahead(values + n);
    fetch_ahead(columns + n);
    for (int c = 0; c < chains; c++) {
      W value = load(values[n + c]);
      const W* at = x + int64_t(columns[n + c]) * L;
      for (int v = 0; v < vectors; v++) sums[c][v] += value * read<V>(at + v * width);
    }
  }
  for (; n < end; n++)
    for (int v = 0; v < vectors; v++) sums[0][v] += load(values[n]) * read<V>(x + int64_t(columns[n]) * L + v * width);
  for (int v = 0; v < vectors; v++) {
    for (int c = 1; c < chains; c++) sums[0][v] += sums[c][v];
    write(y + v * width, sums[0][v]);
  }
}

// A vector whose numbers add up to the row's product with x.
template <class T, class W>
vec<W> row_by_gathering(const T* values, const int32_t* columns, int64_t begin, int64_t end, const W* x) {
  constexpr int width = machine_lanes<W>;
  using V = vec<W>;
  auto gathered = [&](int64_t n) {
#if defined(__AVX512F__)
    // The unmasked one warns of a register that it leaves undefined.
    if constexpr (std::is_same_v<W, float>)
      return (V)_mm512_mask_i32gather_ps(__m512{}, 0xffff, _mm512_loadu_si512(columns + n), x, 4);
#endif
    V v;
    for (int i = 0; i < width; i++) v[i] = x[columns[n + i]];
    return v;
  };
  V sums[2] = {};
  int64_t n = begin;
  for (; n + 2 * width <= end; n += 2 * width) {
    for (int c = 0; c < 2; c++) {
      fetch_ahead(values + n + c * width);
      fetch_ahead(columns + n + c * width);
      sums[c] += read<V>(values + n + c * width) * gathered(n + c * width);
    }
  }
  if (n + width <= end) {
    sums[0] += read<V>(values + n) * gathered(n);
    n += width;
  }
  if (n < end && end >= width) {
    // The last full vector of entries, less those already counted or of the rows before.
    V last = read<V>(values + end - width) * gathered(end - width);
    for (int i = 0; i < width; i++) last[i] = end - width + i < n ? 0 : last[i];
    sums[1] += last;
    n = end;
  }
  for (; n < end; n++) sums[0][0] += load(values[n]) * x[columns[n]];
  return sums[0] + sums[1];
}

template <int L, class T, class W>
void product(const T* values, Matrix m, const Tile& tile, const W* x, Range rows, int64_t width, T* y) {
  constexpr int block = L == 1 ? machine_lanes<W> : 16;
  for (int64_t o = rows.begin; o < rows.end; o += block) {
    int64_t stop = std::min(o + block, rows.end);
    W sums[block * L];
    if constexpr (L == 1) {
      vec<W> products[block] = {};
      for (int64_t r = o; r < stop; r++)
        products[r - o] = row_by_gathering(values, m.columns, m.starts[r], m.starts[r + 1], x);
      write(sums, row_sums<W>(products));
    } else {
      for (int64_t r = o; r < stop; r++)
        row_in_lanes<L>(values, m.columns, m.starts[r], m.starts[r + 1], x, sums + (r - o) * L);
    }
    out_of_lanes(sums, tile, width, o, stop, y);
  }
}

// to (columns, L) += the rows' entries times dy (rows, L).
template <int L, class T, class W>
void transposed_product(const T* values, Matrix m, const W* dy, Range rows, W* to) {
  constexpr int width = std::min(L, machine_lanes<W>), vectors = L / width;
  using V = vec<W, width>;
  for (int64_t o = rows.begin; o < rows.end; o++) {
    V upstream[vectors];
    for (int v = 0; v < vectors; v++) upstream[v] = read<V>(dy + o * L + v * width);
    for (int64_t n = m.starts[o]; n < m.starts[o + 1]; n++) {
      W value = load(values[n]);
      W* at = to + int64_t(m.columns[n]) * L;
      for (int v = 0; v < vectors; v++) write(at + v * width, read<V>(at + v * width) + value * upstream[v]);
    }
  }
}

// grads[n − first] += Σ over lanes of dy[row(n)] · x[column(n)], for the entries of the rows.
template <int L, class W>
void entry_products(Matrix m, const W* x, const W* dy, Range rows, W* grads) {
  constexpr int width = machine_lanes<W>, vectors = L / width;
  using V = vec<W>;
  W* grad = grads;
  for (int64_t o = rows.begin; o < rows.end; o++) {
    V upstream[vectors];
    for (int v = 0; v < vectors; v++) upstream[v] = read<V>(dy + o * L + v * width);
    auto of_entry = [&](int64_t n) {
      const W* at = x + int64_t(m.columns[n]) * L;
      V sum = upstream[0] * read<V>(at);
      for (int v = 1; v < vectors; v++) sum += upstream[v] * read<V>(at + v * width);
      return sum;
    };
    int64_t n = m.starts[o], end = m.starts[o + 1];
    for (; n + width <= end; n += width, grad += width) {
      V products[width];
      for (int i = 0; i < width; i++) products[i] = of_entry(n + i);
      write(grad, read<V>(grad) + row_sums<W>(products));
    }
    for (; n < end; n++, grad++) {
      V sum = of_entry(n);
      for (int i = 0; i < width; i++) *grad += sum[i];
    }
  }
}

// Calls f with the number of lanes as a constant.
template <class F> void with_lanes(int lanes, F f) {
  switch (lanes) {
    case 1: return f(std::integral_constant<int, 1>());
    case 4: return f(std::integral_constant<int, 4>());
    case 8: return f(std::integral_constant<int, 8>());
    case 16: return f(std::integral_constant<int, 16>());
    case 32: return f(std::integral_constant<int, 32>());
  }
}

}  // namespace

// y_SO = each slot's x times the matrix of its expert; 0 for a slot of no expert.
template <class T>
void sparse_forward(const T* x, const int64_t* expert, const T* values, const int32_t* columns, const int32_t* starts,
                    T* y, int64_t S, int64_t E, int64_t N, int64_t O, int64_t I, int64_t threads) {
  using W = wide_t<T>;
  Slots slots(expert, S, E);
  Tiles tiles(slots, 1, 32);
  Scratch<W> lanes(tiles.lanes_in_all * I);
  int64_t parts = parts_for(tiles.all.size(), threads), tasks = tiles.all.size() * parts;
  if (int64_t(slots.starts[E]) < S) std::fill(y, y + S * O, T{});
#pragma omp parallel num_threads(threads)
  {
    all_into_lanes(x, tiles.all, I, lanes);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      const Tile& tile = tiles.all[task / parts];
      Matrix m{columns + tile.expert * N, starts + tile.expert * (O + 1)};
      Range rows = rows_of_part(m.starts, O, task % parts, parts);
      with_lanes(tile.lanes, [&]<int L>(std::integral_constant<int, L>) {
        product<L>(values + tile.expert * N, m, tile, lanes + tile.offset * I, rows, O, y);
      });
    }
  }
}

// dx_SI = each slot's dy times the transposed matrix of its expert.
template <class T>
void sparse_backward_x(const T* dy, const int64_t* expert, const T* values, const int32_t* columns,
                       const int32_t* starts, T* dx, int64_t S, int64_t E, int64_t N, int64_t O, int64_t I,
                       int64_t threads) {
  using W = wide_t<T>;
  Slots slots(expert, S, E);
  Tiles all(slots, 4, 32);
  const std::vector<Tile>& tiles = all.all;
  Scratch<W> lanes(all.lanes_in_all * O);
  // Rows of one tile add to the same columns. Where tiles are few, each part of the rows adds to columns of its own,
  // and these are summed in a fixed order.
  int64_t parts = parts_for(tiles.size(), threads), tasks = tiles.size() * parts;
  Scratch<W> sums((parts > 1 ? tasks : threads) * I * 32);
  if (int64_t(slots.starts[E]) < S) std::fill(dx, dx + S * I, T{});
#pragma omp parallel num_threads(threads)
  {
    all_into_lanes(dy, tiles, O, lanes);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      const Tile& tile = tiles[task / parts];
      Matrix m{columns + tile.expert * N, starts + tile.expert * (O + 1)};
      W* mine = sums + (parts > 1 ? task : omp_get_thread_num()) * I * 32;
      std::fill(mine, mine + I * tile.lanes, W{});
      with_lanes(tile.lanes, [&]<int L>(std::integral_constant<int, L>) {
        transposed_product<L>(values + tile.expert * N, m, lanes + tile.offset * O,
                              rows_of_part(m.starts, O, task % parts, parts), mine);
      });
      if (parts == 1) out_of_lanes(mine, tile, I, 0, I, dx);
    }
    if (parts > 1) {
      int64_t blocks = (I + column_block - 1) / column_block;
#pragma omp for schedule(static) collapse(2)
      for (size_t t = 0; t < tiles.size(); t++)
        for (int64_t b = 0; b < blocks; b++) {
          int64_t begin = b * column_block, end = std::min(begin + column_block, I), lanes = tiles[t].lanes;
          W* first = sums + int64_t(t) * parts * I * 32;
          for (int64_t p = 1; p < parts; p++)
            for (int64_t i = begin * lanes; i < end * lanes; i++) first[i] += first[p * I * 32 + i];
          out_of_lanes(first + begin * lanes, tiles[t], I, begin, end, dx);
        }
    }
  }
}

// dvalues_EN[e][n] = Σ over the slots of e of dy[row(n)] · x[column(n)].
template <class T>
void sparse_backward_values(const T* dy, const T* x, const int64_t* expert, const int32_t* columns,
                            const int32_t* starts, T* dvalues, int64_t S, int64_t E, int64_t N, int64_t O, int64_t I,
                            int64_t threads) {
  using W = wide_t<T>;
  Slots slots(expert, S, E);
  Tiles tiles(slots, 16, 32);
  Scratch<W> x_lanes(tiles.lanes_in_all * I), dy_lanes(tiles.lanes_in_all * O);
  // A part's sums stay in a core's cache while the tiles pass by.
  int64_t parts = std::max(parts_for(E, threads), N >> 16), tasks = E * parts;
#pragma omp parallel num_threads(threads)
  {
    all_into_lanes(x, tiles.all, I, x_lanes);
    all_into_lanes(dy, tiles.all, O, dy_lanes);
    std::vector<W> sums;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      int64_t e = task / parts;
      Matrix m{columns + e * N, starts + e * (O + 1)};
      Range rows = rows_of_part(m.starts, O, task % parts, parts);
      int64_t first = m.starts[rows.begin], count = m.starts[rows.end] - first;
      sums.assign(count, W{});
      for (const Tile& tile : tiles.all)
        if (tile.expert == e)
          with_lanes(tile.lanes, [&]<int L>(std::integral_constant<int, L>) {
            if constexpr (L >= 16)
              entry_products<L>(m, x_lanes + tile.offset * I, dy_lanes + tile.offset * O, rows, sums.data());
          });
      for (int64_t n = 0; n < count; n++) store(dvalues[e * N + first + n], sums[n]);
    }
  }
}

}  // namespace ders

using ders::Pointer;

DERS_EXPORT(sparse_forward,
            (Pointer x, const int64_t* expert, Pointer values, const int32_t* columns, const int32_t* starts, Pointer y,
             int64_t S, int64_t E, int64_t N, int64_t O, int64_t I, int64_t threads),
            (x, expert, values, columns, starts, y, S, E, N, O, I, threads))
DERS_EXPORT(sparse_backward_x,
            (Pointer dy, const int64_t* expert, Pointer values, const int32_t* columns, const int32_t* starts,
             Pointer dx, int64_t S, int64_t E, int64_t N, int64_t O, int64_t I, int64_t threads),
            (dy, expert, values, columns, starts, dx, S, E, N, O, I, threads))
DERS_EXPORT(sparse_backward_values,
            (Pointer dy, Pointer x, const int64_t* expert, const int32_t* columns, const int32_t* starts,
             Pointer dvalues, int64_t S, int64_t E, int64_t N, int64_t O, int64_t I, int64_t threads),
            (dy, x, expert, columns, starts, dvalues, S, E, N, O, I, threads))
