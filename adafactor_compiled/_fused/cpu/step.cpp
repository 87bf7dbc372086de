// One Adafactor step of all members of a table, in one parallel region.
//
// The numbered steps are those of _update/reference.py. What a build chooses: PARAM, GRAD and MOMENTUM, the types of parameter,
// gradient and momentum, A without one; MOVES, whether there is one; ROUNDING and CAUTIOUS. State and arithmetic are of type
// A, sums over blocks of type double.
//
// A member has parts, each read by one thread: groups of rows of a matrix, else slices of it or chunks of a vector. First come
// the *statistics* of all parts, which write nothing but scratch; then *finish*, which knows both RMS; then every part is
// *applied*, by the thread that took its statistics and the last first, as that one is still in its cache. Large members are
// stepped by all threads, one after the other; small ones by a thread each. What is summed, and in which order, depends on the
// shape alone: any number of threads gives the same bits.
//
// Of a parameter that several ranks share, a member is a piece. A call takes its statistics and writes what the ranks add up,
// the next one, when they have, goes on from there. No option of the build lets the compiler assume that numbers are finite, or
// reorder sums but where a loop says so.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif

#define SIMD _Pragma("omp simd")
#define INLINED __attribute__((always_inline))

namespace {

// Types.

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
using P = PARAM;
using G = GRAD;
using A = std::conditional_t<std::is_same_v<P, double>, double, float>;
using M = MOMENTUM;
template <class T> constexpr bool HALF = std::is_same_v<T, bf16> || std::is_same_v<T, f16>;
using N = std::conditional_t<HALF<P> || !MOVES, P, M>;  // what the noise is for, as in rounding.half_of
constexpr bool ROUNDS = ROUNDING && HALF<N>;

template <class To, class From> inline INLINED To cast(From x) { To y; std::memcpy(&y, &x, sizeof y); return y; }
template <class T> inline INLINED A load(T x) { return (A)x; }
inline INLINED A load(bf16 x) { return cast<float>((uint32_t)x.bits << 16); }
inline INLINED A load(f16 x) {
  const uint32_t magnitude = (uint32_t)(x.bits & 0x7fff) << 13, sign = (uint32_t)(x.bits & 0x8000) << 16;
  const uint32_t finite = cast<uint32_t>(cast<float>(magnitude) * 0x1p112f);
  return cast<float>((magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000 : finite) | sign);
}

// To nearest, ties to even.
template <class T> inline INLINED void narrow(T &to, A x) { to = (T)x; }
inline INLINED void narrow(bf16 &to, A x) {
  const float y = (float)x;
  const uint32_t bits = cast<uint32_t>(y);
  to.bits = y != y ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline INLINED void narrow(f16 &to, A x) {
  const float y = (float)x;
  const uint32_t bits = cast<uint32_t>(y), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  const uint32_t subnormal = cast<uint32_t>(cast<float>(magnitude) + 0.5f) - cast<uint32_t>(0.5f);
  const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  to.bits = (uint16_t)(sign | (magnitude >= 0x477ff000 ? large : magnitude < 113u << 23 ? subnormal : normal));
}

// Tables: what a step finds anew, as _fused/members.py reads it, and how members are cut, as layout.py decides.

struct Pointers { P *p; const G *g; A *row, *col; M *exp_avg; A *rms, *update_rms; int64_t numbers; };
struct Member {
  int64_t at;  // its row of the pointers
  int64_t kind, swapped, slices, rows, columns;
  int64_t parts, per, block;  // per: rows, slices or elements of a part; block: rows that stay in cache between two reads
  int64_t inner, outer_stride, row_stride, column_stride;  // of kernels of convolutions whose lanes lie side by side
};
enum { MATRIX, LANES, VECTOR, TWICE };
// What ranks add up, in the order of exchange.py, or null for what is no piece, and how many elements agree; what they split of
// rows and columns; sizes of the whole; where that lies which a call keeps for the next.
struct Piece { double *sums, *agree; int64_t split, numel, rows, columns, kept; };
enum { NEITHER, ROWS, COLUMNS };
enum { PARAM_SQ, NONFINITE, REST };  // in its sums
enum { STATISTICS, COUNT, STEP };  // what a call does; of members that are no pieces the last one does all
struct Numbers {
  double lr, beta2, one_minus_beta2, eps, min_scale, scale_parameter, clip_threshold, beta1, one_minus_beta1, weight_decay;
  double decay_by_lr, sign, skips_nonfinite;
};
constexpr double LEAST_SHARE = LEAST;  // numbers.py
struct Launch {  // as in launches.py
  const Member *members;
  Piece *pieces;
  int64_t count, large;
  int64_t scratch_each, room_each, kept_bytes;  // of scratch two for large members, then a room for each thread
  const Pointers *pointers;
  const Numbers *numbers;
  const int32_t *draws;
  int64_t *skipped;
  char *scratch, *kept;
  int64_t call, shared, threads, next;  // shared: whether any member is a piece
  int arrived, round;  // where threads wait for one another
};

// Stochastic rounding, as in rounding.py.

constexpr uint32_t GOLDEN = 0x9E3779B9, FIRST_MULTIPLIER = 0x21F0AAAD, SECOND_MULTIPLIER = 0x735A2D97;
constexpr int CUT = std::is_same_v<N, bf16> ? 16 : 13;
struct Draws { uint32_t key[3], first[3], step; };
inline INLINED uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * FIRST_MULTIPLIER;
  x = (x ^ x >> 15) * SECOND_MULTIPLIER;
  return x ^ x >> 15;
}
inline INLINED uint32_t place(const Draws &d, int axis, int64_t i) {
  return ((uint32_t)i + d.first[axis]) * GOLDEN + mixed(d.key[axis] + d.step * GOLDEN);
}
struct Along { float scale, shift; };
inline INLINED Along along(const Draws &d, int axis, int64_t slice, int64_t i) {
  const uint32_t bits = mixed(place(d, axis, i) ^ mixed(place(d, 0, slice)));
  const float scale = (float)std::min(std::max((int32_t)(bits & 2047) - 1024, -1020), 1020) * 0x1p-6f;
  return {scale, ((float)(((int32_t)bits >> (33 - CUT)) * 2) + 0.5f) * (1.0f / (1 << CUT))};
}
inline INLINED float between(Along row, Along column) { return row.scale * column.scale + (row.shift + column.shift); }
template <class T> inline INLINED float rounded(float x, float noise) {
  const float fraction = noise - ((noise + 12582912.0f) - 12582912.0f);
  constexpr int digits = std::is_same_v<T, bf16> ? 7 : 10;
  // Of the numbers of T around x, with its sign, from its exponent: rounding.py's products would not stay exact if contracted.
  float spacing = cast<float>(cast<uint32_t>(x) & 0xff800000) * (1.0f / (1 << digits));
  if (std::is_same_v<T, f16>) spacing = std::max(std::fabs(spacing), 0x1p-24f);
  const float large = spacing * 12582912.0f, result = ((x + fraction * spacing) + large) - large;
  return std::is_same_v<T, f16> && !(std::fabs(x) < 65504.0f) ? x : result;
}
template <class T> inline INLINED void write(T &to, A x, float noise) {
  if constexpr (ROUNDS && HALF<T>) narrow(to, rounded<T>((float)x, noise));
  else narrow(to, x);
}

// A member and what a step knows of it.

struct Sums { double param_sq, nonfinite, update_sq, row_sum, agree; };
struct Step {
  const Member &x;
  Pointers at;
  const Numbers &n;
  const Piece *piece;  // or null
  int64_t split = NEITHER;
  double rows, columns, numel;  // of the whole
  Draws draws;
  A beta2, rest, eps, beta1, one_minus_beta1, sign;
  A scale = 0, decay = 0, share = 1;  // from finish
  Step(const Launch &l, const Member &x)
      : x(x), at(l.pointers[x.at]), n(l.numbers[at.numbers]), piece(l.pieces[x.at].sums ? l.pieces + x.at : nullptr),
        rows(x.rows), columns(x.columns), numel((double)x.slices * x.rows * x.columns), beta2((A)n.beta2),
        rest((A)n.one_minus_beta2), eps((A)n.eps), beta1((A)n.beta1), one_minus_beta1((A)n.one_minus_beta1), sign((A)n.sign) {
    if (piece) split = piece->split, numel = piece->numel;
    if (split) rows = piece->rows, columns = piece->columns;
    if (x.swapped || x.kind == TWICE) std::swap(at.row, at.col);  // of two copies the columns are read
    if (ROUNDS) {
      std::memcpy(&draws, l.draws + 7 * x.at, sizeof draws);
      if (x.swapped) std::swap(draws.key[1], draws.key[2]), std::swap(draws.first[1], draws.first[2]);
    }
  }
  A average(A before, A mean_sq) const { return before * beta2 + (mean_sq + eps) * rest; }
};

// 8 to 10, of an element: its update in, parameter and momentum out. COUNT: only whether the update agrees with the gradient.
template <bool COUNT> inline INLINED int step_element(const Step &s, P &p, const G &g, M *m, A update, float noise) {
  if (MOVES) {
    update = load(*m) * s.beta1 + update * s.one_minus_beta1;
    if (!COUNT) write(*m, update, noise);
  }
  if (CAUTIOUS) {
    const A x = load(g) * s.sign;
    const bool agrees = (update > 0 && x > 0) || (update < 0 && x < 0);
    if (COUNT) return agrees;
    update *= (A)agrees / s.share;
  }
  const A before = load(p);
  write(p, before - ((s.decay != 0 ? before * s.decay : 0) + update), noise);
  return 0;
}
template <class F> inline INLINED int for_each(int64_t n, const F &f) {
  int total = 0;
  #pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; j++) total += f(j);
  return total;
}
struct Pair { A x, y; };
// Two sums of type double of sums of type A of SPAN numbers each, or one.
template <int SPAN, class F> inline INLINED void add_up(int64_t n, double &x, double &y, const F &f) {
  for (int64_t start = 0; start < n; start += SPAN) {
    const int64_t end = std::min(n, start + SPAN);
    A of_x = 0, of_y = 0;
    #pragma omp simd reduction(+ : of_x, of_y)
    for (int64_t j = start; j < end; j++) {
      const Pair of = f(j);
      of_x += of.x, of_y += of.y;
    }
    x += of_x, y += of_y;
  }
}
template <int SPAN, class F> inline INLINED double sum_of(int64_t n, const F &f) {
  double sum = 0, none = 0;
  add_up<SPAN>(n, sum, none, [&](int64_t j) INLINED { return Pair{f(j), 0}; });
  return sum;
}

// Of a member, in the scratch of a thread or of all; of a piece what a call leaves for the next is kept.
template <class T> inline T *taken(char *&from, int64_t count) {
  T *x = (T *)from;
  from += (count * sizeof(T) + 63) / 64 * 64;
  return x;
}
constexpr int64_t CHUNK = 256;  // columns that a thread finishes in one go
struct Range { int64_t slice, begin, end; };
inline int64_t ranges(int64_t count, int64_t per) { return std::max((int64_t)1, (count + per - 1) / per); }
inline Range range_of(int64_t k, int64_t count, int64_t per) {
  const int64_t each = ranges(count, per), begin = k % each * per;
  return {k / each, begin, std::min(count, begin + per)};
}
struct Scratch {
  Sums *sums;  // of parts
  A *new_row, *new_col, *factor;  // one over the roots of the columns
  float *scale, *shift;  // their noise
  double *row_sum;  // of slices
  double *update_sq;  // of chunks of columns, or of rows
  double *columns;  // of groups of rows: sums of squares in the columns, plain and weighted
  A *block;  // the same of a block of rows
  Scratch(const Member &x, const Piece &piece, char *&scratch, char *&kept) {
    const int64_t rows = x.slices * x.rows, columns_ = x.slices * x.columns;
    sums = taken<Sums>(kept, x.parts);
    if (x.kind != MATRIX) return;
    new_row = taken<A>(kept, rows), new_col = taken<A>(kept, columns_), factor = taken<A>(kept, columns_);
    scale = taken<float>(kept, ROUNDS ? columns_ : 0), shift = taken<float>(kept, ROUNDS ? columns_ : 0);
    row_sum = piece.sums && piece.split == ROWS ? piece.sums + REST : taken<double>(kept, x.slices);
    update_sq = taken<double>(scratch, x.slices * ranges(std::max(x.rows, x.columns), CHUNK));
    columns = taken<double>(scratch, x.parts * 2 * x.columns), block = taken<A>(scratch, x.parts * 2 * x.columns);
  }
};

// Matrices: groups of rows, whose sums of columns are added up before any row is applied.

// Rows r0 to r1 of a slice: new rows and the sums of their columns, plain and of each row divided by its new average, added to
// `sq`. Rows go in fours that lie a quarter of the block apart: eight streams are as many reads that miss at a time. The next
// four are fetched while the columns of these, in the first-level cache, are summed.
static void rows_statistics(const Step &s, const Scratch &of, int64_t slice, int64_t r0, int64_t r1, A *sq, Sums &sums) {
  constexpr int64_t SPAN = 4096;  // columns that are summed in one go
  const int64_t R = s.x.rows, C = s.x.columns, q = (r1 - r0) / 4;
  const P *p = s.at.p + slice * R * C;
  const G *g = s.at.g + slice * R * C;
  A *weighted = sq + C;
  const auto new_row = [&](int64_t i, double of_row) {
    const A v = of.new_row[slice * R + i] = s.average(s.at.row[slice * R + i], (A)(of_row / C));
    sums.row_sum += v;
    return 1 / v;
  };
  for (int64_t i = r0; i < r0 + q; i++) {
    const G *g0 = g + i * C, *g1 = g0 + q * C, *g2 = g1 + q * C, *g3 = g2 + q * C;
    const P *p0 = p + i * C, *p1 = p0 + q * C, *p2 = p1 + q * C, *p3 = p2 + q * C;
    double of_rows[4] = {};
    for (int64_t start = 0; start < C; start += SPAN) {
      const int64_t end = std::min(C, start + SPAN);
      A s0 = 0, s1 = 0, s2 = 0, s3 = 0, q0 = 0, q1 = 0, q2 = 0, q3 = 0;
      #pragma omp simd reduction(+ : s0, s1, s2, s3, q0, q1, q2, q3)
      for (int64_t j = start; j < end; j++) {
        const A a = load(g0[j]), b = load(g1[j]), c = load(g2[j]), d = load(g3[j]);
        s0 += a * a, s1 += b * b, s2 += c * c, s3 += d * d;
        const A e = load(p0[j]), f = load(p1[j]), h = load(p2[j]), k = load(p3[j]);
        q0 += e * e, q1 += f * f, q2 += h * h, q3 += k * k;
      }
      of_rows[0] += s0, of_rows[1] += s1, of_rows[2] += s2, of_rows[3] += s3;
      sums.param_sq += (double)q0 + q1 + q2 + q3;
    }
    A w[4];
    for (int k = 0; k < 4; k++) w[k] = new_row(i + k * q, of_rows[k]);
    const auto add_columns = [&](int64_t from, int64_t to) INLINED {
      SIMD for (int64_t j = from; j < to; j++) {
        const A a = load(g0[j]), b = load(g1[j]), c = load(g2[j]), d = load(g3[j]);
        const A aa = a * a, bb = b * b, cc = c * c, dd = d * d;
        sq[j] += (aa + bb) + (cc + dd);
        weighted[j] += (aa * w[0] + bb * w[1]) + (cc * w[2] + dd * w[3]);
      }
    };
    constexpr int64_t LINE = 64 / sizeof(A);
    int64_t j = 0;
    for (; j + LINE <= C; j += LINE) {
      for (const G *x : {g0, g1, g2, g3}) __builtin_prefetch(x + j + C, 0, 2);
      for (const P *x : {p0, p1, p2, p3}) __builtin_prefetch(x + j + C, 0, 2);
      add_columns(j, j + LINE);
    }
    add_columns(j, C);
  }
  for (int64_t i = r0 + 4 * q; i < r1; i++) {
    double of_row = 0;
    add_up<SPAN>(C, of_row, sums.param_sq, [&](int64_t j) INLINED {
      const A a = load(g[i * C + j]), e = load(p[i * C + j]);
      return Pair{a * a, e * e};
    });
    const A w = new_row(i, of_row);
    SIMD for (int64_t j = 0; j < C; j++) {
      const A a = load(g[i * C + j]);
      sq[j] += a * a, weighted[j] += a * a * w;
    }
  }
}
static void group_statistics(const Step &s, const Scratch &of, int64_t k) {
  const int64_t C = s.x.columns;
  const Range in = range_of(k, s.x.rows, s.x.per);
  double *total = of.columns + k * 2 * C;
  A *block = of.block + k * 2 * C;
  Sums sums = {};
  std::fill(total, total + 2 * C, 0.0);
  for (int64_t i = in.begin; i < in.end; i += s.x.block) {
    std::fill(block, block + 2 * C, (A)0);
    rows_statistics(s, of, in.slice, i, std::min(in.end, i + s.x.block), block, sums);
    SIMD for (int64_t j = 0; j < 2 * C; j++) total[j] += block[j];
  }
  of.sums[k] = sums;
}
// A chunk of the new averages of columns, or of rows where columns are split, from the sums of all; and the sum of the squares
// of the update, but for the row mean.
static void new_averages(const Step &s, const Scratch &of, int64_t k, bool of_rows) {
  const Member &x = s.x;
  const int64_t count = of_rows ? x.rows : x.columns;
  const Range in = range_of(k, count, CHUNK);
  const int64_t at = in.slice * count;
  const double *sq = of.columns + in.slice * (x.parts / x.slices) * 2 * count, *weighted = sq + count;
  if (of_rows || s.split == ROWS) sq = s.piece->sums + REST + (of_rows ? 0 : x.slices) + at, weighted = sq + x.slices * count;
  const A *old = (of_rows ? s.at.row : s.at.col) + at;
  A *fresh = (of_rows ? of.new_row : of.new_col) + at, *factor = of.factor + at;
  float *scale = of.scale + at, *shift = of.shift + at;
  const double over = of_rows ? s.columns : s.rows;
  double update_sq = 0;
  #pragma omp simd reduction(+ : update_sq)
  for (int64_t j = in.begin; j < in.end; j++) {
    const A v = fresh[j] = s.average(old[j], (A)(sq[j] / over));
    update_sq += (double)((A)weighted[j] / v);
  }
  of.update_sq[k] = update_sq;
  if (of_rows) return;
  SIMD for (int64_t j = in.begin; j < in.end; j++) factor[j] = 1 / std::sqrt(fresh[j]);
  if (!ROUNDS) return;
  SIMD for (int64_t j = in.begin; j < in.end; j++) {
    const Along noise = along(s.draws, 2, in.slice, j);
    scale[j] = noise.scale, shift[j] = noise.shift;
  }
}
// A chunk of columns of all groups: added up and finished, or, where rows are split, put where ranks add them up.
static void columns_of_groups(const Step &s, const Scratch &of, int64_t k) {
  const Member &x = s.x;
  const int64_t C = x.columns, groups = x.parts / x.slices;
  const Range in = range_of(k, C, CHUNK);
  double *total = of.columns + in.slice * groups * 2 * C;
  for (int64_t i = 1; i < groups; i++) {
    const double *other = total + i * 2 * C;
    SIMD for (int64_t j = in.begin; j < in.end; j++) total[j] += other[j], total[C + j] += other[C + j];
  }
  if (in.begin == 0) {
    of.row_sum[in.slice] = 0;
    for (int64_t i = 0; i < groups; i++) of.row_sum[in.slice] += of.sums[in.slice * groups + i].row_sum;
  }
  if (s.split != ROWS) return new_averages(s, of, k, false);
  double *sq = s.piece->sums + REST + x.slices + in.slice * C, *weighted = sq + x.slices * C;
  std::copy(total + in.begin, total + in.end, sq + in.begin);
  std::copy(total + C + in.begin, total + C + in.end, weighted + in.begin);
}
// Where columns are split, of the rows of a group: sums of their squares, plain and each divided by its column's new average.
static void weighted_rows(const Step &s, const Scratch &of, int64_t k) {
  const int64_t C = s.x.columns, R = s.x.rows;
  const Range in = range_of(k, R, s.x.per);
  const A *new_col = of.new_col + in.slice * C;
  for (int64_t i = in.slice * R + in.begin; i < in.slice * R + in.end; i++) {
    double *sq = s.piece->sums + REST + i, *weighted = sq + s.x.slices * R;
    *sq = *weighted = 0;
    add_up<4096>(C, *sq, *weighted, [&](int64_t j) INLINED {
      const A g = load(s.at.g[i * C + j]);
      return Pair{g * g, g * g / new_col[j]};
    });
  }
}
template <bool COUNT> static double group_apply(const Step s, const Scratch &of, int64_t k) {
  const int64_t C = s.x.columns, block = s.x.block;
  const Range in = range_of(k, s.x.rows, s.x.per);
  const A *new_row = of.new_row + in.slice * s.x.rows, root_mean = (A)std::sqrt(of.row_sum[in.slice] / s.rows);
  const A *new_col = of.new_col + in.slice * C, *factor = of.factor + in.slice * C;
  const float *scale = of.scale + in.slice * C, *shift = of.shift + in.slice * C;
  struct Row { P *p; const G *g; M *m; A factor; Along noise; };
  const auto row = [&](int64_t i) INLINED {
    const int64_t at = (in.slice * s.x.rows + i) * C;
    return Row{s.at.p + at, s.at.g + at, s.at.exp_avg + at, s.scale * root_mean / std::sqrt(new_row[i]),
               ROUNDS ? along(s.draws, 1, in.slice, i) : Along{}};
  };
  const auto step = [&](const Row &x, int64_t j) INLINED {
    const float noise = ROUNDS && !COUNT ? between(x.noise, {scale[j], shift[j]}) : 0;
    return step_element<COUNT>(s, x.p[j], x.g[j], x.m + j, load(x.g[j]) * x.factor * factor[j], noise);
  };
  double agree = 0;
  for (int64_t r0 = in.begin + (in.end - in.begin - 1) / block * block; r0 >= in.begin; r0 -= block) {
    const int64_t r1 = std::min(in.end, r0 + block);
    const int64_t pairs = MOVES || ROUNDS ? 0 : (r1 - r0) / 2;  // four streams; with a momentum there are three in one row
    for (int64_t i = r0; i < r0 + pairs; i++) {
      const Row x = row(i), y = row(i + pairs);
      agree += for_each(C, [&](int64_t j) INLINED { return step(x, j) + step(y, j); });
    }
    for (int64_t i = r0 + 2 * pairs; i < r1; i++) {
      const Row x = row(i);
      agree += for_each(C, [&](int64_t j) INLINED { return step(x, j); });
    }
  }
  if (!COUNT) std::copy(new_row + in.begin, new_row + in.end, s.at.row + in.slice * s.x.rows + in.begin);
  if (!COUNT && in.begin == 0) std::copy(new_col, new_col + C, s.at.col + in.slice * C);
  return agree;
}

// Kernels of convolutions: slices of a few elements, as many at a time as a vector has lanes.

constexpr int WIDTH = 64 / sizeof(A), MOST = 256;  // lanes; elements of a slice
typedef A V __attribute__((vector_size(64)));

template <bool BACK, class T> inline INLINED void move(T &x, T &y) { BACK ? x = y : y = x; }
// Each third number to a run of its own, `apart` from the next, or back: of constant length, two permutations a vector.
template <bool BACK, class T> inline INLINED void thirds(T *x, T *to, int count, int apart) {
  SIMD for (int k = 0; k < count; k++)
    move<BACK>(x[3 * k], to[k]), move<BACK>(x[3 * k + 1], to[apart + k]), move<BACK>(x[3 * k + 2], to[2 * apart + k]);
}
// Numbers of w slices, `each` of them in a row, to lanes or back. Those of 3 x 3 kernels are turned in vectors, twice by three.
template <bool BACK, class T> static void turn(T *x, T *lanes, int each, int w) {
  constexpr int third = 3 * WIDTH;
  T between[9 * WIDTH];
  if (each == 9 && w == WIDTH) {
    if (!BACK) thirds<BACK>(x, between, third, third);
    for (int j = 0; j < 3; j++) thirds<BACK>(between + j * third, lanes + j * WIDTH, WIDTH, third);
    if (BACK) thirds<BACK>(x, between, third, third);
  } else if (each == 3 && w == WIDTH) {
    thirds<BACK>(x, lanes, WIDTH, WIDTH);
  } else {
    for (int k = 0; k < w; k++) for (int e = 0; e < each; e++) move<BACK>(x[k * each + e], lanes[e * WIDTH + k]);
  }
}

// Some slices from n on, in a row or, as in channels_last, side by side. Lanes from w on hold anything.
struct Tile {
  const Step &s;
  const int R, C, E, w;
  const int64_t n;
  const bool beside;
  const int runs, length;  // of what lies in a row
  V elements[MOST], averages[MOST + 1], *row = averages, *col = averages + R, row_sum = {};
  A in_a_row[MOST * WIDTH], *flat = beside ? (A *)elements : in_a_row;  // the elements as they lie in memory
  Tile(const Step &s, int64_t n, int64_t end)
      : s(s), R((int)s.x.rows), C((int)s.x.columns), E(R * C),
        w((int)std::min({(int64_t)WIDTH, end - n, s.x.inner - n % s.x.inner})), n(n), beside(s.x.outer_stride),
        runs(beside ? E : 1), length(beside ? w : w * E) {}
  int64_t at(int run) const {
    if (!beside) return n * E;
    return n / s.x.inner * s.x.outer_stride + n % s.x.inner + run / C * s.x.row_stride + run % C * s.x.column_stride;
  }
  // 5, with the squares left among the elements: `count` averages of `size` elements each.
  void average(A *old, V *to, int count, int apart, int size, int next) {
    turn<false>(old + n * count, (A *)to, count, w);
    for (int i = 0; i < count; i++) {
      V sq = elements[i * apart];
      for (int j = 1; j < size; j++) sq += elements[i * apart + j * next];
      to[i] = to[i] * s.beta2 + (sq * ((A)1 / size) + s.eps) * s.rest;
    }
  }
  void averages_of_squares() {
    for (int run = 0; run < runs; run++) {
      const G *g = s.at.g + at(run);
      A *to = flat + run * WIDTH;
      SIMD for (int k = 0; k < length; k++) to[k] = load(g[k]) * load(g[k]);
    }
    if (!beside) turn<false>(flat, (A *)elements, E, w);
    average(s.at.row, row, R, C, C, 1), average(s.at.col, col, C, 1, R, C);
    for (int i = 0; i < R; i++) row_sum += row[i];
  }
  // Fetched ahead, or reads that miss are what it waits for; apply then waits for its roots and divisions.
  void statistics(Sums &sums) {
    constexpr int AHEAD = 1024;
    for (int k = 0; !beside && k < w * E; k += WIDTH)
      __builtin_prefetch(s.at.g + n * E + AHEAD + k, 0, 2), __builtin_prefetch(s.at.p + n * E + AHEAD + k, 0, 2);
    averages_of_squares();
    V update_sq = {};
    for (int j = 0; j < C; j++) col[j] = 1 / col[j];
    for (int i = 0; i < R; i++) {
      V of_row = elements[i * C] * col[0];
      for (int j = 1; j < C; j++) of_row += elements[i * C + j] * col[j];
      update_sq += of_row / row[i];
    }
    update_sq *= row_sum;  // beside large rows, their ratio to one without gradient overflows
    const A *of = (const A *)&update_sq;
    sums.update_sq += (A)sum_of<WIDTH>(WIDTH, [&](int64_t k) INLINED { return k < w ? of[k] : 0; }) / R;
    for (int run = 0; run < runs; run++) {
      const P *p = s.at.p + at(run);
      sums.param_sq += sum_of<MOST * WIDTH>(length, [&](int64_t k) INLINED { return load(p[k]) * load(p[k]); });
    }
  }
  template <bool COUNT> double apply() {
    averages_of_squares();
    if (!COUNT) turn<true>(s.at.row + n * R, (A *)row, R, w), turn<true>(s.at.col + n * C, (A *)col, C, w);
    V of_slice = row_sum * ((A)1 / R);
    A *of = (A *)&of_slice, *x = (A *)averages;
    SIMD for (int k = 0; k < WIDTH; k++) of[k] = s.scale * std::sqrt(of[k]);  // the lanes of a V, one by one, stay scalar
    SIMD for (int k = 0; k < (R + C) * WIDTH; k++) x[k] = 1 / std::sqrt(x[k]);
    for (int e = 0; e < E; e++) elements[e] = row[e / C] * of_slice * col[e % C];
    if (!beside) turn<true>(flat, (A *)elements, E, w);
    float lanes[ROUNDS ? MOST * WIDTH : 1], in_order[ROUNDS ? MOST * WIDTH : 1], *noise = beside ? lanes : in_order;
    if (ROUNDS && !COUNT) {
      for (int e = 0; e < E; e++)
        SIMD for (int k = 0; k < WIDTH; k++)
          lanes[e * WIDTH + k] = between(along(s.draws, 1, n + k, e / C), along(s.draws, 2, n + k, e % C));
      if (!beside) turn<true>(in_order, lanes, E, w);
    }
    double agree = 0;
    for (int run = 0; run < runs; run++) {
      P *p = s.at.p + at(run);
      const G *g = s.at.g + at(run);
      M *m = s.at.exp_avg + at(run);
      agree += for_each(length, [&, of = run * WIDTH](int64_t k) INLINED {
        return step_element<COUNT>(s, p[k], g[k], m + k, load(g[k]) * flat[of + k], ROUNDS ? noise[of + k] : 0);
      });
    }
    return agree;
  }
};

// What keeps its whole second moment: vectors, and kernels of one element, whose row and column are two copies of it.

// Halves that lie apart are read at a time: six streams take two thirds of the time of three.
template <bool TWO> static void vector_statistics(const Step s, int64_t begin, int64_t end, Sums &sums) {
  const int64_t half = (end - begin) / 2;
  const auto squares = [&](int64_t j) INLINED {
    const A p = load(s.at.p[j]), g = load(s.at.g[j]), average = s.average(s.at.row[j], g * g);
    // Where a square overflows, a row that is infinite is NaN in the end.
    return Pair{p * p, TWO ? g * g / average : g * (g / average)};
  };
  add_up<512>(half, sums.param_sq, sums.update_sq, [&](int64_t k) INLINED {
    const Pair x = squares(begin + k), y = squares(begin + half + k);
    return Pair{x.x + y.x, x.y + y.y};
  });
  add_up<512>((end - begin) % 2, sums.param_sq, sums.update_sq, [&](int64_t) INLINED { return squares(end - 1); });
}
template <bool TWO, bool COUNT> static double vector_apply(const Step s, int64_t begin, int64_t end) {
  A *v = s.at.row, *twin = s.at.col;
  const Along row = ROUNDS && !TWO ? along(s.draws, 1, 0, 0) : Along{};
  double agree = 0;
  for (int64_t start = begin; start < end; start += 512) {
    const int64_t stop = std::min(end, start + 512);
    agree += for_each(stop - start, [&](int64_t k) INLINED {
      const int64_t j = start + k;
      const A g = load(s.at.g[j]), average = s.average(v[j], g * g);
      A update = g * (s.scale / std::sqrt(average));
      if (TWO) update += average - average;
      if (!COUNT) v[j] = average;
      float noise = 0;
      if (ROUNDS && !COUNT) noise = between(TWO ? along(s.draws, 1, j, 0) : row, along(s.draws, 2, TWO ? j : 0, TWO ? 0 : j));
      return step_element<COUNT>(s, s.at.p[j], s.at.g[j], s.at.exp_avg + j, update, noise);
    });
    if (TWO && !COUNT) std::copy(v + start, v + stop, twin + start);
  }
  return agree;
}

// A step.

template <class F> inline void for_tiles(const Step &s, const Range &in, const F &f) {
  for (int64_t n = in.begin; n < in.end;) {
    Tile tile(s, n, in.end);
    f(tile), n += tile.w;
  }
}
static Range part_of(const Member &x, int64_t k) { return range_of(k, x.kind == LANES ? x.slices : x.columns, x.per); }
static void part_statistics(const Step &s, const Scratch &of, int64_t k) {
  if (s.x.kind == MATRIX) return group_statistics(s, of, k);
  const Range in = part_of(s.x, k);
  Sums sums = {};
  if (s.x.kind == VECTOR) vector_statistics<false>(s, in.begin, in.end, sums);
  if (s.x.kind == TWICE) vector_statistics<true>(s, in.begin, in.end, sums);
  if (s.x.kind == LANES) for_tiles(s, in, [&](Tile &tile) { tile.statistics(sums); });
  of.sums[k] = sums;
}
template <bool COUNT> static double part_apply(const Step &s, const Scratch &of, int64_t k) {
  if (s.x.kind == MATRIX) return group_apply<COUNT>(s, of, k);
  const Range in = part_of(s.x, k);
  if (s.x.kind == VECTOR) return vector_apply<false, COUNT>(s, in.begin, in.end);
  if (s.x.kind == TWICE) return vector_apply<true, COUNT>(s, in.begin, in.end);
  double agree = 0;
  for_tiles(s, in, [&](Tile &tile) { agree += tile.apply<COUNT>(); });
  return agree;
}

inline double largest(double x, double y) { return x > y || x != x ? x : y; }  // a NaN stays one
static bool is_finite(const Step &s) {
  const int64_t n = s.x.slices * s.x.rows * s.x.columns;
  return sum_of<512>(n, [&](int64_t j) INLINED { return load(s.at.g[j]) - load(s.at.g[j]); }) == 0;
}
// 2 to 7, as numbers; gives whether the member is stepped. One thread, the owner, writes what is kept of it.
static bool finish(const Launch &l, Step &s, const Sums &sums, bool owner) {
  const Numbers &n = s.n;
  if (owner && sums.nonfinite > 0) l.skipped[s.x.at] = 1;
  if (sums.nonfinite > 0) return false;
  const double rms = std::sqrt(sums.param_sq / s.numel), update_rms = std::sqrt(sums.update_sq / s.numel);
  if (owner) *s.at.rms = (A)rms, *s.at.update_rms = (A)update_rms;
  const double alpha = n.lr * (n.scale_parameter > 0 ? largest(rms, n.min_scale) : 1);
  const double divisor = std::isinf(n.clip_threshold) ? 1 : largest(update_rms / n.clip_threshold, 1);
  s.scale = (A)(n.sign * alpha / divisor), s.decay = (A)(n.weight_decay * (n.decay_by_lr > 0 ? alpha : 1));
  return true;
}

constexpr int SPINS = 2000, YIELDS = 200;
// Of the threads that step a member together, one.
struct Team {
  Launch &l;
  int t, threads;
  int64_t begin(int64_t count) const { return count * t / threads; }
  int64_t end(int64_t count) const { return count * (t + 1) / threads; }
  template <class F> void each(int64_t count, const F &f) const {
    for (int64_t k = begin(count); k < end(count); k++) f(k);
    if (threads > 1) wait();
  }
  // Not OpenMP's barrier: where others have the cores, who waits for a thread that waits for a core should give up its own.
  void wait() const {
    const int round = __atomic_load_n(&l.round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&l.arrived, 1, __ATOMIC_ACQ_REL) == threads) {
      l.arrived = 0;
      __atomic_store_n(&l.round, round + 1, __ATOMIC_RELEASE);
    }
    for (int i = 0; __atomic_load_n(&l.round, __ATOMIC_ACQUIRE) == round; i++) {
      if (i > SPINS + YIELDS) std::this_thread::sleep_for(std::chrono::microseconds(50));
      else if (i > SPINS) std::this_thread::yield();
    }
  }
};
// A team waits for itself at least once in each member, if only for nothing, after which none of it is in the one before.
static void step_member(const Team &team, const Member &x, char *scratch) {
  const Launch &l = team.l;
  Step s(l, x);
  char *kept = l.kept + l.pieces[x.at].kept;
  const Scratch of(x, l.pieces[x.at], scratch, s.piece ? kept : scratch);
  const bool summed = s.piece && l.call != STATISTICS, of_rows = summed && s.split == COLUMNS;
  const int64_t chunks = x.kind == MATRIX ? x.slices * ranges(of_rows ? x.rows : x.columns, CHUNK) : 0;
  Sums total = {};
  if (summed) {
    team.each(s.split ? chunks : 0, [&](int64_t k) { new_averages(s, of, k, of_rows); });
    if (of_rows) team.each(x.slices, [&](int64_t k) {
      of.row_sum[k] = sum_of<CHUNK>(x.rows, [&](int64_t i) INLINED { return of.new_row[k * x.rows + i]; });
    });
    total = {s.piece->sums[PARAM_SQ], s.piece->sums[NONFINITE], s.split ? 0 : s.piece->sums[REST], 0, 0};
  } else {
    team.each(x.parts, [&](int64_t k) { part_statistics(s, of, k); });
    if (chunks) team.each(chunks, [&](int64_t k) { columns_of_groups(s, of, k); });
    if (s.split == COLUMNS) team.each(x.parts, [&](int64_t k) { weighted_rows(s, of, k); });
    for (int64_t k = 0; k < x.parts; k++)
      total.param_sq += of.sums[k].param_sq, total.update_sq += of.sums[k].update_sq, total.row_sum += of.sums[k].row_sum;
  }
  for (int64_t k = 0; k < chunks && summed == (s.split != NEITHER); k++)
    total.update_sq += of.update_sq[k] * (of.row_sum[k / (chunks / x.slices)] / s.rows);
  if (!summed && s.n.skips_nonfinite) total.nonfinite = !std::isfinite(total.update_sq + total.row_sum) && !is_finite(s);
  if (l.call == STATISTICS) {
    double *sums = s.piece->sums;
    if (team.t == 0) sums[PARAM_SQ] = total.param_sq, sums[NONFINITE] = total.nonfinite;
    if (team.t == 0 && !s.split) sums[REST] = total.update_sq;
    return;
  }
  if (!finish(l, s, total, team.t == 0 && l.call == STEP)) return;
  if (CAUTIOUS && !(summed && l.call == STEP)) {
    team.each(x.parts, [&](int64_t k) { of.sums[k].agree = part_apply<true>(s, of, k); });
    for (int64_t k = 0; k < x.parts; k++) total.agree += of.sums[k].agree;
    if (l.call == COUNT && team.t == 0) *s.piece->agree = total.agree;
  }
  if (l.call == COUNT) return;
  if (CAUTIOUS) s.share = (A)std::max((summed ? *s.piece->agree : total.agree) / s.numel, LEAST_SHARE);
  for (int64_t k = team.end(x.parts) - 1; k >= team.begin(x.parts); k--) part_apply<false>(s, of, k);
}
// Scratch of a large member is another one than the last member's, which others may still be applying. What ranks have added
// up is applied in the other order: the last statistics are in cache.
static void step_members(const Team &team) {
  Launch &l = team.l;
  char *room = l.scratch + 2 * l.scratch_each + team.t * l.room_each;
  const bool back = l.shared && l.call != STATISTICS;
  int64_t turn = 0;
  const auto step = [&](const Team &of, int64_t i, char *scratch) {
    const Member &x = l.members[i];
    if (l.call == STEP || l.pieces[x.at].sums) step_member(of, x, scratch);
  };
  const auto large = [&](int64_t i) { step(team, i, l.scratch + turn++ % 2 * l.scratch_each); };
  for (int64_t i = 0; i < l.large && !back; i++) large(i);
  for (int64_t i; (i = l.large + __atomic_fetch_add(&l.next, 1, __ATOMIC_RELAXED)) < l.count;) step({l, 0, 1}, i, room);
  for (int64_t i = l.large - 1; i >= 0 && back; i--) large(i);
}

}  // namespace

// The bytes that a launch takes beside its members: of scratch for a large one, of room for a thread, and kept.
extern "C" void adafactor_sizes(Launch *l) {
  char *kept = nullptr;
  for (int64_t i = 0; i < l->count; i++) {
    Piece &piece = l->pieces[l->members[i].at];
    char *scratch = nullptr;
    piece.kept = (int64_t)kept;
    Scratch(l->members[i], piece, scratch, piece.sums ? kept : scratch);
    int64_t &most = i < l->large ? l->scratch_each : l->room_each;
    most = std::max(most, (int64_t)scratch);
  }
  l->kept_bytes = (int64_t)kept;
}

extern "C" void adafactor_step(Launch *l) {
#ifdef _OPENMP
  if (l->threads > 1) {
    #pragma omp parallel num_threads(l->threads)
    step_members({*l, omp_get_thread_num(), omp_get_num_threads()});  // which may be fewer than were asked for
  } else
#endif
    step_members({*l, 0, 1});  // no region is entered: a forked child has none of the threads
  l->skipped[l->count] = 1;  // all is done, whatever interrupts the caller
}
