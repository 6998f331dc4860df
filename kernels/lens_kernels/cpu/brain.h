/* Matrix products of bfloat16 numbers by the machine's own instruction, two depths at a time, summed in float32.
 *
 * Where the compiler knows it for this machine (AVX512_BF16), HAS_BRAIN is 1; elsewhere inputs become float32.
 * Both operands hold pairs: the numbers of depths 2i and 2i + 1 side by side in 32 bits.
 */
#pragma once

#include "simd.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
enum { HAS_BRAIN = 1 };
#else
enum { HAS_BRAIN = 0 };
#define PREFERS_PAIRS 0
#endif

#if defined(__AVX512BF16__)

/* Whether that is faster than the same numbers as float32: Intel's cores multiply as many of either in a cycle, and
 * float32 needs no pairs of what the softmax gives. */
#ifndef PREFERS_PAIRS
#define PREFERS_PAIRS (!__builtin_cpu_is("intel"))
#endif

INLINE __m512bh pairs_of(uint32_t word) { return (__m512bh)_mm512_set1_epi32((int)word); }

/* c[m][n] = scale[m] * c[m][n] + sum over pairs, or factor * sum where `fresh`; strides of a in bytes. */
INLINE void multiply_brain(const int rows, const int vectors, const int fresh, int64_t pairs, const char *a, int64_t a_row,
                           int64_t a_depth, const uint32_t *b, int64_t b_row, float *c, int64_t c_row, const float *scale) {
  __m512 sum[MR][NV];
  UNROLL for (int m = 0; m < rows; m++)
    UNROLL for (int n = 0; n < vectors; n++)
      sum[m][n] = fresh ? _mm512_setzero_ps() : (__m512)(load(c + m * c_row + n * LANES) * splat(scale[m]));
  for (int64_t k = 0; k < pairs; k++) {
    __m512bh right[NV];
    UNROLL for (int n = 0; n < vectors; n++) right[n] = (__m512bh)_mm512_loadu_si512(b + k * b_row + n * LANES);
    UNROLL for (int m = 0; m < rows; m++) {
      uint32_t word;
      memcpy(&word, a + m * a_row + k * a_depth, 4);
      UNROLL for (int n = 0; n < vectors; n++) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], pairs_of(word), right[n]);
    }
  }
  UNROLL for (int m = 0; m < rows; m++)
    UNROLL for (int n = 0; n < vectors; n++)
      store(c + m * c_row + n * LANES, fresh ? (vec)sum[m][n] * splat(*scale) : (vec)sum[m][n]);
}

INLINE void brain_rows(const int vectors, const int fresh, int64_t rows, int64_t pairs, const char *a, int64_t a_row,
                       int64_t a_depth, const uint32_t *b, int64_t b_row, float *c, int64_t c_row, const float *scale) {
  int64_t m = 0;
#define STEP(size)                                                                                                  \
  for (; m + size <= rows; m += size)                                                                               \
    multiply_brain(size, vectors, fresh, pairs, a + m * a_row, a_row, a_depth, b, b_row, c + m * c_row, c_row, fresh ? scale : scale + m);
  STEP(6) STEP(4) STEP(2) STEP(1)
#undef STEP
}

/* Any number of columns that is a multiple of LANES. */
static inline void product_brain(const int fresh, int64_t columns, int64_t rows, int64_t pairs, const char *a, int64_t a_row,
                                 int64_t a_depth, const uint32_t *b, int64_t b_row, float *c, int64_t c_row,
                                 const float *scale) {
  for (int64_t n = 0; n < columns; n += PANEL) switch (least(PANEL, columns - n) / LANES) {
      case 1: brain_rows(1, fresh, rows, pairs, a, a_row, a_depth, b + n, b_row, c + n, c_row, scale); break;
      case 2: brain_rows(2, fresh, rows, pairs, a, a_row, a_depth, b + n, b_row, c + n, c_row, scale); break;
      case 3: brain_rows(3, fresh, rows, pairs, a, a_row, a_depth, b + n, b_row, c + n, c_row, scale); break;
      default: brain_rows(4, fresh, rows, pairs, a, a_row, a_depth, b + n, b_row, c + n, c_row, scale);
    }
}

/* Two rows of floats as pairs, rounded to the nearest. */
INLINE __m512i pair_floats(vec even, vec odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                         19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}

/* Rows of bfloat16 as pairs of rows [(rows + 1) / 2][width], zero beyond dim and beyond the last row. */
static inline void pair_rows(uint32_t *to, const uint16_t *from, int64_t stride, int64_t rows, int64_t dim, int64_t width) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); /* so that what is interleaved by 128 bits is in order */
  for (int64_t k = 0; k < rows; k += 2) {
    int64_t d = 0;
    for (; k + 1 < rows && d + 2 * LANES <= least(dim, width); d += 2 * LANES) {
      const __m512i low = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(from + k * stride + d));
      const __m512i high = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(from + (k + 1) * stride + d));
      _mm512_storeu_si512(to + k / 2 * width + d, _mm512_unpacklo_epi16(low, high));
      _mm512_storeu_si512(to + k / 2 * width + d + LANES, _mm512_unpackhi_epi16(low, high));
    }
    for (; d < width; d += LANES) {
      __mmask16 inside = d + LANES <= dim ? 0xffff : (__mmask16)((1u << most(0, dim - d)) - 1);
      __mmask16 second = k + 1 < rows ? inside : 0;
      __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, from + k * stride + d));
      __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, from + (k + 1) * stride + d));
      _mm512_storeu_si512(to + k / 2 * width + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

#endif
