/* Matrices of bfloat16 as the tiles of AMX take them: blocks of pairs. */
#pragma once

#include "amx.h"

/* A tile of keys with its values. */
typedef struct {
  int64_t start;      /* the first key */
  Pairs keys, values; /* rows of keys, pairs of depths; rows of value_width, pairs of keys, 0 behind the last */
} Split;

#if HAS_AMX

/* From a key on that is a multiple of 2 * SIDE behind the first. */
INLINE Pairs keys_from(const Split *split, int64_t start) {
  return (Pairs){split->keys.data + (start - split->start) / SIDE * split->keys.row, split->keys.row};
}
INLINE Pairs values_from(const Split *split, int64_t start) {
  return (Pairs){split->values.data + (start - split->start) / 2 * SIDE, split->values.row};
}

/* A matrix of so many pairs in a row, a multiple of SIDE, at an address. */
INLINE Pairs pairs_at(uint32_t *data, int64_t pairs) { return (Pairs){data, pairs * SIDE}; }

/* Where the pair of that row stands, and SIDE - 1 behind it: a multiple of SIDE. */
INLINE uint32_t *place_of(Pairs x, int64_t row, int64_t pair) {
  return (uint32_t *)x.data + row / SIDE * x.row + pair * SIDE + row % SIDE * SIDE;
}

/* x [rows][lanes] of float32 as pairs of rows, `to` of half as many; 0 behind the last. */
static inline void pair_lines(Pairs to, int64_t pairs, const float *x, int64_t rows, int64_t lanes) {
  for (int64_t i = 0; i < pairs; i++)
    for (int64_t r = 0; r < lanes; r += LANES) {
      const vec even = 2 * i < rows ? load(x + 2 * i * lanes + r) : splat(0.0f);
      const vec odd = 2 * i + 1 < rows ? load(x + (2 * i + 1) * lanes + r) : splat(0.0f);
      _mm512_storeu_si512(place_of(to, i, r), pair_floats(even, odd));
    }
}

/* SIDE rows of SIDE pairs, turned, to where a block stands. */
INLINE void turn_block(uint32_t *to, const uint32_t *rows, int64_t stride) {
  __m512i x[SIDE];
  UNROLL for (int i = 0; i < SIDE; i++) x[i] = _mm512_loadu_si512(rows + i * stride);
  transpose_words(x);
  UNROLL for (int i = 0; i < SIDE; i++) _mm512_storeu_si512(to + i * SIDE, x[i]);
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
