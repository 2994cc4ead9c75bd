// Products with matrices that are made row by row and never stored: a few rows live in a core's cache while the slots
// of their expert meet them.
#pragma once
#include "lanes.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ders {

// Rows made for all experts in turn: what the experts share is then read from memory once. Many slots do not fit into a
// core's cache and are read again for every block, which is therefore larger.
constexpr int64_t few_rows = 32, many_rows = 128;
// Columns worked on at once, so that a tile of rows or slots stays in the innermost cache: by few slots, by many, and by
// the matrix unit.
constexpr int64_t many_numbers = 1 << 18;
constexpr int64_t few_columns = 1024, many_columns = 256, unit_columns = 1024;
// Rows and slots end in zeros, up to a multiple of this many columns.
constexpr int64_t column_unit = 32;

// Few slots: columns as the lanes of vectors. sums[r · C + c] = rows[r] · x[c].
constexpr int tile_rows = vector_registers == 32 ? 4 : 2, tile_slots = 4;

template <int C, class W>
void multiply_columns(const W* rows, int64_t rows_stride, const W* x, int64_t x_stride, int64_t count, W* sums) {
  constexpr int R = tile_rows, width = machine_lanes<W>, trees = (R * C + width - 1) / width;
  using V = vec<W>;
  V products[trees * width] = {};
  for (int64_t i = 0; i < count; i += width) {
    V row[R];
    for (int r = 0; r < R; r++) row[r] = read<V>(rows + r * rows_stride + i);
    for (int c = 0; c < C; c++) {
      V slot = read<V>(x + c * x_stride + i);
      for (int r = 0; r < R; r++) products[r * C + c] += row[r] * slot;
    }
  }
  for (int t = 0; t < trees; t++) write(sums + t * width, row_sums<W>(products + t * width));
}

// Many slots: slots as the lanes of one or two vectors. sums[r][lane] += rows[r] · x[·][lane].
constexpr int64_t many_slots = 48;
constexpr int wide_rows = vector_registers == 32 ? 8 : 4, wide_vectors = 2;

template <int vectors, class W>
void multiply_lanes(const W* rows, int64_t rows_stride, const W* x, int64_t count, W* sums, int64_t sums_stride) {
  constexpr int R = wide_rows, width = machine_lanes<W>;
  using V = vec<W>;
  V products[R][vectors] = {};
  for (int64_t i = 0; i < count; i++) {
    V slots[vectors];
    for (int v = 0; v < vectors; v++) slots[v] = read<V>(x + (i * vectors + v) * width);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < vectors; v++) products[r][v] += rows[r * rows_stride + i] * slots[v];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < vectors; v++) {
      W* at = sums + r * sums_stride + v * width;
      write(at, read<V>(at) + products[r][v]);
    }
}

// The same for bf16 on the matrix unit: 32 rows, tiles of 16 slots.
#if defined(__AMX_BF16__) && defined(__linux__)
inline bool has_matrix_unit() {
  // The system hands out its registers on request, once for a process: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
}

struct MatrixUnit {
  MatrixUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~MatrixUnit() { _tile_release(); }

  // sums[r][lane] += rows[r] · x[·][lane] for 32 rows and one or two tiles of slots, in which pairs of columns of 16
  // slots lie side by side.
  void multiply(const bf16* rows, int64_t rows_stride, const bf16* x, int64_t x_stride, bool two, int64_t count,
                float* sums, int64_t sums_stride) const {
    int64_t row_bytes = rows_stride * sizeof(bf16), sum_bytes = sums_stride * sizeof(float);
    const bf16* lower_rows = rows + 16 * rows_stride;
    float* lower = sums + 16 * sums_stride;
    _tile_loadd(0, sums, sum_bytes);
    _tile_loadd(1, lower, sum_bytes);
    if (two) {
      _tile_loadd(2, sums + 16, sum_bytes);
      _tile_loadd(3, lower + 16, sum_bytes);
    }
    for (int64_t i = 0; i < count; i += 32) {
      _tile_loadd(4, rows + i, row_bytes);
      _tile_loadd(5, lower_rows + i, row_bytes);
      _tile_loadd(6, x + i * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (two) {
        _tile_loadd(7, x + x_stride + i * 16, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, sum_bytes);
    _tile_stored(1, lower, sum_bytes);
    if (two) {
      _tile_stored(2, sums + 16, sum_bytes);
      _tile_stored(3, lower + 16, sum_bytes);
    }
  }
};
#else
inline bool has_matrix_unit() { return false; }
struct MatrixUnit {
  void multiply(const bf16*, int64_t, const bf16*, int64_t, bool, int64_t, float*, int64_t) const {}
};
#endif

// Calls f with a number of 1 … 4 as a constant.
template <class F> void with_number(int64_t number, F f) {
  switch (number) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, 4>());
  }
}

// The slots of one expert, and how they are multiplied.
struct Group {
  enum Way { direct, columns, lanes, tiles } way;
  int64_t expert, first, count;
  int64_t packed;  // where its x lies
  int64_t sums, sums_stride;
  int64_t vectors;  // of a tile of lanes
};

template <class T, class Source> struct Product {
  using W = wide_t<T>;
  static constexpr int width = machine_lanes<W>;
  // Rows a power of two apart would push one another out of the cache.
  static constexpr int64_t pad = 32;
  const Source& source;
  const Slots& slots;
  int64_t O, I, stride, row_block;
  bool matrix_unit;
  std::vector<Group> groups;
  int64_t packed_size = 0, sums_size = 0;

  Product(const Source& source, const Slots& slots, int64_t E, int64_t O, int64_t I, int64_t threads)
      : source(source), slots(slots), O(O), I(I), stride(padded(I, column_unit)) {
    matrix_unit = std::is_same_v<T, bf16> && has_matrix_unit();
    row_block = slots.starts[E] * stride >= many_numbers && O >= 4 * threads * many_rows ? many_rows : few_rows;
    for (int64_t e = 0; e < E; e++) {
      Group g{Group::columns, e, slots.starts[e], slots.starts[e + 1] - slots.starts[e], packed_size, sums_size, 0, 0};
      if (!g.count) continue;
      int64_t lanes = g.count;
      if (source.direct() && g.count <= (matrix_unit ? 2 : tile_slots)) {
        g.way = Group::direct;
      } else if (matrix_unit) {
        g.way = Group::tiles;
        lanes = padded(lanes, 16);
      } else if (g.count >= many_slots) {
        g.way = Group::lanes;
        int64_t needed = (lanes + width - 1) / width, tiles = (needed + wide_vectors - 1) / wide_vectors;
        g.vectors = (needed + tiles - 1) / tiles;
        lanes = padded(lanes, g.vectors * width);
      }
      packed_size += g.way == Group::tiles ? lanes * stride / 2 : lanes * stride;
      g.sums_stride = padded(lanes, 16) + pad;
      sums_size += row_block * g.sums_stride;
      groups.push_back(g);
    }
  }

  // All threads of a team together.
  void pack(const T* x, const Scratch<W>& to) const {
    for (const Group& g : groups) {
      int64_t tile = g.way == Group::tiles ? 16 : g.way == Group::lanes ? g.vectors * width : 1;
#pragma omp for schedule(static) nowait
      for (int64_t p = 0; p < g.count; p += tile)
        if (g.way == Group::tiles) {
          auto* at = reinterpret_cast<bf16*>(to + g.packed) + p * stride;
          pack_pairs(x, g, p, at);
        } else {
          pack_lanes(x, g, p, tile, to + (g.packed + p * stride));
        }
    }
#pragma omp barrier
  }

  void pack_lanes(const T* x, const Group& g, int64_t first, int64_t tile, W* to) const {
    for (int64_t block = 0; block < stride; block += column_unit)
      for (int64_t l = 0; l < tile; l++) {
        bool present = first + l < g.count;
        const T* row = x + slots.order[g.first + (present ? first + l : 0)] * I;
        for (int64_t i = block; i < block + column_unit; i++) to[i * tile + l] = present && i < I ? load(row[i]) : W{};
      }
  }

  void pack_pairs(const T* x, const Group& g, int64_t first, bf16* to) const {
    std::memset(to, 0, 16 * stride * sizeof(bf16));
    if constexpr (std::is_same_v<T, bf16>)
      for (int64_t block = 0; block < I; block += column_unit)
        for (int64_t l = 0; l < 16 && first + l < g.count; l++) {
          const T* row = x + slots.order[g.first + first + l] * I;
          for (int64_t i = block; i < std::min(block + column_unit, I); i++) to[(i / 2 * 16 + l) * 2 + i % 2] = row[i];
        }
  }

  struct Memory {
    Scratch<W> rows, sums;
    Scratch<bf16> narrow;
    Memory(const Product& p)
        : rows(std::max(p.row_block * (many_columns + pad), tile_rows * (few_columns + pad))),
          sums(p.sums_size),
          narrow(p.matrix_unit ? p.row_block * (unit_columns + pad) : 0) {}
  };

  // Rows o … o + height of all W_e, times their slots.
  void rows(int64_t o, int64_t height, const Scratch<W>& packed, Memory& memory, const MatrixUnit* unit, T* y) const {
    std::fill(memory.sums + 0, memory.sums + sums_size, W{});
    for (int64_t r = 0; r < height; r += tile_rows)
      for (const Group& g : groups) {
        int64_t present = std::min<int64_t>(tile_rows, height - r);
        W* sums = memory.sums + (g.sums + r * g.sums_stride);
        if (g.way == Group::direct) directly(g, o + r, present, packed + g.packed, sums);
        if (g.way == Group::columns) by_columns(g, o + r, present, packed + g.packed, memory.rows + 0, sums);
      }
    for (const Group& g : groups) {
      W* sums = memory.sums + g.sums;
      if (g.way == Group::lanes)
        for (int64_t i = 0; i < I; i += many_columns)
          by_lanes(g, o, height, i, packed + g.packed, memory.rows + 0, sums);
      if constexpr (std::is_same_v<T, bf16>)
        if (g.way == Group::tiles)
          for (int64_t i = 0; i < I; i += unit_columns) by_tiles(g, o, height, i, packed + g.packed, memory, *unit, sums);
    }
    for (const Group& g : groups)
      for (int64_t p = 0; p < g.count; p++) {
        const W* from = memory.sums + (g.sums + p);
        T* to = y + slots.order[g.first + p] * O + o;
        int64_t r = 0;
        for (; r + width <= height; r += width) write(to + r, gathered<W>(from + r * g.sums_stride, g.sums_stride));
        for (; r < height; r++) store(to[r], from[r * g.sums_stride]);
      }
  }

  // Columns i … i + count of a row of W_e, as far as there are any; zeros past the end. Asks for memory `ahead`.
  template <class To> void make(int64_t e, int64_t o, int64_t i, int64_t count, int64_t ahead, To* to) const {
    int64_t end = std::min(i + count, I);
    source.make(e, o, i, end, ahead, to);
    if (end < i + count) std::fill(to + end - i, to + count, To{});
  }

  void directly(const Group& g, int64_t o, int64_t present, const W* x, W* sums) const {
    W tile[tile_rows * tile_slots + width] = {};
    with_number(g.count, [&]<int C>(std::integral_constant<int, C>) {
      source.template multiply<C>(g.expert, o, present, x, stride, tile);
    });
    take(tile, g.count, present, sums, g.sums_stride);
  }

  void by_columns(const Group& g, int64_t o, int64_t present, const W* x, W* rows, W* sums) const {
    for (int64_t i = 0; i < I; i += few_columns) {
      int64_t count = std::min(few_columns, stride - i), rows_stride = few_columns + pad;
      for (int64_t r = 0; r < present; r++) make(g.expert, o + r, i, count, tile_rows * I, rows + r * rows_stride);
      for (int64_t p = 0; p < g.count; p += tile_slots) {
        int64_t many = std::min<int64_t>(tile_slots, g.count - p);
        W tile[tile_rows * tile_slots + width] = {};
        with_number(many, [&]<int C>(std::integral_constant<int, C>) {
          multiply_columns<C>(rows, rows_stride, x + p * stride + i, stride, count, tile);
        });
        take(tile, many, present, sums + p, g.sums_stride);
      }
    }
  }

  void by_lanes(const Group& g, int64_t o, int64_t height, int64_t i, const W* x, W* rows, W* sums) const {
    int64_t count = std::min(many_columns, stride - i), rows_stride = many_columns + pad, tile = g.vectors * width;
    for (int64_t r = 0; r < height; r++) make(g.expert, o + r, i, count, many_columns, rows + r * rows_stride);
    for (int64_t p = 0; p < g.count; p += tile)
      for (int64_t r = 0; r < height; r += wide_rows)
        with_number(g.vectors, [&]<int vectors>(std::integral_constant<int, vectors>) {
          if constexpr (vectors <= wide_vectors)
            multiply_lanes<vectors>(rows + r * rows_stride, rows_stride, x + p * stride + i * tile, count,
                                    sums + r * g.sums_stride + p, g.sums_stride);
        });
  }

  void by_tiles(const Group& g, int64_t o, int64_t height, int64_t i, const W* x, Memory& memory,
                const MatrixUnit& unit, W* sums) const {
    int64_t count = std::min(unit_columns, stride - i), rows_stride = unit_columns + pad;
    for (int64_t r = 0; r < padded(height, few_rows); r++) {
      bf16* row = memory.narrow + r * rows_stride;
      if (r < height)
        make(g.expert, o + r, i, count, unit_columns, row);
      else
        std::fill(row, row + count, bf16{});
    }
    auto* slots = reinterpret_cast<const bf16*>(x) + i * 16;
    for (int64_t p = 0; p < g.count; p += 32)
      for (int64_t r = 0; r < height; r += few_rows)
        unit.multiply(memory.narrow + r * rows_stride, rows_stride, slots + p * stride, 16 * stride, g.count - p > 16,
                      count, sums + r * g.sums_stride + p, g.sums_stride);
  }

  static void take(const W* tile, int64_t C, int64_t height, W* sums, int64_t stride) {
    for (int64_t r = 0; r < height; r++)
      for (int64_t c = 0; c < C; c++) sums[r * stride + c] += tile[r * C + c];
  }
};

// y_s = W_{e(s)} x_s for matrices that `source` knows: make(e, o, begin, end, ahead, to) writes those columns of row
// o of W_e, in the wide type, and asks for what the experts share `ahead` numbers further on. Where direct() says so, multiply<C>(e, o, rows, x, stride, sums) does without for up to tile_rows
// rows and C slots. A slot of no expert gets 0.
template <class T, class Source>
void product_by_rows(const T* x, const int64_t* expert, T* y, int64_t S, int64_t E, int64_t O, int64_t I,
                     int64_t threads, const Source& source) {
  Slots slots(expert, S, E);
  Product<T, Source> product(source, slots, E, O, I, threads);
  Scratch<wide_t<T>> packed(product.packed_size);
  if (slots.starts[E] < S) std::fill(y, y + S * O, T{});
#pragma omp parallel num_threads(threads)
  {
    product.pack(x, packed);
    typename Product<T, Source>::Memory memory(product);
    std::unique_ptr<MatrixUnit> unit(product.matrix_unit ? new MatrixUnit : nullptr);
#pragma omp for schedule(dynamic)
    for (int64_t o = 0; o < O; o += product.row_block)
      product.rows(o, std::min(product.row_block, O - o), packed, memory, unit.get(), y);
  }
}

// Rows begin … end of W_e, in the storage type.
template <class T, class Source>
void made_rows(const Source& source, T* to, int64_t e, int64_t I, int64_t begin, int64_t end, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t o = begin; o < end; o++) source.make(e, o, 0, I, tile_rows * I, to + (o - begin) * I);
}

}  // namespace ders
