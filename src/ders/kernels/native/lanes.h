// Vectors of the machine's width, scratch memory, and slots in the order of their experts.
//
// S slots, E experts, I/O in/out features. T is a storage type, W the wide type sums are kept in.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

#include "common.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace ders {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int vector_registers = 32;
#else
constexpr int vector_registers = 16;
#endif

template <class W> constexpr int machine_lanes = vector_bytes / int(sizeof(W));

template <class W, int N> struct vector_of { typedef W type __attribute__((vector_size(N * sizeof(W)))); };
// N numbers side by side, N a power of two and no more than machine_lanes.
template <class W, int N = machine_lanes<W>> using vec = typename vector_of<W, N>::type;

template <class V, class T> inline V read(const T* from) {
  constexpr int N = sizeof(V) / sizeof(std::declval<V>()[0]);
  using W = std::remove_cvref_t<decltype(std::declval<V>()[0])>;
  if constexpr (std::is_same_v<T, W>) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, bf16> && N == 16) {  // in one step, where the compiler sees four
    __m256i bits;
    std::memcpy(&bits, from, sizeof bits);
    return (V)((vec<uint32_t, N>)_mm512_maskz_cvtepu16_epi32(0xffff, bits) << 16);
#endif
  } else if constexpr (std::is_same_v<T, bf16>) {
    vec<uint16_t, N> bits;
    std::memcpy(&bits, from, sizeof bits);
    return std::bit_cast<V>(__builtin_convertvector(bits, vec<uint32_t, N>) << 16);
  } else {
    vec<T, N> v;
    std::memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, V);
  }
}

template <class V, class T> inline void write(T* to, V v) {
  constexpr int N = sizeof(V) / sizeof(v[0]);
  using W = std::remove_cvref_t<decltype(v[0])>;
  if constexpr (std::is_same_v<T, W>) {
    std::memcpy(to, &v, sizeof v);
  } else if constexpr (std::is_same_v<T, bf16>) {
#if defined(__AVX512BF16__)
    if constexpr (N == 16) {
      __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
      std::memcpy(to, &rounded, sizeof rounded);
      return;
    }
#endif
    for (int i = 0; i < N; i++) store(to[i], v[i]);
  } else {
    auto rounded = __builtin_convertvector(v, vec<T, N>);
    std::memcpy(to, &rounded, sizeof rounded);
  }
}

// Every stride-th number.
template <class W> inline vec<W> gathered(const W* from, int64_t stride) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<W, float>) {
    vec<int32_t> places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    // The unmasked one warns of a register that it leaves undefined.
    return (vec<W>)_mm512_mask_i32gather_ps(__m512{}, 0xffff, (__m512i)(places * int32_t(stride)), from, sizeof(W));
  }
#endif
  vec<W> v;
  for (int i = 0; i < machine_lanes<W>; i++) v[i] = from[i * stride];
  return v;
}

// Every second of the numbers of a and b, the even and the odd ones, added: N such trees of N vectors sum each of them.
template <class V, size_t... i> inline V added_pairs(V a, V b, std::index_sequence<i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (2 * i)...) + __builtin_shufflevector(a, b, (2 * i + 1)...);
#else
  using index = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  vec<index, sizeof...(i)> even = {index(2 * i)...}, odd = {index(2 * i + 1)...};
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
}

// {Σ rows[0], Σ rows[1], …}: as many rows as each has numbers.
template <class W> inline vec<W> row_sums(vec<W>* rows) {
  constexpr int N = machine_lanes<W>;
  for (int left = N; left > 1; left /= 2)
    for (int i = 0; i < left / 2; i++) rows[i] = added_pairs(rows[2 * i], rows[2 * i + 1], std::make_index_sequence<N>());
  return rows[0];
}

// Ask for memory that is needed soon, into the second cache: more requests can be under way to there. Any address will do.
template <class T> inline void fetch(const T* at) { __builtin_prefetch(at, 0, 2); }

// A pointer that takes the type of the parameter it is passed for.
struct Pointer {
  template <class T> operator T*() const { return static_cast<T*>(address); }
  void* address;
};

inline int64_t padded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Scratch memory, not initialised; a cache line's alignment.
template <class W> struct Scratch {
  explicit Scratch(int64_t count)
      : memory(static_cast<W*>(std::aligned_alloc(64, padded(std::max<int64_t>(count, 1) * sizeof(W), 64)))) {}
  ~Scratch() { std::free(memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  W* operator+(int64_t offset) const { return memory + offset; }
  W& operator[](int64_t i) const { return memory[i]; }
  W* memory;
};

// Slots by expert, in their own order within each: those of expert e are order[starts[e]] … order[starts[e + 1] − 1].
// A slot of no expert (an index outside 0 … E − 1) is left out.
struct Slots {
  Slots(const int64_t* expert_S, int64_t num_slots, int64_t num_experts) : starts(num_experts + 1), order(num_slots) {
    auto known = [&](int64_t s) { return expert_S[s] >= 0 && expert_S[s] < num_experts; };
    for (int64_t s = 0; s < num_slots; s++)
      if (known(s)) starts[expert_S[s] + 1]++;
    for (int64_t e = 0; e < num_experts; e++) starts[e + 1] += starts[e];
    std::vector<int64_t> next(starts);
    for (int64_t s = 0; s < num_slots; s++)
      if (known(s)) order[next[expert_S[s]]++] = s;
  }
  std::vector<int64_t> starts, order;
};

}  // namespace ders
