/* Matrices of bfloat16 for the tiles of AMX: float32 as the sum of three of them.
 *
 * x = x0 + x1 + x2, each the bfloat16 nearest to what is left: 8 digits each, together the 24 of float32. A product x y
 * takes six of the nine products of parts; the others are below its last digit. The tiles take numbers below 2^-126 as 0:
 * where all numbers are 0 or between 2^-40 and 2^60 in size, none of the six can be, and none overflows. Numbers that are
 * not are `unfit`, and what holds one is multiplied as float32.
 */
#pragma once

#include "amx.h"

/* A tile of keys with its values, as the tiles of AMX take them. */
typedef struct {
  int64_t start; /* the first key */
  int fit_keys, fit_values;
  Pairs keys, values; /* rows of keys, pairs of depths; rows of value_width, pairs of keys, 0 behind the last */
} Split;

#if HAS_AMX

/* From a key on that is a multiple of 2 * SIDE behind the first. */
INLINE Pairs keys_from(const Split *split, int64_t start) {
  return (Pairs){split->keys.data + (start - split->start) / SIDE * split->keys.row, split->keys.row, split->keys.part};
}
INLINE Pairs values_from(const Split *split, int64_t start) {
  return (Pairs){split->values.data + (start - split->start) / 2 * SIDE, split->values.row, split->values.part};
}

/* A matrix of so many rows and pairs, multiples of SIDE, at an address. */
INLINE Pairs pairs_at(uint32_t *data, int64_t rows, int64_t pairs) { return (Pairs){data, pairs * SIDE, rows * pairs}; }

/* Where the pair of that row stands, and SIDE - 1 behind it: a multiple of SIDE. */
INLINE uint32_t *place_of(Pairs x, int64_t row, int64_t pair) {
  return (uint32_t *)x.data + row / SIDE * x.row + pair * SIDE + row % SIDE * SIDE;
}

/* Lanes that are neither 0 nor between 2^-40 and 2^60 in size; those of NaN too. */
INLINE __mmask16 unfit(vec x) {
  const __m512i least_size = _mm512_set1_epi32((127 - 40) << 23), range = _mm512_set1_epi32(100 << 23);
  const __m512i size = _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7fffffff));
  return _mm512_mask_cmpgt_epu32_mask(_mm512_test_epi32_mask(size, size), _mm512_sub_epi32(size, least_size), range);
}

/* The nearest bfloat16, as a float. */
INLINE __m512i nearest(vec x) {
  return _mm512_and_si512(_mm512_add_epi32((__m512i)x, _mm512_set1_epi32(0x8000)), _mm512_set1_epi32((int)0xffff0000));
}

/* The parts of even and odd numbers as pairs. */
INLINE void pair_parts(const int parts, uint32_t *to, int64_t part, vec even, vec odd) {
  if (parts == 1) {
    _mm512_storeu_si512(to, pair_floats(even, odd));
    return;
  }
  UNROLL for (int i = 0; i < PARTS; i++) {
    const __m512i low = nearest(even), high = nearest(odd);
    _mm512_storeu_si512(to + i * part, _mm512_or_si512(_mm512_srli_epi32(low, 16), high));
    even -= (vec)low, odd -= (vec)high;
  }
}

/* x [rows][lanes] of float32 as pairs of rows, `to` of half as many; 0 behind the last. */
INLINE void pair_all(const int parts, Pairs to, int64_t pairs, const float *x, int64_t rows, int64_t lanes) {
  for (int64_t i = 0; i < pairs; i++)
    for (int64_t r = 0; r < lanes; r += LANES) {
      const vec even = 2 * i < rows ? load(x + 2 * i * lanes + r) : splat(0.0f);
      const vec odd = 2 * i + 1 < rows ? load(x + (2 * i + 1) * lanes + r) : splat(0.0f);
      pair_parts(parts, place_of(to, i, r), to.part, even, odd);
    }
}
static inline void pair_lines(int parts, Pairs to, int64_t pairs, const float *x, int64_t rows, int64_t lanes) {
  if (parts == 1) pair_all(1, to, pairs, x, rows, lanes);
  else pair_all(PARTS, to, pairs, x, rows, lanes);
}

/* Rows of float32 as pairs of depths; dim is a multiple of 2 * LANES. Whether all are fit. */
static inline int split_rows(Pairs to, const float *rows, int64_t count, int64_t dim) {
  __m512i upper; /* the upper halves of two vectors, in order */
  int16_t order[2 * LANES];
  for (int i = 0; i < 2 * LANES; i++) order[i] = (int16_t)(2 * i + 1);
  memcpy(&upper, order, sizeof upper);
  __mmask16 bad = 0;
  for (int64_t i = 0; i < count; i++)
    for (int64_t d = 0; d < dim; d += 2 * LANES) {
      vec low = load(rows + i * dim + d), high = load(rows + i * dim + d + LANES);
      bad |= unfit(low) | unfit(high);
      UNROLL for (int n = 0; n < PARTS; n++) {
        const __m512i first = nearest(low), second = nearest(high);
        _mm512_storeu_si512(place_of(to, i, d / 2) + n * to.part, _mm512_permutex2var_epi16(first, upper, second));
        low -= (vec)first, high -= (vec)second;
      }
    }
  return !bad;
}

/* SIDE rows of SIDE pairs, turned, to where a block stands. */
INLINE void turn_block(uint32_t *to, const uint32_t *rows, int64_t stride) {
  __m512i x[SIDE];
  UNROLL for (int i = 0; i < SIDE; i++) x[i] = _mm512_loadu_si512(rows + i * stride);
  transpose_words(x);
  UNROLL for (int i = 0; i < SIDE; i++) _mm512_storeu_si512(to + i * SIDE, x[i]);
}

/* Rows [count][width] of float32 turned, as pairs of rows, 0 behind the last; width and pairs are multiples of SIDE. Whether
 * all are fit. */
static inline int split_turned(Pairs to, int64_t pairs, const float *rows, int64_t count, int64_t width) {
  __mmask16 bad = 0;
  for (int64_t k = 0; k < pairs; k += SIDE)
    for (int64_t d = 0; d < width; d += SIDE) {
      uint32_t block[PARTS][SIDE][SIDE];
      for (int i = 0; i < SIDE; i++) {
        const int64_t row = 2 * (k + i);
        const vec even = row < count ? load(rows + row * width + d) : splat(0.0f);
        const vec odd = row + 1 < count ? load(rows + (row + 1) * width + d) : splat(0.0f);
        bad |= unfit(even) | unfit(odd);
        pair_parts(PARTS, block[0][i], SIDE * SIDE, even, odd);
      }
      for (int n = 0; n < PARTS; n++) turn_block(place_of(to, d, k) + n * to.part, block[n][0], SIDE);
    }
  return !bad;
}

/* Rows [columns][count] become [count][columns]; both multiples of SIDE. */
static inline void turn(float *to, const float *from, int64_t columns, int64_t count) {
  for (int64_t d = 0; d < columns; d += SIDE)
    for (int64_t r = 0; r < count; r += SIDE) {
      float block[SIDE][SIDE];
      turn_block((uint32_t *)block, (const uint32_t *)from + d * count + r, count);
      for (int i = 0; i < SIDE; i++) memcpy(to + (r + i) * columns + d, block[i], sizeof block[i]);
    }
}

#endif
