// One Adafactor step of all members of a table, in one parallel region.
//
// The numbered steps are those of _update/reference.py. What a build chooses: PARAM, GRAD and
// MOMENTUM, the types of parameter, gradient and momentum; ROUNDING and CAUTIOUS. State and arithmetic are of type A, sums over
// blocks of type double.
//
// A member has parts, each read by one thread: of a matrix groups of rows, else slices of it or chunks of a vector. First come the
// *statistics* of all parts, which write nothing but scratch; then *finish*, which knows both RMS; then every part is *applied*, by
// the thread that took its statistics and the last first, as that one is still in its cache. Large members are stepped by all
// threads, one after the other; small ones by a thread each. What is summed, and in which order, depends on the shape alone: any
// number of threads gives the same bits.
//
// Of a parameter that several ranks share, a member is a piece. A call takes its statistics and writes what the ranks add up, the
// next one, when they have, goes on from there. No option of the build lets the compiler assume that numbers are finite, or reorder sums
// but where a loop says so.
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
#define INLINE inline __attribute__((always_inline))

namespace {

// Types.

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
using P = PARAM;
using G = GRAD;
using A = std::conditional_t<std::is_same_v<P, double>, double, float>;
#ifdef MOMENTUM
constexpr bool MOVES = true;
using M = MOMENTUM;
#else
constexpr bool MOVES = false;
using M = A;
#endif
template <class T> constexpr bool HALF = std::is_same_v<T, bf16> || std::is_same_v<T, f16>;
using N = std::conditional_t<HALF<P> || !MOVES, P, M>;  // what the noise is for, as in rounding.half_of
constexpr bool ROUNDS = ROUNDING && HALF<N>;

template <class To, class From> INLINE To cast(From x) { To y; std::memcpy(&y, &x, sizeof y); return y; }
INLINE float wide(float x) { return x; }
INLINE double wide(double x) { return x; }
INLINE float wide(bf16 x) { return cast<float>((uint32_t)x.bits << 16); }
INLINE float wide(f16 x) {
  const uint32_t magnitude = (uint32_t)(x.bits & 0x7fff) << 13, sign = (uint32_t)(x.bits & 0x8000) << 16;
  const uint32_t finite = cast<uint32_t>(cast<float>(magnitude) * 0x1p112f);
  return cast<float>((magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000 : finite) | sign);
}
template <class T> INLINE A load(T x) { return (A)wide(x); }

// To nearest, ties to even.
INLINE void narrow(float &to, A x) { to = (float)x; }
INLINE void narrow(double &to, A x) { to = (double)x; }
INLINE void narrow(bf16 &to, A x) {
  const float y = (float)x;
  const uint32_t bits = cast<uint32_t>(y);
  to.bits = y != y ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE void narrow(f16 &to, A x) {
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
enum { GROUPS, SLICES, LANES, VECTOR, TWICE };
// Of a piece: what ranks add up, in the order of exchange.py, and how many elements agree; what they split of rows and columns;
// sizes of the whole.
struct Piece { double *sums, *agree; int64_t split, numel, rows, columns; };
enum { NEITHER, ROWS, COLUMNS };
enum { PARAM_SQ, NONFINITE, REST };  // in its sums
enum { STATISTICS, COUNT, STEP };  // what a call does; of members that are no pieces the last one does all
struct Numbers {
  double lr, beta2, one_minus_beta2, eps, min_scale, scale_parameter, clip_threshold, beta1, one_minus_beta1, weight_decay;
  double decay_by_lr, sign, skips_nonfinite, one;
};
constexpr double LEAST_SHARE = LEAST;  // numbers.py

struct Gate { int arrived, round; };  // where threads wait for one another
struct Launch {
  const Pointers *pointers;
  const Member *members;
  const Numbers *numbers;
  const int32_t *draws;
  int64_t *skipped;
  int64_t count, large;
  char *scratch;
  int64_t scratch_each, room_each;  // bytes: two scratches for large members, then a room for each thread
  int64_t *next;
  Gate *gate;
  const Piece *pieces;  // or null
  char *kept;  // from one call to the next
  const int64_t *kept_at;
  int64_t call;
  int threads;
};

// Stochastic rounding, as in rounding.py.

constexpr uint32_t GOLDEN = 0x9E3779B9, FIRST_MULTIPLIER = 0x21F0AAAD, SECOND_MULTIPLIER = 0x735A2D97;
constexpr int CUT = std::is_same_v<N, bf16> ? 16 : 13;
struct Draws { uint32_t key[3], first[3], step; };
INLINE uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * FIRST_MULTIPLIER;
  x = (x ^ x >> 15) * SECOND_MULTIPLIER;
  return x ^ x >> 15;
}
INLINE uint32_t place(const Draws &d, int axis, int64_t i) {
  return ((uint32_t)i + d.first[axis]) * GOLDEN + mixed(d.key[axis] + d.step * GOLDEN);
}
INLINE void along(const Draws &d, int axis, int64_t slice, int64_t i, float &scale, float &shift) {
  const uint32_t bits = mixed(place(d, axis, i) ^ mixed(place(d, 0, slice)));
  scale = (float)std::min(std::max((int32_t)(bits & 2047) - 1024, -1020), 1020) * 0x1p-6f;
  shift = ((float)(((int32_t)bits >> (33 - CUT)) * 2) + 0.5f) * (1.0f / (1 << CUT));
}
template <class T> INLINE float rounded(float x, float noise) {
  const float fraction = noise - ((noise + 12582912.0f) - 12582912.0f);
  constexpr int digits = std::is_same_v<T, bf16> ? 7 : 10;
  // Of the numbers of T around x, with its sign, from its exponent: rounding.py's products would not stay exact if contracted.
  float spacing = cast<float>(cast<uint32_t>(x) & 0xff800000) * (1.0f / (1 << digits));
  if (std::is_same_v<T, f16>) spacing = std::max(std::fabs(spacing), 0x1p-24f);
  const float large = spacing * 12582912.0f, result = ((x + fraction * spacing) + large) - large;
  return std::is_same_v<T, f16> && !(std::fabs(x) < 65504.0f) ? x : result;
}
template <class T> INLINE void write(T &to, A x, float noise) {
  if constexpr (ROUNDS && HALF<T>) narrow(to, rounded<T>((float)x, noise));
  else narrow(to, x);
}

// A member and what a step knows of it.

struct Step {
  const Member &x;
  Pointers at;
  const Numbers &n;
  const Piece *piece;  // or null
  Draws draws;
  A beta2, rest, eps, beta1, one_minus_beta1, sign;
  A scale = 0, decay = 0, share = 1;  // from finish
  Step(const Launch &l, const Member &x)
      : x(x), at(l.pointers[x.at]), n(l.numbers[at.numbers]), piece(l.pieces && l.pieces[x.at].sums ? l.pieces + x.at : nullptr) {
    if (x.swapped || x.kind == TWICE) std::swap(at.row, at.col);  // of two copies the columns are read
    if (ROUNDS) {
      std::memcpy(&draws, l.draws + 7 * x.at, sizeof draws);
      if (x.swapped) { std::swap(draws.key[1], draws.key[2]); std::swap(draws.first[1], draws.first[2]); }
    }
    beta2 = (A)n.beta2, rest = (A)n.one_minus_beta2, eps = (A)n.eps, sign = (A)n.sign;
    beta1 = (A)n.beta1, one_minus_beta1 = (A)n.one_minus_beta1;
  }
  A average(A before, A mean_sq) const { return before * beta2 + (mean_sq + eps) * rest; }
  double numel() const { return piece ? (double)piece->numel : (double)x.slices * x.rows * x.columns; }
  int64_t split() const { return piece ? piece->split : NEITHER; }
};
struct Sums { double param_sq, update_sq, row_sum, agree; };

// 8 to 10, of an element: its update in, parameter and momentum out. COUNT: only whether the update agrees with the gradient.
template <bool COUNT> INLINE A step_element(const Step &s, P &p, const G &g, M *m, A update, float noise) {
  if (MOVES) {
    update = load(*m) * s.beta1 + update * s.one_minus_beta1;
    if (!COUNT) write(*m, update, noise);
  }
  if (CAUTIOUS) {
    const A x = load(g) * s.sign, agrees = (A)((update > 0 && x > 0) || (update < 0 && x < 0));
    if (COUNT) return agrees;
    update *= agrees / s.share;
  }
  const A before = load(p);
  write(p, before - ((s.decay != 0 ? before * s.decay : 0) + update), noise);
  return 0;
}
INLINE M *momentum(M *m, int64_t n) { return MOVES ? m + n : nullptr; }
template <bool COUNT, class F> INLINE A for_each(int64_t n, const F &f) {
  A total = 0;
  if constexpr (COUNT) {
    #pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < n; j++) total += f(j);
  } else {
    SIMD for (int64_t j = 0; j < n; j++) f(j);
  }
  return total;
}

// Matrices.

// Rows r0 to r1 of a slice whose p, g, old and new rows are given: new rows and the sums of their columns, added to `sq` and
// `weighted` (each row divided by its new average). Rows go in fours that lie a quarter of the block apart: eight streams are as
// many reads that miss at a time. The next four are fetched while the columns of these, in the first-level cache, are summed.
static void rows_statistics(const Step &s, const P *p, const G *g, const A *row, A *new_row, A *sq, A *weighted, int64_t r0,
                            int64_t r1, double &param_sq, double &row_sum) {
  constexpr int64_t SPAN = 4096;  // columns that are summed in one go
  const int64_t C = s.x.columns, q = (r1 - r0) / 4;
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
      param_sq += (double)q0 + q1 + q2 + q3;
    }
    A weight[4];
    for (int k = 0; k < 4; k++) {
      const A v = new_row[i + k * q] = s.average(row[i + k * q], (A)(of_rows[k] / C));
      row_sum += v, weight[k] = 1 / v;
    }
    const A w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
    const auto add_columns = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
      SIMD for (int64_t j = from; j < to; j++) {
        const A a = load(g0[j]), b = load(g1[j]), c = load(g2[j]), d = load(g3[j]);
        const A aa = a * a, bb = b * b, cc = c * c, dd = d * d;
        sq[j] += (aa + bb) + (cc + dd);
        weighted[j] += (aa * w0 + bb * w1) + (cc * w2 + dd * w3);
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
    for (int64_t start = 0; start < C; start += SPAN) {
      const int64_t end = std::min(C, start + SPAN);
      A s0 = 0, q0 = 0;
      #pragma omp simd reduction(+ : s0, q0)
      for (int64_t j = start; j < end; j++) {
        const A a = load(g[i * C + j]), e = load(p[i * C + j]);
        s0 += a * a, q0 += e * e;
      }
      of_row += s0, param_sq += q0;
    }
    const A v = new_row[i] = s.average(row[i], (A)(of_row / C)), w = 1 / v;
    row_sum += v;
    SIMD for (int64_t j = 0; j < C; j++) {
      const A a = load(g[i * C + j]);
      sq[j] += a * a, weighted[j] += a * a * w;
    }
  }
}

// Columns c0 to c1 from the sums of `rows` rows, which are all: new averages; gives the sum of the squares of the update, but for
// the row mean.
template <class T>
INLINE double columns_finish(const Step &s, const A *col, const T *sq, const T *weighted, A *new_col, int64_t rows, int64_t c0,
                             int64_t c1) {
  double update_sq = 0;
  #pragma omp simd reduction(+ : update_sq)
  for (int64_t j = c0; j < c1; j++) {
    const A v = new_col[j] = s.average(col[j], (A)(sq[j] / rows));
    update_sq += (double)((A)weighted[j] / v);
  }
  return update_sq;
}

struct Columns { const A *factor; const float *scale, *shift; };  // of a slice
static Columns columns_of(const Step &s, const A *new_col, A *room, int64_t slice) {
  const int64_t C = s.x.columns;
  float *noise = (float *)(room + C);
  SIMD for (int64_t j = 0; j < C; j++) room[j] = 1 / std::sqrt(new_col[j]);
  if (ROUNDS) {
    SIMD for (int64_t j = 0; j < C; j++) along(s.draws, 2, slice, j, noise[j], noise[C + j]);
  }
  return {room, noise, noise + C};
}

// Rows r0 to r1 of a slice, from their new averages, times the root of their mean.
template <bool COUNT>
static double rows_apply(const Step s, P *p, const G *g, M *m, A *row, const A *new_row, const Columns &c, A root_mean, int64_t slice,
                         int64_t r0, int64_t r1) {
  const int64_t C = s.x.columns;
  double agree = 0;
  const int64_t pairs = MOVES || ROUNDS ? 0 : (r1 - r0) / 2;  // four streams; with a momentum there are three in one row
  for (int64_t i = r0; i < r0 + pairs; i++) {
    P *p0 = p + i * C, *p1 = p0 + pairs * C;
    const G *g0 = g + i * C, *g1 = g0 + pairs * C;
    const A f0 = s.scale * root_mean / std::sqrt(new_row[i]), f1 = s.scale * root_mean / std::sqrt(new_row[i + pairs]);
    SIMD for (int64_t j = 0; j < C; j++) {
      step_element<false>(s, p0[j], g0[j], nullptr, load(g0[j]) * f0 * c.factor[j], 0);
      step_element<false>(s, p1[j], g1[j], nullptr, load(g1[j]) * f1 * c.factor[j], 0);
    }
  }
  for (int64_t i = r0 + 2 * pairs; i < r1; i++) {
    P *p0 = p + i * C;
    const G *g0 = g + i * C;
    M *m0 = momentum(m, i * C);
    const A f0 = s.scale * root_mean / std::sqrt(new_row[i]);
    float scale = 0, shift = 0;
    if (ROUNDS) along(s.draws, 1, slice, i, scale, shift);
    agree += for_each<COUNT>(C, [&](int64_t j) __attribute__((always_inline)) {
      const float noise = ROUNDS && !COUNT ? scale * c.scale[j] + (shift + c.shift[j]) : 0;
      return step_element<COUNT>(s, p0[j], g0[j], momentum(m0, j), load(g0[j]) * f0 * c.factor[j], noise);
    });
  }
  if (!COUNT) std::copy(new_row + r0, new_row + r1, row + r0);
  return agree;
}

// A slice that one thread steps. Its room: sums of columns, of all blocks and of one, plain and weighted; new columns, their factors
// and noise, new rows.
struct Room { double *total; A *block, *new_col, *columns, *new_row; };
INLINE Room room_of(const Step &s, char *room) {
  const int64_t C = s.x.columns;
  double *total = (double *)room;
  A *x = (A *)(total + 2 * C);
  return {total, x, x + 2 * C, x + 3 * C, x + 6 * C};
}
static double slice_statistics(const Step &s, int64_t slice, const Room &room, Sums &sums) {
  const int64_t R = s.x.rows, C = s.x.columns, at = slice * R * C;
  double row_sum = 0;
  std::fill(room.total, room.total + 2 * C, 0.0);
  for (int64_t i = 0; i < R; i += s.x.block) {
    std::fill(room.block, room.block + 2 * C, (A)0);
    rows_statistics(s, s.at.p + at, s.at.g + at, s.at.row + slice * R, room.new_row, room.block, room.block + C, i,
                    std::min(R, i + s.x.block), sums.param_sq, row_sum);
    SIMD for (int64_t j = 0; j < 2 * C; j++) room.total[j] += room.block[j];
  }
  sums.update_sq += columns_finish(s, s.at.col + slice * C, room.total, room.total + C, room.new_col, R, 0, C) * (row_sum / R);
  return row_sum / R;
}
// The room of a member of one slice still has what its statistics left there, with their `mean`; those of others are taken again.
template <bool COUNT> static double slices_apply(const Step &s, int64_t begin, int64_t end, const Room &room, double mean) {
  const int64_t R = s.x.rows, C = s.x.columns;
  double agree = 0;
  for (int64_t slice = end - 1; slice >= begin; slice--) {
    Sums again = {};
    if (s.x.slices > 1 || mean < 0) mean = slice_statistics(s, slice, room, again);
    const Columns c = columns_of(s, room.new_col, room.columns, slice);
    const int64_t at = slice * R * C;
    agree += rows_apply<COUNT>(s, s.at.p + at, s.at.g + at, momentum(s.at.exp_avg, at), s.at.row + slice * R, room.new_row, c,
                               (A)std::sqrt(mean), slice, 0, R);
    if (!COUNT) std::copy(room.new_col, room.new_col + C, s.at.col + slice * C);
  }
  return agree;
}

// Large matrices: groups of rows, whose sums of columns are added up before any row is applied.

struct Groups {  // of a member, in its scratch; of a piece what a call leaves for the next is kept
  Sums *sums;
  A *new_row, *new_col;
  double *columns;  // of groups, sq and weighted
  double *update_sq, *row_sum;  // of chunks of columns or rows
  A *factor;
  float *scale, *shift;
};
constexpr int64_t CHUNK = 256;  // columns that a thread finishes in one go
INLINE int64_t chunks_of(int64_t count) { return (count + CHUNK - 1) / CHUNK; }
template <class T> INLINE T *taken(char *&from, int64_t count) {
  T *x = (T *)from;
  from += (count * sizeof(T) + 63) / 64 * 64;
  return x;
}
static void lay_out(const Member &x, Groups &of, char *&scratch, char *&kept) {
  const int64_t rows = x.slices * x.rows, columns = x.slices * x.columns, chunks = x.slices * chunks_of(std::max(x.rows, x.columns));
  of.sums = taken<Sums>(kept, x.parts);
  if (x.kind != GROUPS) return;
  of.new_row = taken<A>(kept, rows), of.new_col = taken<A>(kept, columns);
  of.columns = taken<double>(scratch, x.parts * 2 * x.columns);
  of.update_sq = taken<double>(scratch, chunks), of.row_sum = taken<double>(scratch, chunks), of.factor = taken<A>(scratch, columns);
  of.scale = taken<float>(scratch, ROUNDS ? columns : 0), of.shift = taken<float>(scratch, ROUNDS ? columns : 0);
}
struct Place { int64_t slice, at, begin, end; };  // of a group: where its slice begins, and its rows
INLINE Place place_of(const Member &x, int64_t k) {
  const int64_t groups = x.parts / x.slices, slice = k / groups, begin = k % groups * x.per;
  return {slice, slice * x.rows * x.columns, begin, std::min(x.rows, begin + x.per)};
}
static void group_statistics(const Step &s, int64_t k, const Groups &of, char *room) {
  const Member &x = s.x;
  const int64_t C = x.columns;
  const Place in = place_of(x, k);
  A *block = (A *)room;
  double *total = of.columns + k * 2 * C;
  std::fill(total, total + 2 * C, 0.0);
  Sums sums = {};
  for (int64_t i = in.begin; i < in.end; i += x.block) {
    std::fill(block, block + 2 * C, (A)0);
    rows_statistics(s, s.at.p + in.at, s.at.g + in.at, s.at.row + in.slice * x.rows, of.new_row + in.slice * x.rows, block, block + C, i,
                    std::min(in.end, i + x.block), sums.param_sq, sums.row_sum);
    SIMD for (int64_t j = 0; j < 2 * C; j++) total[j] += block[j];
  }
  of.sums[k] = sums;
}
static double row_mean(const Step &s, const Groups &of, int64_t slice) {
  const Member &x = s.x;
  if (s.split() == ROWS) return s.piece->sums[REST + slice] / s.piece->rows;
  const int64_t groups = x.parts / x.slices, chunks = chunks_of(x.rows), count = s.split() == COLUMNS ? chunks : groups;
  double sum = 0;
  for (int64_t k = slice * count; k < (slice + 1) * count; k++) sum += s.split() == COLUMNS ? of.row_sum[k] : of.sums[k].row_sum;
  return sum / x.rows;
}
struct Chunk { int64_t slice, begin, end; };
INLINE Chunk chunk_of(int64_t k, int64_t count) {
  const int64_t slice = k / chunks_of(count), begin = k % chunks_of(count) * CHUNK;
  return {slice, begin, std::min(count, begin + CHUNK)};
}
// Columns whose sums are taken: finished, or, where rows are split, put where ranks add them up.
static void chunk_of_columns(const Step &s, int64_t k, const Groups &of) {
  const Member &x = s.x;
  const int64_t C = x.columns, groups = x.parts / x.slices;
  const Chunk in = chunk_of(k, C);
  double *total = of.columns + in.slice * groups * 2 * C;
  for (int64_t i = 1; i < groups; i++) {
    const double *other = total + i * 2 * C;
    SIMD for (int64_t j = in.begin; j < in.end; j++) total[j] += other[j], total[C + j] += other[C + j];
  }
  if (s.split() == ROWS) {
    double *sq = s.piece->sums + REST + x.slices + in.slice * C, *weighted = sq + x.slices * C;
    std::copy(total + in.begin, total + in.end, sq + in.begin);
    std::copy(total + C + in.begin, total + C + in.end, weighted + in.begin);
    return;
  }
  A *new_col = of.new_col + in.slice * C;
  of.update_sq[k] = columns_finish(s, s.at.col + in.slice * C, total, total + C, new_col, x.rows, in.begin, in.end);
  if (s.split() == NEITHER) of.update_sq[k] *= row_mean(s, of, in.slice);
}
// Where columns are split, rows of a group: their squares, of which the statistics have left the mean, plain and each divided by
// the new average of its column.
static void weighted_rows(const Step &s, int64_t k, const Groups &of) {
  const Member &x = s.x;
  const int64_t C = x.columns, rows = x.slices * x.rows;
  const Place in = place_of(x, k);
  const A *new_col = of.new_col + in.slice * C;
  for (int64_t i = in.begin; i < in.end; i++) {
    const G *g = s.at.g + in.at + i * C;
    A sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < C; j++) sum += load(g[j]) * load(g[j]) / new_col[j];
    double *sums = s.piece->sums + REST + in.slice * x.rows + i;
    sums[0] = C ? (double)of.new_row[in.slice * x.rows + i] * C : 0, sums[rows] = sum;
  }
}
// What the ranks have added up of columns, or of rows where columns are split.
static void chunk_of_summed(const Step &s, int64_t k, const Groups &of) {
  const Member &x = s.x;
  const bool of_rows = s.split() == COLUMNS;
  const int64_t count = of_rows ? x.rows : x.columns;
  const Chunk in = chunk_of(k, count);
  const A *old = (of_rows ? s.at.row : s.at.col) + in.slice * count;
  A *fresh = (of_rows ? of.new_row : of.new_col) + in.slice * count;
  const double *sq = s.piece->sums + REST + (of_rows ? 0 : x.slices) + in.slice * count, *weighted = sq + x.slices * count;
  of.update_sq[k] = columns_finish(s, old, sq, weighted, fresh, of_rows ? s.piece->columns : s.piece->rows, in.begin, in.end);
  of.row_sum[k] = 0;
  for (int64_t i = in.begin; i < in.end && of_rows; i++) of.row_sum[k] += fresh[i];
}
static void factors_of_columns(const Step &s, int64_t k, const Groups &of) {
  const int64_t C = s.x.columns;
  const Chunk in = chunk_of(k, C);
  const int64_t at = in.slice * C;
  SIMD for (int64_t j = in.begin; j < in.end; j++) of.factor[at + j] = 1 / std::sqrt(of.new_col[at + j]);
  if (ROUNDS) {
    SIMD for (int64_t j = in.begin; j < in.end; j++) along(s.draws, 2, in.slice, j, of.scale[at + j], of.shift[at + j]);
  }
}
template <bool COUNT> static double group_apply(const Step &s, int64_t k, const Groups &of) {
  const Member &x = s.x;
  const int64_t C = x.columns;
  const Place in = place_of(x, k);
  const Columns c = {of.factor + in.slice * C, of.scale + in.slice * C, of.shift + in.slice * C};
  const A root_mean = (A)std::sqrt(row_mean(s, of, in.slice));
  double agree = 0;
  for (int64_t i = in.begin + (in.end - in.begin - 1) / x.block * x.block; i >= in.begin; i -= x.block)
    agree += rows_apply<COUNT>(s, s.at.p + in.at, s.at.g + in.at, momentum(s.at.exp_avg, in.at), s.at.row + in.slice * x.rows,
                               of.new_row + in.slice * x.rows, c, root_mean, in.slice, i, std::min(in.end, i + x.block));
  if (!COUNT && in.begin == 0) std::copy(of.new_col + in.slice * C, of.new_col + (in.slice + 1) * C, s.at.col + in.slice * C);
  return agree;
}

// Kernels of convolutions: slices of a few elements, as many at a time as a vector has lanes.

constexpr int WIDTH = 64 / sizeof(A), MOST = 256;  // lanes; elements of a slice
typedef A V __attribute__((vector_size(64)));

// Each third number to a run of its own, `apart` from the next, and back. Runs of constant length become two permutations a vector.
INLINE void split(const A *x, A *to, int count, int apart) {
  SIMD for (int k = 0; k < count; k++) to[k] = x[3 * k], to[apart + k] = x[3 * k + 1], to[2 * apart + k] = x[3 * k + 2];
}
INLINE void join(A *x, const A *from, int count, int apart) {
  SIMD for (int k = 0; k < count; k++) x[3 * k] = from[k], x[3 * k + 1] = from[apart + k], x[3 * k + 2] = from[2 * apart + k];
}
// Numbers of w slices, `each` of them in a row, to lanes and back. Those of 3 x 3 kernels are turned in vectors, twice by three.
static void to_lanes(const A *x, V *lanes, int each, int w) {
  A *to = (A *)lanes, thirds[9 * WIDTH];
  if (each == 9 && w == WIDTH) {
    split(x, thirds, 3 * WIDTH, 3 * WIDTH);
    for (int j = 0; j < 3; j++) split(thirds + j * 3 * WIDTH, to + j * WIDTH, WIDTH, 3 * WIDTH);
  } else if (each == 3 && w == WIDTH) {
    split(x, to, WIDTH, WIDTH);
  } else {
    for (int k = 0; k < w; k++) for (int e = 0; e < each; e++) to[e * WIDTH + k] = x[k * each + e];
  }
}
static void from_lanes(A *x, const V *lanes, int each, int w) {
  const A *from = (const A *)lanes;
  A thirds[9 * WIDTH];
  if (each == 9 && w == WIDTH) {
    for (int j = 0; j < 3; j++) join(thirds + j * 3 * WIDTH, from + j * WIDTH, WIDTH, 3 * WIDTH);
    join(x, thirds, 3 * WIDTH, 3 * WIDTH);
  } else if (each == 3 && w == WIDTH) {
    join(x, from, WIDTH, WIDTH);
  } else {
    for (int k = 0; k < w; k++) for (int e = 0; e < each; e++) x[k * each + e] = from[e * WIDTH + k];
  }
}
INLINE A sum(const V &x, int w) {
  const A *of = (const A *)&x;
  A total = 0;
  #pragma omp simd reduction(+ : total)
  for (int k = 0; k < WIDTH; k++) total += k < w ? of[k] : 0;
  return total;
}

// Some slices from n on, in a row or, as in channels_last, side by side. Lanes from w on hold anything.
struct Tile {
  const Step &s;
  const int R, C, E, w;
  const int64_t n;
  const bool beside;
  const int runs, length;  // of what lies in a row
  V elements[MOST], averages[2 * MOST], *row = averages, *col = averages + R, row_sum = {};
  A in_a_row[MOST * WIDTH], *flat = beside ? (A *)elements : in_a_row;  // the elements as they lie in memory
  Tile(const Step &s, int64_t n, int64_t end)
      : s(s), R((int)s.x.rows), C((int)s.x.columns), E(R * C),
        w((int)std::min({(int64_t)WIDTH, end - n, s.x.inner - n % s.x.inner})), n(n), beside(s.x.outer_stride),
        runs(beside ? E : 1), length(beside ? w : w * E) {}
  int64_t at(int run) const {
    if (!beside) return n * E;
    return n / s.x.inner * s.x.outer_stride + n % s.x.inner + run / C * s.x.row_stride + run % C * s.x.column_stride;
  }
  // 5, with the squares left among the elements.
  void average() {
    for (int run = 0; run < runs; run++) {
      const G *g = s.at.g + at(run);
      A *to = flat + run * WIDTH;
      SIMD for (int k = 0; k < length; k++) to[k] = load(g[k]) * load(g[k]);
    }
    if (!beside) to_lanes(flat, elements, E, w);
    to_lanes(s.at.row + n * R, row, R, w), to_lanes(s.at.col + n * C, col, C, w);
    for (int i = 0; i < R; i++) {
      V sq = elements[i * C];
      for (int j = 1; j < C; j++) sq += elements[i * C + j];
      row[i] = row[i] * s.beta2 + (sq * ((A)1 / C) + s.eps) * s.rest;
      row_sum += row[i];
    }
    for (int j = 0; j < C; j++) {
      V sq = elements[j];
      for (int i = 1; i < R; i++) sq += elements[i * C + j];
      col[j] = col[j] * s.beta2 + (sq * ((A)1 / R) + s.eps) * s.rest;
    }
  }
  // Fetched ahead, or reads that miss are what it waits for; apply then waits for its roots and divisions.
  void statistics(Sums &sums) {
    constexpr int AHEAD = 1024;
    for (int k = 0; !beside && k < w * E; k += WIDTH)
      __builtin_prefetch(s.at.g + n * E + AHEAD + k, 0, 2), __builtin_prefetch(s.at.p + n * E + AHEAD + k, 0, 2);
    average();
    V update_sq = {};
    for (int j = 0; j < C; j++) col[j] = 1 / col[j];
    for (int i = 0; i < R; i++) {
      V of_row = elements[i * C] * col[0];
      for (int j = 1; j < C; j++) of_row += elements[i * C + j] * col[j];
      update_sq += of_row / row[i];
    }
    sums.update_sq += sum(update_sq * row_sum, w) / R;  // beside large rows, their ratio to one without gradient overflows
    for (int run = 0; run < runs; run++) {
      const P *p = s.at.p + at(run);
      A param_sq = 0;
      #pragma omp simd reduction(+ : param_sq)
      for (int k = 0; k < length; k++) param_sq += load(p[k]) * load(p[k]);
      sums.param_sq += param_sq;
    }
  }
  template <bool COUNT> double apply() {
    average();
    if (!COUNT) from_lanes(s.at.row + n * R, row, R, w), from_lanes(s.at.col + n * C, col, C, w);
    V of_slice = row_sum * ((A)1 / R);
    A *of = (A *)&of_slice, *x = (A *)averages;
    SIMD for (int k = 0; k < WIDTH; k++) of[k] = s.scale * std::sqrt(of[k]);  // the lanes of a V, one by one, stay scalar
    SIMD for (int k = 0; k < (R + C) * WIDTH; k++) x[k] = 1 / std::sqrt(x[k]);
    for (int i = 0; i < R; i++) for (int j = 0; j < C; j++) elements[i * C + j] = row[i] * of_slice * col[j];
    if (!beside) from_lanes(flat, elements, E, w);
    float noise[ROUNDS ? MOST * WIDTH : 1];
    if (ROUNDS && !COUNT)
      for (int k = 0; k < w; k++)
        for (int i = 0; i < R; i++) {
          float scale, shift, of_column, shift_of_column;
          along(s.draws, 1, n + k, i, scale, shift);
          for (int j = 0; j < C; j++) {
            along(s.draws, 2, n + k, j, of_column, shift_of_column);
            const int e = i * C + j;
            noise[beside ? e * WIDTH + k : k * E + e] = scale * of_column + (shift + shift_of_column);
          }
        }
    double agree = 0;
    for (int run = 0; run < runs; run++) {
      P *p = s.at.p + at(run);
      const G *g = s.at.g + at(run);
      M *m = momentum(s.at.exp_avg, at(run));
      const A *factor = flat + run * WIDTH;
      const float *noises = noise + (ROUNDS ? run * WIDTH : 0);
      agree += for_each<COUNT>(length, [&](int64_t k) __attribute__((always_inline)) {
        return step_element<COUNT>(s, p[k], g[k], momentum(m, k), load(g[k]) * factor[k], ROUNDS ? noises[k] : 0);
      });
    }
    return agree;
  }
};
static void lanes_statistics(const Step &s, int64_t begin, int64_t end, Sums &sums) {
  for (int64_t n = begin; n < end;) { Tile tile(s, n, end); tile.statistics(sums); n += tile.w; }
}
template <bool COUNT> static double lanes_apply(const Step &s, int64_t begin, int64_t end) {
  double agree = 0;
  for (int64_t n = begin; n < end;) { Tile tile(s, n, end); agree += tile.apply<COUNT>(); n += tile.w; }
  return agree;
}

// What keeps its whole second moment: vectors, and kernels of one element, whose row and column are two copies of it.

// Halves that lie apart are read at a time: six streams take two thirds of the time of three.
template <bool TWO> static void vector_statistics(const Step s, int64_t begin, int64_t end, Sums &sums) {
  const int64_t half = (end - begin) / 2, middle = begin + half;
  const auto param = [&](int64_t j) __attribute__((always_inline)) { return load(s.at.p[j]) * load(s.at.p[j]); };
  const auto update = [&](int64_t j) __attribute__((always_inline)) {
    const A g = load(s.at.g[j]), average = s.average(s.at.row[j], g * g);
    return TWO ? g * g / average : g * (g / average);  // where a square overflows, a row that is infinite is NaN in the end
  };
  for (int64_t start = begin; start < middle; start += 512) {
    const int64_t stop = std::min(middle, start + 512);
    A param_sq = 0, update_sq = 0;
    #pragma omp simd reduction(+ : param_sq, update_sq)
    for (int64_t j = start; j < stop; j++) param_sq += param(j) + param(half + j), update_sq += update(j) + update(half + j);
    sums.param_sq += param_sq, sums.update_sq += update_sq;
  }
  if (middle + half < end) sums.param_sq += param(end - 1), sums.update_sq += update(end - 1);
}
template <bool TWO, bool COUNT> static double vector_apply(const Step s, int64_t begin, int64_t end) {
  double agree = 0;
  float row_scale = 0, row_shift = 0;
  if (ROUNDS && !TWO) along(s.draws, 1, 0, 0, row_scale, row_shift);
  A *v = s.at.row, *twin = s.at.col;
  for (int64_t start = begin; start < end; start += 512) {
    const int64_t stop = std::min(end, start + 512);
    agree += for_each<COUNT>(stop - start, [&](int64_t k) __attribute__((always_inline)) {
      const int64_t j = start + k;
      const A g = load(s.at.g[j]), average = s.average(v[j], g * g);
      A update = g * (s.scale / std::sqrt(average));
      if (TWO) update += average - average;
      float noise = 0;
      if (ROUNDS && !COUNT) {
        float scale = row_scale, shift = row_shift, of_column, shift_of_column;
        if (TWO) along(s.draws, 1, j, 0, scale, shift);
        along(s.draws, 2, TWO ? j : 0, TWO ? 0 : j, of_column, shift_of_column);
        noise = scale * of_column + (shift + shift_of_column);
      }
      if (!COUNT) v[j] = average;
      return step_element<COUNT>(s, s.at.p[j], s.at.g[j], momentum(s.at.exp_avg, j), update, noise);
    });
    if (TWO && !COUNT && twin != v) std::copy(v + start, v + stop, twin + start);
  }
  return agree;
}

// A step.

static void part_statistics(const Step &s, int64_t k, char *room, Sums &sums) {
  const Member &x = s.x;
  const int64_t size = x.kind < VECTOR ? x.slices : x.columns, begin = k * x.per, end = std::min(size, begin + x.per);
  if (x.kind == SLICES) for (int64_t i = begin; i < end; i++) sums.row_sum = slice_statistics(s, i, room_of(s, room), sums);
  if (x.kind == LANES) lanes_statistics(s, begin, end, sums);
  if (x.kind == VECTOR) vector_statistics<false>(s, begin, end, sums);
  if (x.kind == TWICE) vector_statistics<true>(s, begin, end, sums);
}
template <bool COUNT> static double part_apply(const Step &s, int64_t k, char *room, double mean_of_only) {
  const Member &x = s.x;
  const int64_t size = x.kind < VECTOR ? x.slices : x.columns, begin = k * x.per, end = std::min(size, begin + x.per);
  if (x.kind == SLICES) return slices_apply<COUNT>(s, begin, end, room_of(s, room), mean_of_only);
  if (x.kind == LANES) return lanes_apply<COUNT>(s, begin, end);
  return x.kind == VECTOR ? vector_apply<false, COUNT>(s, begin, end) : vector_apply<true, COUNT>(s, begin, end);
}

INLINE double largest(double x, double y) { return x > y || x != x ? x : y; }  // a NaN stays one
static bool is_finite(const Step &s) {
  const int64_t n = s.x.slices * s.x.rows * s.x.columns;
  bool finite = true;
  for (int64_t j = 0; j < n; j++) finite &= load(s.at.g[j]) - load(s.at.g[j]) == 0;
  return finite;
}
// 2 to 7, as numbers; gives whether the member is stepped. One thread, the owner, writes what is kept of it.
static bool finish(const Launch &l, Step &s, const Sums &sums, bool owner) {
  const Numbers &n = s.n;
  if (n.skips_nonfinite && (s.piece ? s.piece->sums[NONFINITE] > 0 : !std::isfinite(sums.update_sq) && !is_finite(s))) {
    if (owner) l.skipped[s.x.at] = 1;
    return false;
  }
  const double rms = std::sqrt(sums.param_sq / s.numel()), update_rms = std::sqrt(sums.update_sq / s.numel());
  if (owner) *s.at.rms = (A)rms, *s.at.update_rms = (A)update_rms;
  const double alpha = n.lr * (n.scale_parameter > 0 ? largest(rms, n.min_scale) : 1);
  const double divisor = std::isinf(n.clip_threshold) ? 1 : largest(update_rms / n.clip_threshold, 1);
  s.scale = (A)(n.sign * alpha / divisor), s.decay = (A)(n.weight_decay * (n.decay_by_lr > 0 ? alpha : 1));
  return true;
}
INLINE A share_of(const Step &s, double agree) { return (A)std::max(agree / s.numel(), LEAST_SHARE); }

constexpr int SPINS = 2000, YIELDS = 200;
// Of the threads that step a member together, one.
struct Team {
  int t, threads;
  Gate *gate;
  int64_t begin(int64_t count) const { return count * t / threads; }
  int64_t end(int64_t count) const { return count * (t + 1) / threads; }
  template <class F> INLINE void each(int64_t count, const F &f) const { for (int64_t k = begin(count); k < end(count); k++) f(k); }
  // Not OpenMP's barrier: where other processes have the cores, who waits for a thread that waits for a core should give up its own.
  void wait() const {
    if (threads == 1) return;
    const int round = __atomic_load_n(&gate->round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&gate->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
      gate->arrived = 0;
      __atomic_store_n(&gate->round, round + 1, __ATOMIC_RELEASE);
    }
    for (int i = 0; __atomic_load_n(&gate->round, __ATOMIC_ACQUIRE) == round; i++) {
      if (i > SPINS + YIELDS) std::this_thread::sleep_for(std::chrono::microseconds(50));
      else if (i > SPINS) std::this_thread::yield();
    }
  }
};
static void statistics(const Step &s, const Groups &of, char *room, const Team &team) {
  const Member &x = s.x;
  Step plain = s;  // where columns are split, nothing is known yet of rows but the mean of these squares
  if (s.split() == COLUMNS) plain.beta2 = 0, plain.rest = 1, plain.eps = 0;
  team.each(x.parts, [&](int64_t k) {
    if (x.kind == GROUPS) group_statistics(plain, k, of, room);
    else of.sums[k] = {}, part_statistics(s, k, room, of.sums[k]);
  });
  team.wait();
  if (x.kind != GROUPS) return;
  team.each(x.slices * chunks_of(x.columns), [&](int64_t k) {
    chunk_of_columns(s, k, of);
    if (!s.piece) factors_of_columns(s, k, of);
  });
  team.wait();
  if (s.split() == COLUMNS) team.each(x.parts, [&](int64_t k) { weighted_rows(s, k, of); });
}
// What the ranks add up; rows and columns are there already.
static void put(const Step &s, const Sums &total, const Groups &of) {
  double *sums = s.piece->sums;
  const bool suspect = s.n.skips_nonfinite && !std::isfinite(total.update_sq + total.row_sum);
  sums[PARAM_SQ] = total.param_sq, sums[NONFINITE] = suspect && !is_finite(s);
  if (s.split() == NEITHER) sums[REST] = total.update_sq;
  if (s.split() != ROWS) return;
  const int64_t groups = s.x.parts / s.x.slices;
  for (int64_t i = 0; i < s.x.slices; i++) sums[REST + i] = 0;
  for (int64_t k = 0; k < s.x.parts; k++) sums[REST + k / groups] += of.sums[k].row_sum;
}
static bool takes_part(const Launch &l, const Member &x) { return l.call == STEP || (l.pieces && l.pieces[x.at].sums); }
// A team waits for itself at least once in each member, after which none of it is in the one before. The room of a thread alone
// begins behind its scratch.
static void step_member(const Launch &l, const Member &x, char *scratch, char *room, const Team &team) {
  Step s(l, x);
  Groups of = {};
  char *kept = s.piece ? l.kept + l.kept_at[x.at] : nullptr;
  lay_out(x, of, scratch, s.piece ? kept : scratch);
  if (!room) room = scratch;
  const bool groups = x.kind == GROUPS, summed = s.piece && l.call != STATISTICS, split = s.split() != NEITHER;
  const int64_t chunks = groups ? x.slices * chunks_of(summed && s.split() == COLUMNS ? x.rows : x.columns) : 0;
  Sums total = {};
  if (summed) {
    if (split) team.each(chunks, [&](int64_t k) { chunk_of_summed(s, k, of); });
    if (groups) team.each(x.slices * chunks_of(x.columns), [&](int64_t k) { factors_of_columns(s, k, of); });
    team.wait();
    total.param_sq = s.piece->sums[PARAM_SQ];
    if (!split) total.update_sq = s.piece->sums[REST];
  } else {
    statistics(s, of, room, team);
    for (int64_t k = 0; k < x.parts; k++)
      total.param_sq += of.sums[k].param_sq, total.update_sq += of.sums[k].update_sq, total.row_sum += of.sums[k].row_sum;
  }
  for (int64_t k = 0; k < chunks && summed == split; k++)
    total.update_sq += of.update_sq[k] * (split ? row_mean(s, of, k / (chunks / x.slices)) : 1);
  if (l.call == STATISTICS) {
    if (team.t == 0) put(s, total, of);
    return;
  }
  if (!finish(l, s, total, team.t == 0 && l.call == STEP)) return;
  const double mean = summed || groups ? -1 : of.sums[0].row_sum;  // of the only slice, where its room is as it was left
  if (CAUTIOUS && !(summed && l.call == STEP)) {
    team.each(x.parts, [&](int64_t k) { of.sums[k].agree = groups ? group_apply<true>(s, k, of) : part_apply<true>(s, k, room, mean); });
    team.wait();
    for (int64_t k = 0; k < x.parts; k++) total.agree += of.sums[k].agree;
    if (l.call == COUNT && team.t == 0) *s.piece->agree = total.agree;
  }
  if (l.call == COUNT) return;
  if (CAUTIOUS) s.share = share_of(s, summed ? *s.piece->agree : total.agree);
  for (int64_t k = team.end(x.parts) - 1; k >= team.begin(x.parts); k--)
    groups ? group_apply<false>(s, k, of) : part_apply<false>(s, k, room, mean);
}
// Scratch of a large member is another one than the last member's, which others may still be applying. What ranks have added up is
// applied in the other order: the last statistics are in cache.
static void step_members(const Launch &l, int t) {
  char *room = l.scratch + 2 * l.scratch_each + t * l.room_each;
  const bool back = l.pieces && l.call != STATISTICS;
  int64_t turn = 0;
  const auto large = [&](int64_t i) {
    if (takes_part(l, l.members[i])) step_member(l, l.members[i], l.scratch + turn++ % 2 * l.scratch_each, room, {t, l.threads, l.gate});
  };
  for (int64_t i = 0; i < l.large && !back; i++) large(i);
  for (int64_t i; (i = l.large + __atomic_fetch_add(l.next, 1, __ATOMIC_RELAXED)) < l.count;)
    if (takes_part(l, l.members[i])) step_member(l, l.members[i], room, nullptr, {0, 1, nullptr});
  for (int64_t i = l.large - 1; i >= 0 && back; i--) large(i);
}

}  // namespace

// How many bytes a launch takes beside its members: of scratch for a large one, of room for a thread, and kept from one call to the
// next, with the place of each there.
extern "C" void adafactor_sizes(const Member *members, int64_t count, int64_t large, const Piece *pieces, int64_t *scratch_each,
                                int64_t *room_each, int64_t *kept_at) {
  char *kept = nullptr;
  *scratch_each = *room_each = 0;
  for (int64_t i = 0; i < count; i++) {
    const Member &x = members[i];
    Groups of = {};
    char *scratch = nullptr;
    kept_at[x.at] = (int64_t)kept;
    lay_out(x, of, scratch, pieces && pieces[x.at].sums ? kept : scratch);
    const int64_t numbers = x.kind == GROUPS ? 2 * x.columns : x.kind == SLICES ? 6 * x.columns + x.rows : 0;
    const int64_t totals = x.kind == SLICES ? 2 * x.columns * (int64_t)sizeof(double) : 0;
    const int64_t bytes = (totals + numbers * (int64_t)sizeof(A) + 127) / 64 * 64;
    if (i < large) *scratch_each = std::max(*scratch_each, (int64_t)scratch);
    *room_each = std::max(*room_each, bytes + (i < large ? 0 : (int64_t)scratch));
  }
  kept_at[count] = (int64_t)kept;
}

extern "C" void adafactor_step(const Pointers *pointers, const Member *members, const Numbers *numbers, const int32_t *draws,
                               int64_t *skipped, int64_t count, int64_t large, char *scratch, int64_t scratch_each, int64_t room_each,
                               const Piece *pieces, char *kept, const int64_t *kept_at, int64_t call, int threads) {
  int64_t next = 0;
  Gate gate = {};
  const Launch l = {pointers, members, numbers, draws, skipped, count, large, scratch, scratch_each, room_each, &next,
                    &gate, pieces, kept, kept_at, call, 1};
#ifdef _OPENMP
  if (threads > 1) {
    #pragma omp parallel num_threads(threads)
    {
      Launch of_team = l;
      of_team.threads = omp_get_num_threads();  // which may be fewer than were asked for
      step_members(of_team, omp_get_thread_num());
    }
  } else
#endif
    step_members(l, 0);  // no region is entered: a forked child has none of the threads
  skipped[count] = 1;  // all is done, whatever interrupts the caller
}
