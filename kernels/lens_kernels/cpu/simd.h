/* Vectors of the machine's width, exp and tanh, and the matrix product in registers.
 *
 * By the vector extension of gcc and clang: AVX-512, AVX2, NEON and plain SSE from one source.
 */
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16, NV = 4 };
#elif defined(__AVX__)
enum { LANES = 8, NV = 2 };
#elif defined(__aarch64__)
enum { LANES = 4, NV = 4 };
#else
enum { LANES = 4, NV = 2 };
#endif
enum {
  MR = 6,             /* rows of the register tile; MR x NV vectors of accumulators */
  PANEL = NV * LANES, /* columns side by side in one register tile */
};

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float vec_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef uint32_t word_vec __attribute__((vector_size(4 * LANES)));
typedef uint16_t short_any __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* LANES numbers of 16 bits, each as a word. */
INLINE word_vec load_short(const uint16_t *p) {
#if defined(__AVX512F__) /* compilers make five operations of the last line */
  return (word_vec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
  return (word_vec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#else
  return __builtin_convertvector(*(const short_any *)p, word_vec);
#endif
}
/* The same as the upper half of a float each. */
INLINE vec load_brain(const uint16_t *p) { return (vec)(load_short(p) << 16); }
INLINE vec load(const float *p) { return *(const vec_any *)p; }
INLINE void store(float *p, vec x) { *(vec_any *)p = x; }
INLINE ivec load_int(const int32_t *p) { return *(const ivec_any *)p; }
INLINE vec splat(float x) { return x - (vec){0}; }
INLINE ivec splat_int(int32_t x) { return x - (ivec){0}; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
/* The larger; b where one is NaN. */
INLINE vec greater(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_max_ps((__m512)a, (__m512)b); /* compilers make three operations of the other line */
#else
  return choose(a > b, a, b);
#endif
}
/* x, but not below `low`; NaN stays NaN. */
INLINE vec at_least(vec low, vec x) {
#if defined(__AVX512F__)
  return (vec)_mm512_max_ps((__m512)low, (__m512)x);
#else
  return choose(x < low, low, x);
#endif
}
INLINE int any_set(ivec mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int found = 0;
  for (int lane = 0; lane < LANES; lane++) found |= mask[lane];
  return found != 0;
#endif
}
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE float most_of(float a, float b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#define ADD_HALVES(name, lanes, next)                                    \
  typedef float name##_part __attribute__((vector_size(2 * lanes)));     \
  INLINE float name(float __attribute__((vector_size(4 * lanes))) x) {   \
    name##_part half[2];                                                 \
    memcpy(half, &x, sizeof x);                                          \
    return next(half[0] + half[1]);                                      \
  }
INLINE float add_2(float __attribute__((vector_size(8))) x) { return x[0] + x[1]; }
ADD_HALVES(add_4, 4, add_2)
ADD_HALVES(add_8, 8, add_4)
ADD_HALVES(add_16, 16, add_8)
#undef ADD_HALVES

/* The sum of all lanes, halves first. */
INLINE float total(vec x) {
#if defined(__AVX512F__)
  return add_16(x);
#elif defined(__AVX__)
  return add_8(x);
#else
  return add_4(x);
#endif
}

/* Lane i of the result: the sum of all lanes of x[i]; what x holds is lost. */
INLINE vec totals(vec *x) {
#if defined(__AVX512F__) && !defined(__clang__)
  ivec lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  UNROLL for (int half = LANES / 2; half; half /= 2) { /* x[i] and x[i + half] side by side, with half as many parts each */
    const ivec of_second = (lane & splat_int(half)) != 0, moved = lane + splat_int(LANES - half);
    const ivec low = (of_second & moved) | (~of_second & lane), high = low + splat_int(half);
    UNROLL for (int i = 0; i < half; i++) x[i] = __builtin_shuffle(x[i], x[i + half], low) + __builtin_shuffle(x[i], x[i + half], high);
  }
  return x[0];
#else
  vec sums;
  for (int i = 0; i < LANES; i++) sums[i] = total(x[i]);
  return sums;
#endif
}

/* exp(x) for x <= 0 to 1 ulp; 0 below the smallest normal number; NaN stays NaN. The polynomial is the best of its
 * degree in relative error, 3e-9, with both first coefficients 1. x comes back not below where exp(x) is 0: 0 times it is 0. */
INLINE vec exponential_of(vec *given) {
  vec x = *given;
  const vec low = splat(-87.33f), magic = splat(12582912.0f); /* 1.5 * 2^23: rounds, leaves n in the low bits */
#if defined(__AVX512F__)
  const __mmask16 stays = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
#else
  const ivec vanishes = x < low;
#endif
  *given = x = at_least(low, x);
  vec shifted = x * splat(1.44269504f) + magic;
  vec n = shifted - magic;
  vec r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  vec p = splat(1.3814540e-3f);
  p = p * r + splat(8.3687452e-3f);
  p = p * r + splat(4.1668391e-2f);
  p = p * r + splat(1.6666520e-1f);
  p = p * r + splat(4.9999993e-1f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
#if defined(__AVX512F__)
  return (vec)_mm512_maskz_scalef_ps(stays, (__m512)p, (__m512)n);
#else
  ivec power = ((ivec)shifted << 23) + splat_int(0x3f800000);
  return (vec)(~vanishes & (ivec)(p * (vec)power));
#endif
}

INLINE vec exponential(vec x) { return exponential_of(&x); }

/* tanh(y): the odd series near 0, 1 - 2 / (exp(2y) + 1) elsewhere. */
INLINE vec hyperbolic_tangent(vec y) {
  vec size = choose(y < splat(0.0f), -y, y);
  vec e = exponential(splat(-2.0f) * size);
  vec far = (splat(1.0f) - e) / (splat(1.0f) + e);
  far = choose(y < splat(0.0f), -far, far);
  vec y2 = y * y;
  vec series = splat(62.0f / 2835);
  series = series * y2 - splat(17.0f / 315);
  series = series * y2 + splat(2.0f / 15);
  series = series * y2 - splat(1.0f / 3);
  vec near = y + y * y2 * series;
  return choose(size < splat(0.25f), near, far);
}

/* Lane 0: the last of `low`; the others: those of `high`, one up. */
INLINE vec moved_up(vec low, vec high) {
#if defined(__AVX512F__)
  return (vec)_mm512_alignr_epi32((__m512i)high, (__m512i)low, LANES - 1);
#else
  float side_by_side[2 * LANES];
  store(side_by_side, low);
  store(side_by_side + LANES, high);
  return load(side_by_side + LANES - 1);
#endif
}

/* --- matrix products --- */

enum { FRESH, ONTO, SCALED }; /* c starts from 0, from c, from scale[m] * c */

/* c[m][n] = start + sum_k a[m * a_row + k * a_depth] * b[k * b_row + n], all of c in registers. */
INLINE void multiply(const int rows, const int vectors, const int start, int64_t depth, const float *a, int64_t a_row,
                     int64_t a_depth, const float *b, int64_t b_row, float *c, int64_t c_row, const float *scale) {
  vec sum[MR][NV];
  UNROLL for (int m = 0; m < rows; m++)
    UNROLL for (int n = 0; n < vectors; n++) {
      sum[m][n] = start == FRESH ? splat(0.0f) : load(c + m * c_row + n * LANES);
      if (start == SCALED) sum[m][n] *= splat(scale[m]);
    }
  for (int64_t k = 0; k < depth; k++) {
    vec right[NV];
    UNROLL for (int n = 0; n < vectors; n++) right[n] = load(b + k * b_row + n * LANES);
    UNROLL for (int m = 0; m < rows; m++) {
      vec left = splat(a[m * a_row + k * a_depth]);
      UNROLL for (int n = 0; n < vectors; n++) sum[m][n] += left * right[n];
    }
  }
  UNROLL for (int m = 0; m < rows; m++)
    UNROLL for (int n = 0; n < vectors; n++) store(c + m * c_row + n * LANES, sum[m][n]);
}

/* Any number of rows: MR at a time, then 4, 2, 1. */
INLINE void multiply_rows(const int vectors, const int start, int64_t rows, int64_t depth, const float *a,
                          int64_t a_row, int64_t a_depth, const float *b, int64_t b_row, float *c, int64_t c_row,
                          const float *scale) {
  int64_t m = 0;
#define STEP(size)                                                                                                  \
  for (; m + size <= rows; m += size)                                                                               \
    multiply(size, vectors, start, depth, a + m * a_row, a_row, a_depth, b, b_row, c + m * c_row, c_row, start == SCALED ? scale + m : NULL);
  STEP(6) STEP(4) STEP(2) STEP(1)
#undef STEP
}

/* Defines a product of any width: PANEL columns at a time. a_row or a_depth is 1, so that addresses are cheap. */
#define DEFINE_PRODUCT(name, start, a_row, a_depth)                                                                   \
  static inline void name(int64_t columns, int64_t rows, int64_t depth, const float *a, int64_t stride, const float *b, \
                          int64_t b_row, float *c, int64_t c_row, const float *scale) {                               \
    (void)stride;                                                                                                     \
    for (int64_t n = 0; n < columns; n += PANEL) switch (least(PANEL, columns - n) / LANES) {                         \
        case 1: multiply_rows(1, start, rows, depth, a, a_row, a_depth, b + n, b_row, c + n, c_row, scale); break;    \
        case 2: multiply_rows(2, start, rows, depth, a, a_row, a_depth, b + n, b_row, c + n, c_row, scale); break;    \
        case 3: multiply_rows(NV < 3 ? 1 : 3, start, rows, depth, a, a_row, a_depth, b + n, b_row, c + n, c_row, scale); break; \
        default: multiply_rows(NV < 4 ? 1 : 4, start, rows, depth, a, a_row, a_depth, b + n, b_row, c + n, c_row, scale); \
      }                                                                                                               \
  }

/* c[m][n] = sum_k a[m * stride + k] * b[k][n] */
DEFINE_PRODUCT(product, FRESH, stride, 1)
/* c[m][n] += sum_k a[m * stride + k] * b[k][n] */
DEFINE_PRODUCT(product_onto, ONTO, stride, 1)
/* c[m][n] = scale[m] * c[m][n] + sum_k a[k * stride + m] * b[k][n] */
DEFINE_PRODUCT(product_transposed, SCALED, 1, stride)
/* c[m][n] += sum_k a[k * stride + m] * b[k][n] */
DEFINE_PRODUCT(product_transposed_onto, ONTO, 1, stride)
