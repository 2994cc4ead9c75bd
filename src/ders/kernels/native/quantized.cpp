// Products with E matrices stored as codes of a few bits on evenly spaced grids, alone or on top of a shared matrix.
#include "rows.h"

namespace ders {
namespace {

// What is stored: B bytes a row, G grids a matrix (one, or equally many for each of its O rows).
struct Codes {
  const uint8_t* bytes;
  const float *lows, *steps;
  int64_t O, I, B, G;

  const uint8_t* row(int64_t e, int64_t o) const { return bytes + (e * O + o) * B; }
  int64_t grids_of_row() const { return G <= O ? 1 : G / O; }
  int64_t first_grid(int64_t e, int64_t o) const { return e * G + (G == 1 ? 0 : o * grids_of_row()); }
};

template <int bits> int32_t code(const uint8_t* row, int64_t i) {
  constexpr int together = bits == 3 ? 8 : 8 / bits, bytes = bits == 3 ? 3 : 1;  // as many codes fill as many bytes
  uint32_t word = 0;
  std::memcpy(&word, row + i / together * bytes, bytes);
  return word >> (i % together * bits) & ((1u << bits) - 1);
}

// Where code i, a multiple of eight, begins in a row.
template <int bits> uint64_t byte_of(uint64_t i) { return i * bits / 8; }

// A grid: code c stands for low + c · step.
template <int bits, class W> struct Grid {
  Grid(float low, float step) : low(low), step(step) {}

  W value(const uint8_t* row, int64_t i) const { return low + W(code<bits>(row, i)) * step; }

  // The values of sixteen codes, the first of which begins a byte, plus sixteen shared numbers if there are any.
  template <class T, class To> void write_values(const uint8_t* from, const T* shared, To* to) const {
    W values[16];
    if constexpr (bits == 8) {
      for (int i = 0; i < 16; i++) values[i] = low + W(from[i]) * step;
    } else {
      uint32_t words[2] = {};
      std::memcpy(&words[0], from, bits);
      std::memcpy(&words[1], from + bits, bits);
      for (int h = 0; h < 2; h++)
        for (int i = 0; i < 8; i++)
          values[8 * h + i] = low + W(int32_t(words[h] >> (bits * i) & ((1u << bits) - 1))) * step;
    }
    for (int i = 0; i < 16; i++) store(to[i], shared ? values[i] + load(shared[i]) : values[i]);
  }
  W low, step;
};

#if defined(__AVX512F__)
// Sixteen values at a time, looked up in a register.
template <int bits> struct Grid<bits, float> {
  using Words = vec<uint32_t>;
  static constexpr Words places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  Grid(float low, float step) : low(low - vec<float>{}), step(step - vec<float>{}) {
    table = this->low + number(places & ((1u << bits) - 1)) * this->step;
  }
  static vec<float> number(Words codes) { return __builtin_convertvector(vec<int32_t>(codes), vec<float>); }

  float value(const uint8_t* row, int64_t i) const { return low[0] + float(code<bits>(row, i)) * step[0]; }

  vec<float> values(const uint8_t* from) const {
    if constexpr (bits == 8) {
      __m128i codes;
      std::memcpy(&codes, from, sizeof codes);
      return low + number((Words)_mm512_maskz_cvtepu8_epi32(0xffff, codes)) * step;
    }
    Words words;
    if constexpr (bits <= 2) {
      uint32_t all = 0;
      std::memcpy(&all, from, 2 * bits);
      words = (all | Words{}) >> (places * bits);
    } else {
      // The last eight codes come from the last four bytes; those of three bits begin with the second of these.
      uint32_t first, last;
      std::memcpy(&first, from, 4);
      std::memcpy(&last, from + 2 * bits - 4, 4);
      Words shifts = places % 8 * bits + (bits == 3 ? places / 8 * 8 : Words{});
      words = (places < 8 ? first | Words{} : last | Words{}) >> shifts;
    }
    // By the lowest four bits of each word.
    return (vec<float>)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)words, (__m512)table);
  }
  template <class T, class To> void write_values(const uint8_t* from, const T* shared, To* to) const {
    write(to, shared ? values(from) + read<vec<float>>(shared) : values(from));
  }

  vec<float> low, step, table;
};
#endif

// Calls f(first, last, grid) for the columns of row o between begin and end that share a grid.
template <int bits, class W, class F>
inline void by_grid(const Codes& codes, int64_t e, int64_t o, int64_t begin, int64_t end, F f) {
  int64_t grids = codes.grids_of_row(), size = codes.I / grids, first = codes.first_grid(e, o);
  for (int64_t i = begin; i < end;) {
    int64_t grid = grids == 1 ? 0 : i / size, stop = std::min((grid + 1) * size, end);
    f(i, stop, Grid<bits, W>(codes.lows[first + grid], codes.steps[first + grid]));
    i = stop;
  }
}

// Coded matrices on top of a shared one, as product_by_rows asks for them.
template <int bits, class T> struct Source {
  using W = wide_t<T>;
  Codes codes;
  const T* shared;

  template <class To> void make(int64_t e, int64_t o, int64_t begin, int64_t end, int64_t ahead, To* to) const {
    const uint8_t* row = codes.row(e, o);
    const T* base = shared ? shared + o * codes.I : nullptr;
    to -= begin;
    by_grid<bits, W>(codes, e, o, begin, end, [&](int64_t i, int64_t stop, auto grid) __attribute__((always_inline)) {
      if (i % 16) {
      } else if (shared) {
        for (; i + 16 <= stop; i += 16) {
          fetch(base + i + ahead);
          grid.write_values(row + byte_of<bits>(i), base + i, to + i);
        }
      } else {
        for (; i + 16 <= stop; i += 16) grid.write_values(row + byte_of<bits>(i), base, to + i);
      }
      for (; i < stop; i++) store(to[i], grid.value(row, i) + (shared ? load(base[i]) : W{}));
    });
  }

  // For a few slots of an expert, values go from the register they are looked up in straight to the sums.
#if defined(__AVX512F__)
  bool direct() const { return std::is_same_v<W, float> && codes.I / codes.grids_of_row() % 16 == 0; }
  template <int C> void multiply(int64_t e, int64_t o, int64_t rows, const W* x, int64_t stride, W* sums) const {
    if constexpr (std::is_same_v<W, float>) {
      vec<float> products[16] = {};
      for (int64_t r = 0; r < rows; r++) {
        if (shared)
          multiply_row<C, true>(e, o + r, shared + (o + r) * codes.I, x, stride, products + r * C);
        else
          multiply_row<C, false>(e, o + r, nullptr, x, stride, products + r * C);
      }
      write(sums, row_sums<float>(products));
    }
  }

  template <int C, bool sum>
  void multiply_row(int64_t e, int64_t o, const T* base, const float* x, int64_t stride, vec<float>* products) const {
    using V = vec<float>;
    constexpr int chains = C <= 2 ? 4 : 2;  // sums that do not wait for one another
    const uint8_t* row = codes.row(e, o);
    V sums[chains][C] = {};
    by_grid<bits, W>(codes, e, o, 0, codes.I, [&](int64_t i, int64_t stop, auto grid) __attribute__((always_inline)) {
      auto step = [&](int chain, int64_t i) __attribute__((always_inline)) {
        V values = grid.values(row + byte_of<bits>(i));
        if constexpr (sum) {
          fetch(base + tile_rows * codes.I + i);
          values += read<V>(base + i);
        }
        for (int c = 0; c < C; c++) sums[chain][c] += values * read<V>(x + c * stride + i);
      };
      for (; i + 16 * chains <= stop; i += 16 * chains)
        for (int chain = 0; chain < chains; chain++) step(chain, i + 16 * chain);
      for (; i < stop; i += 16) step(0, i);
    });
    for (int c = 0; c < C; c++) {
      products[c] = sums[0][c];
      for (int chain = 1; chain < chains; chain++) products[c] += sums[chain][c];
    }
  }
#else
  bool direct() const { return false; }
  template <int C> void multiply(int64_t, int64_t, int64_t, const W*, int64_t, W*) const {}
#endif
};

template <class F> void with_bits(int64_t bits, F f) {
  switch (bits) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 8: return f(std::integral_constant<int, 8>());
  }
}

}  // namespace

// y_SO = each slot's x times the matrix of its expert, plus the shared one if there is any; 0 for a slot of no expert.
template <class T>
void coded_product(const T* x, const int64_t* expert, const T* shared, Codes codes, int64_t bits, T* y, int64_t S,
                   int64_t E, int64_t threads) {
  with_bits(bits, [&]<int bits>(std::integral_constant<int, bits>) {
    product_by_rows(x, expert, y, S, E, codes.O, codes.I, threads, Source<bits, T>{codes, shared});
  });
}

// Rows begin … end of matrix e, plus those of the shared one if there is any.
template <class T>
void coded_rows(const T* shared, Codes codes, int64_t bits, T* to, int64_t e, int64_t begin, int64_t end, int64_t threads) {
  with_bits(bits, [&]<int bits>(std::integral_constant<int, bits>) {
    made_rows(Source<bits, T>{codes, shared}, to, e, codes.I, begin, end, threads);
  });
}

}  // namespace ders

using ders::Pointer;

DERS_EXPORT(coded_product,
            (Pointer x, const int64_t* expert, Pointer shared, const uint8_t* bytes, const float* lows,
             const float* steps, Pointer y, int64_t bits, int64_t S, int64_t E, int64_t O, int64_t I, int64_t B,
             int64_t G, int64_t threads),
            (x, expert, shared, {bytes, lows, steps, O, I, B, G}, bits, y, S, E, threads))
DERS_EXPORT(coded_rows,
            (Pointer shared, const uint8_t* bytes, const float* lows, const float* steps, Pointer to, int64_t bits,
             int64_t O, int64_t I, int64_t B, int64_t G, int64_t e, int64_t begin, int64_t end, int64_t threads),
            (shared, {bytes, lows, steps, O, I, B, G}, bits, to, e, begin, end, threads))
