// Storage types, the wider types sums are kept in, and what vectorises.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

namespace ders {

struct bf16 {
  uint16_t bits;
};

// The type of sums and activations: float, double for double.
template <class T> struct wide { using type = float; };
template <> struct wide<double> { using type = double; };
template <class T> using wide_t = typename wide<T>::type;

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(_Float16 x) { return float(x); }
inline float load(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

inline void store(float& to, float x) { to = x; }
inline void store(double& to, double x) { to = x; }
inline void store(_Float16& to, float x) { to = _Float16(x); }
inline void store(bf16& to, float x) {
  // To nearest, ties to even; the carry may reach the exponent, as it should. NaN keeps a bit of its payload.
  uint32_t bits = std::bit_cast<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

// The part of [0, count) that belongs to a thread: fixed by the counts alone, so results do not depend on timing.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t count, int64_t thread, int64_t threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace ders

// One exported function per storage type: DERS_EXPORT(name, (parameters), (arguments)) calls name<T>(arguments).
#define DERS_EXPORT_ONE(name, type, suffix, parameters, arguments) \
  extern "C" void ders_##name##_##suffix parameters { ders::name<type> arguments; }
#define DERS_EXPORT(name, parameters, arguments)                    \
  DERS_EXPORT_ONE(name, float, f32, parameters, arguments)          \
  DERS_EXPORT_ONE(name, double, f64, parameters, arguments)         \
  DERS_EXPORT_ONE(name, ders::bf16, bf16, parameters, arguments)    \
  DERS_EXPORT_ONE(name, _Float16, f16, parameters, arguments)
