/* Products of few rows with many keys and values, each of which is read once: memory sets the pace. */
#pragma once
#include "forward.h"

enum {
  AHEAD = 64, /* keys and values that are asked for before they are read */
  LINE = 64,  /* bytes of memory that come together */
};

static float dot(const float *x, const float *y, int64_t n) {
  vec even = splat(0.0f), odd = even;
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    even += load(x + i) * load(y + i);
    odd += load(x + i + LANES) * load(y + i + LANES);
  }
  if (i + LANES <= n) even += load(x + i) * load(y + i), i += LANES;
  float sum = total(even + odd);
  for (; i < n; i++) sum += x[i] * y[i];
  return sum;
}

/* Asks for a row that is read soon, or lies behind the last: of its own accord a processor looks ahead within a page. */
INLINE void fetch(const char *row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(row + i);
}

/* LANES numbers of float32 or bfloat16. */
INLINE vec load_any(const int brain, const void *p, int64_t i) {
  return brain ? load_brain((const uint16_t *)p + i) : load((const float *)p + i);
}

/* The products of a query with LANES keys, while those further on are asked for; dim is a multiple of LANES. */
INLINE vec dots(const int brain, int ahead, const float *query, const char *key, int64_t row, int64_t dim) {
  vec sums[LANES];
  UNROLL for (int l = 0; l < LANES; l++) {
    const char *x = key + l * row;
    if (ahead) fetch(x + AHEAD * row, dim * (brain ? 2 : 4));
    sums[l] = load_any(brain, x, 0) * load(query);
    for (int64_t d = LANES; d < dim; d += LANES) sums[l] += load_any(brain, x, d) * load(query + d);
  }
  return totals(sums);
}

/* output[r] += sum_k p[r][k] v[k] of a few values and at most FEW rows and NV vectors of columns, all of it in registers. */
INLINE void weigh(const int brain, int ahead, const int rows, const int vectors, const float *p, int64_t width, const char *value, int64_t row,
                  int64_t count, float *output, int64_t stride) {
  vec sum[FEW][NV];
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int n = 0; n < vectors; n++) sum[r][n] = load(output + r * stride + n * LANES);
  for (int64_t k = 0; k < count; k++) {
    if (ahead) fetch(value + (k + AHEAD) * row, vectors * LANES * (brain ? 2 : 4));
    UNROLL for (int n = 0; n < vectors; n++) {
      const vec x = load_any(brain, value + k * row, n * LANES);
      UNROLL for (int r = 0; r < rows; r++) sum[r][n] += splat(p[r * width + k]) * x;
    }
  }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int n = 0; n < vectors; n++) store(output + r * stride + n * LANES, sum[r][n]);
}

INLINE void weigh_rows(const int brain, const int vectors, int64_t rows, const float *p, int64_t width, const char *value, int64_t row,
                       int64_t count, float *output, int64_t stride) {
  int64_t r = 0;
#define STEP(size)                                                                                                \
  for (; r + size <= rows; r += size)                                                                             \
    weigh(brain, !r, size, vectors, p + r * width, width, value, row, count, output + r * stride, stride);
  STEP(4) STEP(2) STEP(1)
#undef STEP
}

/* The same of any rows and vectors of columns. */
INLINE void weigh_all(const int brain, int64_t columns, int64_t rows, const float *p, int64_t width, const char *value, int64_t row,
                      int64_t count, float *output, int64_t stride) {
  const int64_t size = LANES * (brain ? 2 : 4);
  int64_t n = 0;
  for (; n + NV <= columns / LANES; n += NV) weigh_rows(brain, NV, rows, p, width, value + n * size, row, count, output + n * LANES, stride);
  for (; n < columns / LANES; n++) weigh_rows(brain, 1, rows, p, width, value + n * size, row, count, output + n * LANES, stride);
}

/* Vectors where the compiler does not make them of its own accord. */
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("O3")))
#endif
static void square_roots(float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] = sqrtf(x[i]);
}

static void norms(const float *value, int64_t row, int64_t dim, int64_t count, float *norm) {
  int64_t i = 0;
  for (; dim % LANES == 0 && i + LANES <= count; i += LANES) {
    vec sums[LANES];
    UNROLL for (int l = 0; l < LANES; l++) {
      const float *x = value + (i + l) * row;
      sums[l] = load(x) * load(x);
      for (int64_t d = LANES; d < dim; d += LANES) sums[l] += load(x + d) * load(x + d);
    }
    store(norm + i, totals(sums));
  }
  for (; i < count; i++) norm[i] = dot(value + i * row, value + i * row, dim);
  square_roots(norm, count);
}
