// What lies between the two products with the shared base, for thin deltas: one pass over the hidden width per token,
// in pieces that stay in the first-level cache. The backward pass recomputes it.
//
// Names as in mix.py: T tokens, K choices, E experts, F hidden width, C columns of an input projection's result, R rank,
// N entries. A part is the gate or the up half of the input projections.
#include <memory>

#include "common.h"

namespace ders {

constexpr int64_t kPiece = 512;
enum Activation { kSilu, kGelu, kGeluTanh, kRelu };

inline double exponential(double x) { return std::exp(x); }
inline float exponential(float x) {
  // 2^n · e^r with |r| ≤ ln 2 / 2: to about one unit in the last place, and it vectorises.
  x = x < -87.f ? -87.f : x > 87.f ? 87.f : x;
  float n = __builtin_rintf(x * 1.44269504f);
  float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return p * std::bit_cast<float>((int32_t(n) + 127) << 23);
}

inline double error_function(double x) { return std::erf(x); }
inline float error_function(float x) {
  // Abramowitz and Stegun, 7.1.26: 1.5e-7 everywhere.
  float a = x < 0 ? -x : x, t = 1.f / (1.f + 0.3275911f * a);
  float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  float y = 1.f - p * exponential(-a * a);
  return x < 0 ? -y : y;
}

// y = act(x), and its slope where `slope` is given.
template <class A, class Function> void each(const A* x, A* y, A* slope, int64_t n, Function function) {
  if (slope) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) function(x[i], y[i], slope[i]);
  } else {
    A unused;
#pragma omp simd private(unused)
    for (int64_t i = 0; i < n; ++i) function(x[i], y[i], unused);
  }
}

template <class A> void activate(int64_t kind, const A* x, A* y, A* slope, int64_t n) {
  switch (kind) {
    case kSilu:
      return each(x, y, slope, n, [](A v, A& to, A& by) {
        A s = A(1) / (A(1) + exponential(-v));
        to = v * s;
        by = s * (A(1) + v * (A(1) - s));
      });
    case kGelu:
      return each(x, y, slope, n, [](A v, A& to, A& by) {
        A below = A(0.5) * (A(1) + error_function(v * A(0.70710678118654752440)));
        to = v * below;
        by = below + v * A(0.39894228040143267794) * exponential(-A(0.5) * v * v);
      });
    case kGeluTanh:
      return each(x, y, slope, n, [](A v, A& to, A& by) {
        const A c = A(0.79788456080286535588), q = A(0.044715);
        A t = A(1) - A(2) / (A(1) + exponential(A(2) * c * (v + q * v * v * v)));
        to = A(0.5) * v * (A(1) + t);
        by = A(0.5) * (A(1) + t) + A(0.5) * v * (A(1) - t * t) * c * (A(1) + A(3) * q * v * v);
      });
    case kRelu:
      return each(x, y, slope, n, [](A v, A& to, A& by) {
        to = v > 0 ? v : A(0);
        by = v > 0 ? A(1) : A(0);
      });
  }
}

template <class T, class A> A dot(const T* a, const A* b, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += load(a[i]) * b[i];
  return sum;
}

template <class A> void add(A* to, const A* from, A scale, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += scale * from[i];
}

// to += Σ_r scale(r) · row r, four rows at a time: each then costs a load, not a load and a store.
template <class A, class Row, class Scale> void add_rows(A* to, int64_t rows, int64_t n, Row row, Scale scale) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    auto *r0 = row(r), *r1 = row(r + 1), *r2 = row(r + 2), *r3 = row(r + 3);
    A s0 = scale(r), s1 = scale(r + 1), s2 = scale(r + 2), s3 = scale(r + 3);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] += (s0 * load(r0[i]) + s1 * load(r1[i])) + (s2 * load(r2[i]) + s3 * load(r3[i]));
  }
  for (; r < rows; ++r) {
    auto* from = row(r);
    A s = scale(r);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] += s * load(from[i]);
  }
}

// sum(r) += row r · x, four rows at a time.
template <class A, class Row, class Sum> void dot_rows(const A* x, int64_t rows, int64_t n, Row row, Sum sum) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    auto *r0 = row(r), *r1 = row(r + 1), *r2 = row(r + 2), *r3 = row(r + 3);
    A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < n; ++i) {
      s0 += load(r0[i]) * x[i];
      s1 += load(r1[i]) * x[i];
      s2 += load(r2[i]) * x[i];
      s3 += load(r3[i]) * x[i];
    }
    sum(r, s0), sum(r + 1, s1), sum(r + 2, s2), sum(r + 3, s3);
  }
  for (; r < rows; ++r) sum(r, dot(row(r), x, n));
}

// What every kind of delta shares. Sizes come as one array, in this order.
template <class T> struct Problem {
  int64_t tokens, top_k, experts, hidden, matrices, gated, activation, biased;
  int64_t columns;  // C, equal for all input projections
  const T* const* pre;
  const int64_t* index;
  const wide_t<T>* gates;
  const T* const* biases;

  Problem(const int64_t* sizes, const T* const* pre, const int64_t* index, const wide_t<T>* gates, const T* const* biases)
      : tokens(sizes[0]), top_k(sizes[1]), experts(sizes[2]), hidden(sizes[3]), matrices(sizes[4]), gated(sizes[5]),
        activation(sizes[6]), biased(sizes[7]), pre(pre), index(index), gates(gates), biases(biases) {
    columns = gated && matrices == 1 ? 2 * hidden : hidden;
  }
  int64_t parts() const { return gated ? 2 : 1; }
  int64_t matrix(int64_t part) const { return matrices == 1 ? 0 : part; }
  int64_t offset(int64_t part) const { return matrices == 1 ? part * hidden : 0; }
  std::vector<char> used() const {
    std::vector<char> hit(experts, 0);
    for (int64_t s = 0; s < tokens * top_k; ++s) hit[index[s]] = 1;
    return hit;
  }
  int64_t useful_threads(int64_t threads) const { return tokens < 4 ? 1 : threads < tokens ? threads : tokens; }
};

// Low-rank deltas: z = A x comes from outside, and so does B applied to what the output projection's A gives.
template <class T> struct LowRank {
  using A = wide_t<T>;
  const Problem<T>& p;
  int64_t rank;
  const T* const* z;
  const T* a_out;
  std::vector<std::vector<A>> b;  // (E, R, C): B with its long side last

  LowRank(const Problem<T>& p, int64_t rank, const T* const* z, const T* const* b_ECR, const T* a_out)
      : p(p), rank(rank), z(z), a_out(a_out), b(p.matrices) {
    auto used = p.used();
    for (int64_t m = 0; m < p.matrices; ++m) {
      b[m].resize(p.experts * rank * p.columns);
      for (int64_t e = 0; e < p.experts; ++e) {
        if (!used[e]) continue;
        for (int64_t r = 0; r < rank; ++r)
          for (int64_t c = 0; c < p.columns; ++c)
            b[m][(e * rank + r) * p.columns + c] = load(b_ECR[m][(e * p.columns + c) * rank + r]);
      }
    }
  }
  int64_t slot(int64_t t, int64_t e, int64_t r) const { return (t * p.experts + e) * rank + r; }

  struct Forward {
    const LowRank& d;
    T* z_out;
    std::vector<A> sum;
    Forward(const LowRank& d, T* z_out) : d(d), z_out(z_out), sum(d.p.experts * d.rank) {}
    void begin(int64_t) { std::fill(sum.begin(), sum.end(), A(0)); }
    void add_input(int64_t t, int64_t, int64_t e, int64_t part, int64_t from, int64_t n, A* to) {
      d.add_input(t, e, part, from, n, to);
    }
    void take_hidden(int64_t, int64_t, int64_t e, A gate, int64_t from, int64_t n, const A* h) {
      dot_rows(h, d.rank, n, [&](int64_t r) { return d.a_out + (e * d.rank + r) * d.p.hidden + from; },
               [&](int64_t r, A found) { sum[e * d.rank + r] += gate * found; });
    }
    void end(int64_t t) {
      for (size_t i = 0; i < sum.size(); ++i) store(z_out[t * sum.size() + i], sum[i]);
    }
  };

  void add_input(int64_t t, int64_t e, int64_t part, int64_t from, int64_t n, A* to) const {
    int64_t m = p.matrix(part);
    const A* rows = &b[m][e * rank * p.columns + p.offset(part) + from];
    add_rows(to, rank, n, [&](int64_t r) { return rows + r * p.columns; },
             [&](int64_t r) { return A(load(z[m][slot(t, e, r)])); });
  }

  // Gradients. Those of B and A are sums over tokens: each thread has its own.
  struct Backward {
    const LowRank& d;
    const T* grad_z_out;
    T* const* d_z;
    std::vector<std::vector<A>> z_sum, b_sum;
    std::vector<A> a_sum;
    Backward(const LowRank& d, const T* grad_z_out, T* const* d_z)
        : d(d), grad_z_out(grad_z_out), d_z(d_z), z_sum(d.p.matrices), b_sum(d.p.matrices),
          a_sum(d.p.experts * d.rank * d.p.hidden) {
      for (auto& sum : z_sum) sum.resize(d.p.experts * d.rank);
      for (auto& sum : b_sum) sum.resize(d.p.experts * d.rank * d.p.columns);
    }
    void begin(int64_t) {
      for (auto& sum : z_sum) std::fill(sum.begin(), sum.end(), A(0));
    }
    void add_input(int64_t t, int64_t, int64_t e, int64_t part, int64_t from, int64_t n, A* to) {
      d.add_input(t, e, part, from, n, to);
    }
    // to += Δ_outᵀ (gradient of what the output deltas gave)
    void add_output(int64_t t, int64_t, int64_t e, int64_t from, int64_t n, A* to) {
      add_rows(to, d.rank, n, [&](int64_t r) { return d.a_out + (e * d.rank + r) * d.p.hidden + from; },
               [&](int64_t r) { return A(load(grad_z_out[d.slot(t, e, r)])); });
    }
    void take_hidden(int64_t t, int64_t, int64_t e, A gate, int64_t from, int64_t n, const A* h) {
      for (int64_t r = 0; r < d.rank; ++r)
        add(&a_sum[(e * d.rank + r) * d.p.hidden + from], h, A(gate * load(grad_z_out[d.slot(t, e, r)])), n);
    }
    void take_input(int64_t t, int64_t, int64_t e, int64_t part, int64_t from, int64_t n, const A* grad) {
      int64_t m = d.p.matrix(part), first = e * d.rank * d.p.columns + d.p.offset(part) + from;
      dot_rows(grad, d.rank, n, [&](int64_t r) { return &d.b[m][first + r * d.p.columns]; },
               [&](int64_t r, A found) { z_sum[m][e * d.rank + r] += found; });
      for (int64_t r = 0; r < d.rank; ++r)
        add(&b_sum[m][first + r * d.p.columns], grad, A(load(d.z[m][d.slot(t, e, r)])), n);
    }
    void end(int64_t t) {
      for (int64_t m = 0; m < d.p.matrices; ++m)
        for (size_t i = 0; i < z_sum[m].size(); ++i) store(d_z[m][t * z_sum[m].size() + i], z_sum[m][i]);
    }
  };
};

// Sparse deltas: a handful of entries a matrix, one multiplication each.
template <class T> struct Sparse {
  using A = wide_t<T>;
  const Problem<T>& p;
  int64_t in, out;
  const int64_t* kept;  // N of each matrix, the output projection's last
  const T* x;
  const T* const* values;
  const int32_t* const* columns;
  const int32_t* const* starts;
  const int32_t* const* rows;

  Sparse(const Problem<T>& p, int64_t in, int64_t out, const int64_t* kept, const T* x, const T* const* values,
         const int32_t* const* columns, const int32_t* const* starts, const int32_t* const* rows)
      : p(p), in(in), out(out), kept(kept), x(x), values(values), columns(columns), starts(starts), rows(rows) {}
  int64_t row_count(int64_t m) const { return m == p.matrices ? out : p.columns; }
  // Calls f(n, row, column, value) for the entries of expert e in rows [from, to).
  template <class Function> void entries(int64_t m, int64_t e, int64_t from, int64_t to, Function f) const {
    const int32_t* start = starts[m] + e * (row_count(m) + 1);
    int64_t base = e * kept[m];
    for (int64_t n = start[from]; n < start[to]; ++n)
      f(base + n, rows[m][base + n], columns[m][base + n], A(load(values[m][base + n])));
  }
  void add_input(const A* read, int64_t e, int64_t part, int64_t from, int64_t n, A* to) const {
    int64_t first = p.offset(part) + from;
    entries(p.matrix(part), e, first, first + n, [&](int64_t, int32_t row, int32_t column, A value) {
      to[row - first] += value * read[column];
    });
  }

  struct Forward {
    const Sparse& d;
    T* y;
    std::vector<A> read, sum, hidden;
    Forward(const Sparse& d, T* y) : d(d), y(y), read(d.in), sum(d.out), hidden(d.p.hidden * d.p.top_k) {}
    void begin(int64_t t) {
      for (int64_t i = 0; i < d.in; ++i) read[i] = load(d.x[t * d.in + i]);
    }
    void add_input(int64_t, int64_t, int64_t e, int64_t part, int64_t from, int64_t n, A* to) {
      d.add_input(read.data(), e, part, from, n, to);
    }
    void take_hidden(int64_t, int64_t k, int64_t, A, int64_t from, int64_t n, const A* h) {
      std::memcpy(&hidden[k * d.p.hidden + from], h, n * sizeof(A));
    }
    void end(int64_t t) {
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t k = 0; k < d.p.top_k; ++k) {
        A gate = d.p.gates[t * d.p.top_k + k];
        if (gate == 0) continue;
        const A* h = &hidden[k * d.p.hidden];
        d.entries(d.p.matrices, d.p.index[t * d.p.top_k + k], 0, d.out,
                  [&](int64_t, int32_t row, int32_t column, A value) { sum[row] += gate * value * h[column]; });
      }
      for (int64_t o = 0; o < d.out; ++o) store(y[t * d.out + o], sum[o]);
    }
  };

  struct Backward {
    const Sparse& d;
    const T* grad_y;
    T* d_x;
    std::vector<A> read, written, x_sum, hidden, back;
    std::vector<std::vector<A>> value_sums;
    Backward(const Sparse& d, const T* grad_y, T* d_x)
        : d(d), grad_y(grad_y), d_x(d_x), read(d.in), written(d.out), x_sum(d.in), hidden(d.p.hidden * d.p.top_k),
          back(d.p.hidden * d.p.top_k), value_sums(d.p.matrices + 1) {
      for (int64_t m = 0; m <= d.p.matrices; ++m) value_sums[m].resize(d.p.experts * d.kept[m]);
    }
    void begin(int64_t t) {
      for (int64_t i = 0; i < d.in; ++i) read[i] = load(d.x[t * d.in + i]);
      for (int64_t o = 0; o < d.out; ++o) written[o] = load(grad_y[t * d.out + o]);
      std::fill(x_sum.begin(), x_sum.end(), A(0));
      std::fill(back.begin(), back.end(), A(0));
      for (int64_t k = 0; k < d.p.top_k; ++k)
        d.entries(d.p.matrices, d.p.index[t * d.p.top_k + k], 0, d.out,
                  [&](int64_t, int32_t row, int32_t column, A value) { back[k * d.p.hidden + column] += value * written[row]; });
    }
    void add_input(int64_t, int64_t, int64_t e, int64_t part, int64_t from, int64_t n, A* to) {
      d.add_input(read.data(), e, part, from, n, to);
    }
    void add_output(int64_t, int64_t k, int64_t, int64_t from, int64_t n, A* to) {
      add(to, &back[k * d.p.hidden + from], A(1), n);
    }
    void take_hidden(int64_t, int64_t k, int64_t, A, int64_t from, int64_t n, const A* h) {
      std::memcpy(&hidden[k * d.p.hidden + from], h, n * sizeof(A));
    }
    void take_input(int64_t, int64_t, int64_t e, int64_t part, int64_t from, int64_t n, const A* grad) {
      int64_t m = d.p.matrix(part), first = d.p.offset(part) + from;
      A* sums = value_sums[m].data();
      d.entries(m, e, first, first + n, [&](int64_t at, int32_t row, int32_t column, A value) {
        sums[at] += grad[row - first] * read[column];
        x_sum[column] += value * grad[row - first];
      });
    }
    void end(int64_t t) {
      A* sums = value_sums[d.p.matrices].data();
      for (int64_t k = 0; k < d.p.top_k; ++k) {
        A gate = d.p.gates[t * d.p.top_k + k];
        const A* h = &hidden[k * d.p.hidden];
        d.entries(d.p.matrices, d.p.index[t * d.p.top_k + k], 0, d.out,
                  [&](int64_t at, int32_t row, int32_t column, A) { sums[at] += gate * written[row] * h[column]; });
      }
      for (int64_t i = 0; i < d.in; ++i) store(d_x[t * d.in + i], x_sum[i]);
    }
  };
};

// Deltas of any kind, applied outside slot by slot: Δ x (T·K, C) comes in, and g h (T·K, F) goes out.
template <class T> struct Slots {
  using A = wide_t<T>;
  const Problem<T>& p;
  const T* const* deltas;
  int64_t input(int64_t t, int64_t k, int64_t part, int64_t from) const {
    return (t * p.top_k + k) * p.columns + p.offset(part) + from;
  }
  int64_t hidden(int64_t t, int64_t k, int64_t from) const { return (t * p.top_k + k) * p.hidden + from; }
  void add_input(int64_t t, int64_t k, int64_t part, int64_t from, int64_t n, A* to) const {
    const T* own = deltas[p.matrix(part)] + input(t, k, part, from);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] += load(own[i]);
  }

  struct Forward {
    const Slots& d;
    T* h_out;
    Forward(const Slots& d, T* h_out) : d(d), h_out(h_out) {}
    void begin(int64_t t) {
      for (int64_t k = 0; k < d.p.top_k; ++k)
        if (d.p.gates[t * d.p.top_k + k] == 0) std::memset(h_out + d.hidden(t, k, 0), 0, d.p.hidden * sizeof(T));
    }
    void add_input(int64_t t, int64_t k, int64_t, int64_t part, int64_t from, int64_t n, A* to) {
      d.add_input(t, k, part, from, n, to);
    }
    void take_hidden(int64_t t, int64_t k, int64_t, A gate, int64_t from, int64_t n, const A* h) {
      T* to = h_out + d.hidden(t, k, from);
      for (int64_t i = 0; i < n; ++i) store(to[i], gate * h[i]);
    }
    void end(int64_t) {}
  };

  struct Backward {
    const Slots& d;
    const T* grad_h;
    T* const* d_deltas;
    Backward(const Slots& d, const T* grad_h, T* const* d_deltas) : d(d), grad_h(grad_h), d_deltas(d_deltas) {}
    void begin(int64_t) {}
    void add_input(int64_t t, int64_t k, int64_t, int64_t part, int64_t from, int64_t n, A* to) {
      d.add_input(t, k, part, from, n, to);
    }
    void add_output(int64_t t, int64_t k, int64_t, int64_t from, int64_t n, A* to) {
      const T* own = grad_h + d.hidden(t, k, from);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] += load(own[i]);
    }
    void take_hidden(int64_t, int64_t, int64_t, A, int64_t, int64_t, const A*) {}
    void take_input(int64_t t, int64_t k, int64_t, int64_t part, int64_t from, int64_t n, const A* grad) {
      T* to = d_deltas[d.p.matrix(part)] + d.input(t, k, part, from);
      for (int64_t i = 0; i < n; ++i) store(to[i], grad[i]);
    }
    void end(int64_t) {}
  };
};

// One piece of one choice's activations, before them: base, bias and delta of a part.
template <class T, class Hooks>
void before_activation(const Problem<T>& p, Hooks& hooks, int64_t t, int64_t k, int64_t part, int64_t from, int64_t n,
                       wide_t<T>* to) {
  int64_t e = p.index[t * p.top_k + k];
  int64_t m = p.matrix(part), at = p.offset(part) + from;
  const T* base = p.pre[m] + t * p.columns + at;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = load(base[i]);
  if (p.biased) {
    const T* bias = p.biases[m] + e * p.columns + at;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] += load(bias[i]);
  }
  hooks.add_input(t, k, e, part, from, n, to);
}

template <class T, class Delta, class Output>
void forward(const Problem<T>& p, const Delta& delta, T* hbar, Output* output, int64_t threads) {
  using A = wide_t<T>;
  threads = p.useful_threads(threads);
#pragma omp parallel num_threads(threads)
  {
    typename Delta::Forward hooks(delta, output);
    A part[2][kPiece], h[kPiece], sum[kPiece];
    Range mine = share(p.tokens, omp_get_thread_num(), threads);
    for (int64_t t = mine.begin; t < mine.end; ++t) {
      hooks.begin(t);
      for (int64_t from = 0; from < p.hidden; from += kPiece) {
        int64_t n = p.hidden - from < kPiece ? p.hidden - from : kPiece;
        std::fill(sum, sum + n, A(0));
        for (int64_t k = 0; k < p.top_k; ++k) {
          A gate = p.gates[t * p.top_k + k];
          if (gate == 0) continue;
          int64_t e = p.index[t * p.top_k + k];
          for (int64_t q = 0; q < p.parts(); ++q) before_activation(p, hooks, t, k, q, from, n, part[q]);
          activate(p.activation, part[0], h, static_cast<A*>(nullptr), n);
          if (p.gated) {
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) h[i] *= part[1][i];
          }
          add(sum, h, gate, n);
          hooks.take_hidden(t, k, e, gate, from, n, h);
        }
        for (int64_t i = 0; i < n; ++i) store(hbar[t * p.hidden + from + i], sum[i]);
      }
      hooks.end(t);
    }
  }
}

// Runs the backward pass and leaves each thread's hooks, which hold its share of the sums over tokens.
template <class T, class Delta, class GradOutput, class GradInput>
std::vector<std::unique_ptr<typename Delta::Backward>> backward(const Problem<T>& p, const Delta& delta, const T* grad_hbar,
                                                                const GradOutput* grad_output, GradInput grad_input,
                                                                T* const* d_pre, wide_t<T>* d_gates, wide_t<T>* const* d_biases,
                                                                int64_t threads) {
  using A = wide_t<T>;
  threads = p.useful_threads(threads);
  std::vector<std::unique_ptr<typename Delta::Backward>> all(threads);
  std::vector<std::vector<A>> bias_sums(threads);
#pragma omp parallel num_threads(threads)
  {
    int64_t thread = omp_get_thread_num();
    all[thread] = std::make_unique<typename Delta::Backward>(delta, grad_output, grad_input);
    auto& hooks = *all[thread];
    auto& bias_sum = bias_sums[thread];
    if (p.biased) bias_sum.resize(p.matrices * p.experts * p.columns);
    A part[2][kPiece], h[kPiece], act[kPiece], slope[kPiece], grad[kPiece], sums[2][kPiece];
    Range mine = share(p.tokens, thread, threads);
    for (int64_t t = mine.begin; t < mine.end; ++t) {
      hooks.begin(t);
      for (int64_t k = 0; k < p.top_k; ++k) d_gates[t * p.top_k + k] = 0;
      for (int64_t from = 0; from < p.hidden; from += kPiece) {
        int64_t n = p.hidden - from < kPiece ? p.hidden - from : kPiece;
        for (int64_t q = 0; q < p.parts(); ++q) std::fill(sums[q], sums[q] + n, A(0));
        for (int64_t k = 0; k < p.top_k; ++k) {
          A gate = p.gates[t * p.top_k + k];
          int64_t e = p.index[t * p.top_k + k];
          for (int64_t q = 0; q < p.parts(); ++q) before_activation(p, hooks, t, k, q, from, n, part[q]);
          activate(p.activation, part[0], act, slope, n);
          const T* from_outside = grad_hbar + t * p.hidden + from;
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) grad[i] = load(from_outside[i]);
          hooks.add_output(t, k, e, from, n, grad);
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) h[i] = p.gated ? act[i] * part[1][i] : act[i];
          d_gates[t * p.top_k + k] += dot(grad, h, n);
          hooks.take_hidden(t, k, e, gate, from, n, h);
          // The gradients of the parts, in their own place.
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) {
            A through = gate * grad[i], up = part[1][i];
            part[0][i] = p.gated ? through * up * slope[i] : through * slope[i];
            part[1][i] = through * act[i];
          }
          for (int64_t q = 0; q < p.parts(); ++q) {
            hooks.take_input(t, k, e, q, from, n, part[q]);
            add(sums[q], part[q], A(1), n);
            if (p.biased) add(&bias_sum[(p.matrix(q) * p.experts + e) * p.columns + p.offset(q) + from], part[q], A(1), n);
          }
        }
        for (int64_t q = 0; q < p.parts(); ++q) {
          T* to = d_pre[p.matrix(q)] + t * p.columns + p.offset(q) + from;
          for (int64_t i = 0; i < n; ++i) store(to[i], sums[q][i]);
        }
      }
      hooks.end(t);
    }
  }
  if (p.biased)
    for (int64_t m = 0; m < p.matrices; ++m)
      for (auto& sum : bias_sums) add(d_biases[m], &sum[m * p.experts * p.columns], A(1), p.experts * p.columns);
  return all;
}

template <class T>
void mix_low_rank(const int64_t* sizes, const T* const* pre, const int64_t* index, const wide_t<T>* gates,
                  const T* const* biases, const T* const* z, const T* const* b, const T* a_out, int64_t rank, T* hbar,
                  T* z_out, int64_t threads) {
  Problem<T> p(sizes, pre, index, gates, biases);
  forward(p, LowRank<T>(p, rank, z, b, a_out), hbar, z_out, threads);
}

// d_b, d_a_out and d_biases are zero before.
template <class T>
void mix_low_rank_backward(const int64_t* sizes, const T* const* pre, const int64_t* index, const wide_t<T>* gates,
                           const T* const* biases, const T* const* z, const T* const* b, const T* a_out, int64_t rank,
                           const T* grad_hbar, const T* grad_z_out, T* const* d_pre, T* const* d_z, wide_t<T>* d_gates,
                           wide_t<T>* const* d_b, wide_t<T>* d_a_out, wide_t<T>* const* d_biases, int64_t threads) {
  using A = wide_t<T>;
  Problem<T> p(sizes, pre, index, gates, biases);
  LowRank<T> delta(p, rank, z, b, a_out);
  for (auto& mine : backward(p, delta, grad_hbar, grad_z_out, d_z, d_pre, d_gates, d_biases, threads)) {
    for (int64_t m = 0; m < p.matrices; ++m)
      for (int64_t er = 0; er < p.experts * rank; ++er)
        for (int64_t c = 0; c < p.columns; ++c)
          d_b[m][(er / rank * p.columns + c) * rank + er % rank] += mine->b_sum[m][er * p.columns + c];
    add(d_a_out, mine->a_sum.data(), A(1), mine->a_sum.size());
  }
}

template <class T>
void mix_sparse(const int64_t* sizes, const T* const* pre, const int64_t* index, const wide_t<T>* gates,
                const T* const* biases, const T* x, const T* const* values, const int32_t* const* columns,
                const int32_t* const* starts, const int32_t* const* rows, const int64_t* kept, int64_t in, int64_t out, T* hbar, T* y, int64_t threads) {
  Problem<T> p(sizes, pre, index, gates, biases);
  forward(p, Sparse<T>(p, in, out, kept, x, values, columns, starts, rows), hbar, y, threads);
}

// d_values and d_biases are zero before.
template <class T>
void mix_sparse_backward(const int64_t* sizes, const T* const* pre, const int64_t* index, const wide_t<T>* gates,
                         const T* const* biases, const T* x, const T* const* values, const int32_t* const* columns,
                         const int32_t* const* starts, const int32_t* const* rows, const int64_t* kept, int64_t in, int64_t out, const T* grad_hbar,
                         const T* grad_y, T* const* d_pre, T* d_x, wide_t<T>* d_gates, wide_t<T>* const* d_values,
                         wide_t<T>* const* d_biases, int64_t threads) {
  using A = wide_t<T>;
  Problem<T> p(sizes, pre, index, gates, biases);
  Sparse<T> delta(p, in, out, kept, x, values, columns, starts, rows);
  for (auto& mine : backward(p, delta, grad_hbar, grad_y, d_x, d_pre, d_gates, d_biases, threads))
    for (int64_t m = 0; m <= p.matrices; ++m) add(d_values[m], mine->value_sums[m].data(), A(1), mine->value_sums[m].size());
}

template <class T>
void mix_slots(const int64_t* sizes, const T* const* pre, const int64_t* index, const wide_t<T>* gates, const T* const* biases,
               const T* const* deltas, T* hbar, T* h_out, int64_t threads) {
  Problem<T> p(sizes, pre, index, gates, biases);
  forward(p, Slots<T>{p, deltas}, hbar, h_out, threads);
}

template <class T>
void mix_slots_backward(const int64_t* sizes, const T* const* pre, const int64_t* index, const wide_t<T>* gates,
                        const T* const* biases, const T* const* deltas, const T* grad_hbar, const T* grad_h, T* const* d_pre,
                        T* const* d_deltas, wide_t<T>* d_gates, wide_t<T>* const* d_biases, int64_t threads) {
  Problem<T> p(sizes, pre, index, gates, biases);
  backward(p, Slots<T>{p, deltas}, grad_hbar, grad_h, d_deltas, d_pre, d_gates, d_biases, threads);
}

}  // namespace ders

#define PROBLEM(T) \
  const int64_t *sizes, const T *const *pre, const int64_t *index, const ders::wide_t<T> *gates, const T *const *biases
#define LOW_RANK(T) const T *const *z, const T *const *b, const T *a_out, int64_t rank
#define SPARSE(T)                                                                                                     \
  const T *x, const T *const *values, const int32_t *const *columns, const int32_t *const *starts,                    \
      const int32_t *const *rows, const int64_t *kept, int64_t in, int64_t out
#define GRADIENTS(T) const T *grad_hbar, const T *grad_output, T *const *d_pre
#define EXPORT(T, suffix)                                                                                             \
  extern "C" void ders_mix_low_rank_##suffix(PROBLEM(T), LOW_RANK(T), T* hbar, T* output, int64_t threads) {          \
    ders::mix_low_rank<T>(sizes, pre, index, gates, biases, z, b, a_out, rank, hbar, output, threads);                \
  }                                                                                                                   \
  extern "C" void ders_mix_low_rank_backward_##suffix(PROBLEM(T), LOW_RANK(T), GRADIENTS(T), T* const* d_z,           \
                                                      ders::wide_t<T>* d_gates, ders::wide_t<T>* const* d_b,          \
                                                      ders::wide_t<T>* d_a_out, ders::wide_t<T>* const* d_biases,     \
                                                      int64_t threads) {                                              \
    ders::mix_low_rank_backward<T>(sizes, pre, index, gates, biases, z, b, a_out, rank, grad_hbar, grad_output, d_pre, \
                                   d_z, d_gates, d_b, d_a_out, d_biases, threads);                                    \
  }                                                                                                                   \
  extern "C" void ders_mix_sparse_##suffix(PROBLEM(T), SPARSE(T), T* hbar, T* output, int64_t threads) {              \
    ders::mix_sparse<T>(sizes, pre, index, gates, biases, x, values, columns, starts, rows, kept, in, out, hbar,      \
                        output, threads);                                                                             \
  }                                                                                                                   \
  extern "C" void ders_mix_sparse_backward_##suffix(PROBLEM(T), SPARSE(T), GRADIENTS(T), T* d_x,                      \
                                                    ders::wide_t<T>* d_gates, ders::wide_t<T>* const* d_values,       \
                                                    ders::wide_t<T>* const* d_biases, int64_t threads) {              \
    ders::mix_sparse_backward<T>(sizes, pre, index, gates, biases, x, values, columns, starts, rows, kept, in, out,   \
                                 grad_hbar, grad_output, d_pre, d_x, d_gates, d_values, d_biases, threads);           \
  }                                                                                                                   \
  extern "C" void ders_mix_slots_##suffix(PROBLEM(T), const T* const* deltas, T* hbar, T* output, int64_t threads) {  \
    ders::mix_slots<T>(sizes, pre, index, gates, biases, deltas, hbar, output, threads);                              \
  }                                                                                                                   \
  extern "C" void ders_mix_slots_backward_##suffix(PROBLEM(T), const T* const* deltas, GRADIENTS(T),                  \
                                                   T* const* d_deltas, ders::wide_t<T>* d_gates,                      \
                                                   ders::wide_t<T>* const* d_biases, int64_t threads) {               \
    ders::mix_slots_backward<T>(sizes, pre, index, gates, biases, deltas, grad_hbar, grad_output, d_pre, d_deltas,    \
                                d_gates, d_biases, threads);                                                          \
  }

EXPORT(float, f32)
EXPORT(double, f64)
EXPORT(ders::bf16, bf16)
EXPORT(_Float16, f16)
