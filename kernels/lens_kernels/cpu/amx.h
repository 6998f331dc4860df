/* Matrix products of bfloat16 numbers by the tiles of AMX: 16 rows of 16 pairs at once, summed in float32.
 *
 * Where the compiler knows it for this machine, HAS_AMX is 1; whether the kernel of the system lets a process use the
 * tiles is asked once. Pairs are those of brain.h. A thread sets its tiles up with `begin_tiles` and gives them back as
 * it found them with `end_tiles`: torch's own products use them too.
 */
#pragma once

#include "brain.h"
#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_AMX 0
#endif

enum { SIDE = 16 }; /* rows of a tile, and pairs in each */

/* A matrix of pairs in blocks of SIDE x SIDE; a row of blocks lies in one piece. */
typedef struct {
  const uint32_t *data;
  int64_t row; /* pairs from a row of blocks to the next */
} Pairs;

#if HAS_AMX

typedef struct {
  uint8_t palette, start_row, unused[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} __attribute__((aligned(64))) Tiles;

static inline int may_use_amx(void) {
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
  static int answer; /* 0: not asked, 1: yes, 2: no */
  int known = __atomic_load_n(&answer, __ATOMIC_RELAXED);
  if (!known) {
    known = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? 2 : 1;
    __atomic_store_n(&answer, known, __ATOMIC_RELAXED);
  }
  return known == 1;
}

/* gcc takes the instruction to read a pointer: all of the bytes have to be in memory before it. */
static inline void set_tiles(const Tiles *tiles) {
  __asm__ volatile("" : : "r"(tiles) : "memory");
  _tile_loadconfig(tiles);
}

/* Eight whole tiles; what was set up before is kept in `before`. */
static inline void begin_tiles(Tiles *before) {
  Tiles whole = {.palette = 1};
  for (int i = 0; i < 8; i++) whole.rows[i] = SIDE, whole.row_bytes[i] = 4 * SIDE;
  _tile_storeconfig(before);
  set_tiles(&whole);
}

static inline void end_tiles(const Tiles *before) {
  if (before->palette) set_tiles(before);
  else _tile_release();
}

/* A block into a tile. */
#define LOAD(tile, matrix, i, j) _tile_loadd(tile, (matrix).data + (i) * (matrix).row + (j) * SIDE * SIDE, 4 * SIDE)

/* c[m][n] = (fresh ? 0 : c[m][n]) + sum over pairs, of one or two blocks of rows (tall) and columns (wide). */
INLINE void multiply_blocks(const int tall, const int wide, const int fresh, int64_t blocks, Pairs a, Pairs b, float *c, int64_t c_row) {
  float *below = c + SIDE * c_row;
  if (fresh) {
    _tile_zero(0);
    if (wide) _tile_zero(1);
    if (tall) _tile_zero(2);
    if (tall && wide) _tile_zero(3);
  } else {
    _tile_loadd(0, c, 4 * c_row);
    if (wide) _tile_loadd(1, c + SIDE, 4 * c_row);
    if (tall) _tile_loadd(2, below, 4 * c_row);
    if (tall && wide) _tile_loadd(3, below + SIDE, 4 * c_row);
  }
  for (int64_t k = 0; k < blocks; k++) {
    LOAD(4, a, 0, k);
    LOAD(6, b, k, 0);
    _tile_dpbf16ps(0, 4, 6);
    if (wide) {
      LOAD(7, b, k, 1);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (tall) {
      LOAD(5, a, 1, k);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (tall && wide) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 4 * c_row);
  if (wide) _tile_stored(1, c + SIDE, 4 * c_row);
  if (tall) _tile_stored(2, below, 4 * c_row);
  if (tall && wide) _tile_stored(3, below + SIDE, 4 * c_row);
}

/* c [rows][c_row] = (fresh ? 0 : c) + a b, of any rows, columns and pairs that are multiples of SIDE. */
static inline void product_amx(const int fresh, int64_t columns, int64_t rows, int64_t pairs, Pairs a, Pairs b, float *c, int64_t c_row) {
  __asm__ volatile("" ::: "memory"); /* tiles are read behind the compiler's back: what they read is in memory now */
  for (int64_t n = 0; n < columns; n += 2 * SIDE)
    for (int64_t m = 0; m < rows; m += 2 * SIDE) {
      const Pairs left = {a.data + m / SIDE * a.row, a.row}, right = {b.data + n * SIDE, b.row};
      float *to = c + m * c_row + n;
      const int tall = m + SIDE < rows, wide = n + SIDE < columns;
      if (tall && wide) multiply_blocks(1, 1, fresh, pairs / SIDE, left, right, to, c_row);
      else if (tall) multiply_blocks(1, 0, fresh, pairs / SIDE, left, right, to, c_row);
      else if (wide) multiply_blocks(0, 1, fresh, pairs / SIDE, left, right, to, c_row);
      else multiply_blocks(0, 0, fresh, pairs / SIDE, left, right, to, c_row);
    }
  __asm__ volatile("" ::: "memory");
}

/* Lane i of x[k] becomes lane k of x[i]. */
INLINE void transpose_words(__m512i *x) {
  __m512i y[SIDE];
  UNROLL for (int i = 0; i < SIDE; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  UNROLL for (int i = 0; i < SIDE; i += 4)
    UNROLL for (int j = 0; j < 2; j++) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  UNROLL for (int half = 0; half < SIDE; half += 8)
    UNROLL for (int j = 0; j < 4; j++) {
      y[half + j] = _mm512_shuffle_i32x4(x[half + j], x[half + j + 4], 0x88);
      y[half + j + 4] = _mm512_shuffle_i32x4(x[half + j], x[half + j + 4], 0xdd);
    }
  UNROLL for (int j = 0; j < 8; j++) {
    x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
    x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
  }
}

#endif
