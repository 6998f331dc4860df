/* Instrumented attention on the CPU: output and statistics of softmax(Q K') V without the N x N matrix.
 *
 * Plan. A tile of up to 64 queries meets tiles of up to 128 keys. Logits are kept transposed,
 * S' = K Q' as [key][query], so that one SIMD lane is one query: every row statistic is a vertical
 * vector operation, K is read row by row as it lies in memory, and P' is already the packed operand
 * that P V needs. Rows are exact by the online softmax; what needs the final log-sum-exp (block and
 * column statistics) is kept relative to the pivot of its key tile and multiplied by
 * exp(pivot - lse) when the row is finished, so Q K' is computed once.
 *
 * Memory per thread is O(keys): sums per (query, key block), and, only for column statistics, a strip
 * of P' with 64 queries. Work is cut into units (head, range of query tiles) that do not depend on
 * the number of threads, and partial columns are added in the order of the units, so results are
 * bitwise the same for any number of threads.
 *
 * Every mask of positions comes as one interval of visible keys per query; a key mask, a general
 * boolean mask, an additive bias, ALiBi slopes and a block mask may come on top.
 *
 * Key groups keep one running state (maximum, sums, output) per group, each with its own pivot, so
 * a group that holds 1e-60 of the mass is still exact; the row is their merge.
 *
 * SIMD by the vector extension of gcc and clang: AVX-512, AVX2, NEON and plain SSE from one source.
 */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__F16C__)
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
  PANEL = NV * LANES, /* queries side by side in one register tile */
  ROWS = 64,          /* queries per tile; a multiple of PANEL */
  COLS = 128,         /* keys per tile at most */
  FEW = 4,            /* queries for which dot products are faster */
  ALIGN = 64,
};
enum { F32 = 0, F16 = 1, BF16 = 2 };
enum { OK = 0, NO_MEMORY = 1 };

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float vec_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const vec_any *)p; }
INLINE void store(float *p, vec x) { *(vec_any *)p = x; }
INLINE ivec load_int(const int32_t *p) { return *(const ivec_any *)p; }
INLINE vec splat(float x) { return x - (vec){0}; }
INLINE ivec splat_int(int32_t x) { return x - (ivec){0}; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
INLINE vec greater(vec a, vec b) { return choose(a > b, a, b); }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE float total(vec x) {
  float sum[LANES];
  store(sum, x);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) sum[i] += sum[i + half];
  return sum[0];
}

/* exp(x) for x <= 0 to 1 ulp; 0 below the smallest normal number; NaN stays NaN. */
INLINE vec exponential(vec x) {
  const vec low = splat(-87.33f), magic = splat(12582912.0f); /* 1.5 * 2^23: rounds, leaves n in the low bits */
  ivec vanishes = x < low;
  x = choose(vanishes, low, x);
  vec shifted = x * splat(1.44269504f) + magic;
  vec n = shifted - magic;
  vec r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  ivec power = ((ivec)shifted << 23) + splat_int(0x3f800000);
  return (vec)(~vanishes & (ivec)(p * (vec)power));
}

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

/* --- what the caller passes: 8-byte fields only, mirrored in library.py --- */

typedef struct {
  const void *data;
  int64_t batch, head, row, type; /* strides in elements; the last axis is contiguous */
} Operand;

typedef struct {
  const void *data;
  int64_t batch, head, query, key; /* strides in elements; 0 broadcasts */
} Plane;

typedef struct {
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;
  int64_t query_block, key_block, threads, poison;
  void (*openmp_parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel, or NULL */
  double scale, softcap; /* softcap 0: none */
  Operand query, key, value;
  const int32_t *low, *high; /* [batch, queries]: keys in [low, high) are visible */
  const int32_t *anchor;     /* [batch]: key index at which query 0 stands */
  const float *slopes;       /* [heads] ALiBi: s -= slope * |distance| */
  const float *sinks;        /* [heads] logits that only enlarge the denominator */
  const uint8_t *keep;       /* [batch, keys], 0 hides the key */
  Plane allowed;             /* uint8, 0 hides */
  Plane bias;                /* float, added to the capped logit */
  Plane blocks;              /* uint8 per (query block, key block), 0 skips */
  /* Outputs are contiguous float32; NULL: not wanted. */
  float *output; /* [batch, heads, queries, value_dim] */
  float *lse, *max_logit, *entropy, *concentration, *distance; /* [batch, heads, queries] */
  float *block_mass, *block_max, *block_max_logit, *block_weighted; /* [batch, heads, query_blocks, key_blocks] */
  const float *key_weights; /* [batch, heads, keys], for block_weighted */
  int64_t top_k;
  int64_t *top_keys; /* [batch, heads, query_blocks, top_k] */
  float *top_mass;
  float *received; /* [batch, heads, keys] */
  float *diagonal; /* [batch, heads, distances], entry t: distance t + first_distance */
  int64_t first_distance, distances;
  int64_t features;
  const float *features_of_keys; /* [features, batch, kv_heads, keys]: sum_j P_ij f_j */
  float *feature_means;          /* [features, batch, heads, queries] */
  int64_t pairs;
  const int32_t *query_labels, *key_labels; /* [pairs, batch, queries], [pairs, batch, keys] */
  float *match_mass;                        /* [batch, heads, queries, pairs] */
  int64_t groups;
  const int32_t *group_of_key; /* [batch, keys] */
  float *group_output;         /* [groups, batch, heads, queries, value_dim] */
  float *group_lse, *group_max_logit, *group_entropy, *group_concentration, *group_distance; /* [groups, batch, heads, queries] */
} Args;

int64_t lens_args_size(void) { return sizeof(Args); }

/* --- matrix products in registers --- */

/* c[rows][NV lanes] (+)= a[m * a_row + k * a_depth] * b[k * b_row + lane]; scale != NULL: c starts at scale[m] * c. */
INLINE void multiply(const int rows, const int vectors, int64_t depth, const float *a, int64_t a_row, int64_t a_depth,
                     const float *b, int64_t b_row, float *c, int64_t c_row, const float *scale) {
  vec sum[MR][NV];
  UNROLL for (int m = 0; m < rows; m++)
    UNROLL for (int n = 0; n < vectors; n++)
      sum[m][n] = scale ? load(c + m * c_row + n * LANES) * splat(scale[m]) : splat(0.0f);
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

/* All rows: MR at a time, then 4, 2, 1. `scaled` is a constant so that both forms are compiled apart. */
INLINE void multiply_rows(const int vectors, const int scaled, int64_t rows, int64_t depth, const float *a,
                          int64_t a_row, int64_t a_depth, const float *b, int64_t b_row, float *c, int64_t c_row,
                          const float *scale) {
  int64_t m = 0;
#define STEP(size)                                                                                              \
  for (; m + size <= rows; m += size)                                                                           \
    multiply(size, vectors, depth, a + m * a_row, a_row, a_depth, b, b_row, c + m * c_row, c_row, scaled ? scale + m : NULL);
  STEP(6) STEP(4) STEP(2) STEP(1)
#undef STEP
}

#define BY_VECTORS(call)   \
  switch (vectors) {       \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(NV < 3 ? 1 : 3); break; \
    default: call(NV < 4 ? 1 : 4); break; \
  }

/* s[key][lane] = sum_d key[key][d] * query[d][lane] */
static void product_logits(int vectors, int64_t keys, int64_t dim, const float *key, const float *query, float *s) {
  const int64_t width = vectors * LANES;
#define CALL(n) multiply_rows(n, 0, keys, dim, key, dim, 1, query, width, s, width, NULL)
  BY_VECTORS(CALL)
#undef CALL
}

/* acc[row][d] = alpha[row] * acc[row][d] + sum_k p[k][row] * value[k][d] */
static void product_values(int vectors, int64_t rows, int64_t keys, const float *p, int64_t width, const float *value,
                           int64_t value_row, float *acc, int64_t acc_row, const float *alpha) {
#define CALL(n) multiply_rows(n, 1, rows, keys, p, 1, width, value, value_row, acc, acc_row, alpha)
  BY_VECTORS(CALL)
#undef CALL
}

/* --- reading any input type --- */

INLINE float from_half(uint16_t bits) {
#if defined(__FLT16_MAX__)
  _Float16 x;
  memcpy(&x, &bits, 2);
  return (float)x;
#else
  uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff, word;
  float x;
  if (rest >= 0x7c00) word = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  else if (rest >= 0x400) word = sign | ((rest << 13) + 0x38000000);
  else {
    x = (float)rest * 5.9604644775390625e-8f; /* subnormal: a multiple of 2^-24 */
    memcpy(&word, &x, 4);
    word |= sign;
  }
  memcpy(&x, &word, 4);
  return x;
#endif
}

static void read_row(float *out, const Operand *x, int64_t at, int64_t dim) {
  if (x->type == F32) {
    memcpy(out, (const float *)x->data + at, 4 * dim);
  } else if (x->type == F16) {
    const uint16_t *p = (const uint16_t *)x->data + at;
    int64_t d = 0;
#if defined(__F16C__)
    for (; d + 8 <= dim; d += 8) _mm256_storeu_ps(out + d, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + d))));
#endif
    for (; d < dim; d++) out[d] = from_half(p[d]);
  } else {
    const uint16_t *p = (const uint16_t *)x->data + at;
    for (int64_t d = 0; d < dim; d++) {
      uint32_t word = (uint32_t)p[d] << 16;
      memcpy(out + d, &word, 4);
    }
  }
}

/* Rows as float32 with `width` columns (zero beyond dim): in place when they lie so already, else copied. */
static const float *read_rows(float *buffer, const Operand *x, int64_t at, int64_t rows, int64_t dim, int64_t width) {
  if (x->type == F32 && x->row == dim && width == dim) return (const float *)x->data + at;
  for (int64_t i = 0; i < rows; i++) {
    read_row(buffer + i * width, x, at + i * x->row, dim);
    for (int64_t d = dim; d < width; d++) buffer[i * width + d] = 0.0f;
  }
  return buffer;
}

/* --- one query tile --- */

enum { GROUPS = 4 };

typedef struct {
  int64_t start, rows;
} Tile;

/* The keys of one key tile that belong to one group. */
typedef struct {
  int64_t start, keys; /* keys [start, start + keys); those of other groups have p = 0 */
  float *p;            /* P' relative to the pivot: panels of [keys][width] */
  float pivot[ROWS];
} Strip;

/* The keys of a strip that belong to one key block. */
typedef struct {
  int64_t strip, block;
} Part;

/* Running sums of the rows over the keys of one group, relative to exp(max). */
typedef struct {
  float max[ROWS], sum[ROWS], log_part[ROWS], squares[ROWS], distance[ROWS];
  float *output;            /* [ROWS][value_width] */
  float *features, *matched; /* [features][ROWS], [pairs][ROWS] */
} Sums;

typedef struct {
  float *query;       /* Q' scaled: panels of [head_dim][width] */
  float *query_rows;  /* the first FEW rows of Q scaled */
  float *p, *s;       /* P' of one strip, or of all when column statistics are wanted; logits of a mixed tile */
  float *key, *value; /* copies of a key tile, where it cannot be read in place */
  float *part_sum, *part_max, *part_weighted; /* [parts][ROWS]: sum of p, largest logit, sum of p * weight */
  float *block_row;                           /* [key_blocks]: block mass when only top_keys is wanted */
  Strip *strips;
  Part *parts;
  Sums sums[GROUPS];
} Scratch;

typedef struct {
  const Args *args;
  Tile *tiles;
  int64_t tile_count, key_tile, value_width, query_blocks, key_blocks, groups;
  int64_t chunks, *chunk_start; /* ranges of tiles of one head: the units of work */
  int columns, blocks, rows;    /* which kinds of statistics are wanted */
  int split;                    /* a key tile lies in one key block */
  float *received, *diagonal;   /* partial sums [batch * heads, chunks, ...] */
  int64_t diagonal_width;
  int64_t next; /* atomic: the next unit */
} Plan;

/* Everything about the tile that is being computed. */
typedef struct {
  const Plan *plan;
  const Args *a;
  Scratch *w;
  int64_t batch, head, kv_head, start, rows, lanes;
  int64_t anchor; /* key index at which the tile's first query stands */
  int64_t strip_count, part_count;
  int32_t low[ROWS], high[ROWS];
  int32_t any_low, any_high, all_low, all_high; /* some row sees from .. to; all rows see from .. to */
  float alpha[ROWS], lse[ROWS];
} State;

/* The columns of P' that belong to lanes [lane, lane + LANES): first element and step from key to key. */
typedef struct {
  float *first;
  int64_t step;
} Column;

INLINE Column column(float *p, int64_t keys, int64_t lane, int64_t lanes) {
  int64_t panel = lane / PANEL * PANEL;
  return (Column){p + panel * keys + (lane - panel), least(PANEL, lanes - panel)};
}

static void load_query(State *t) {
  const Args *a = t->a;
  float *row = t->w->key;
  for (int64_t r = 0; r < t->lanes; r++) {
    Column to = column(t->w->query, a->head_dim, r, t->lanes);
    int64_t at = t->batch * a->query.batch + t->head * a->query.head + (t->start + r) * a->query.row;
    if (r < t->rows) read_row(row, &a->query, at, a->head_dim);
    else memset(row, 0, 4 * a->head_dim);
    for (int64_t d = 0; d < a->head_dim; d++) to.first[d * to.step] = row[d] * (float)a->scale;
    for (int64_t d = 0; r < FEW && d < a->head_dim; d++) t->w->query_rows[r * a->head_dim + d] = row[d] * (float)a->scale;
  }
}

static void load_intervals(State *t) {
  int64_t at = t->batch * t->a->queries + t->start;
  t->any_low = t->all_high = INT32_MAX;
  t->any_high = t->all_low = INT32_MIN;
  for (int64_t r = 0; r < t->lanes; r++) {
    int64_t row = at + (r < t->rows ? r : 0); /* lanes beyond the last row repeat the first */
    int32_t low = t->low[r] = t->a->low[row], high = t->high[r] = t->a->high[row];
    if (low < high && low < t->any_low) t->any_low = low;
    if (low < high && high > t->any_high) t->any_high = high;
    if (low > t->all_low) t->all_low = low;
    if (high < t->all_high) t->all_high = high;
  }
}

/* The same for a few queries, as dot products along d: a lane per query would leave most lanes idle. */
static void product_few(const State *t, int64_t keys, const float *key, float *s) {
  const int64_t dim = t->a->head_dim, whole = dim / LANES * LANES;
  const float *query = t->w->query_rows;
  for (int64_t k = 0; k < keys; k++) {
    const float *row = key + k * dim;
    float *to = s + k * t->lanes;
    store(to, splat(0.0f));
    for (int64_t r = 0; r < t->rows; r++) {
      vec even = splat(0.0f), odd = even;
      int64_t d = 0;
      for (; d + 2 * LANES <= whole; d += 2 * LANES) {
        even += load(row + d) * load(query + r * dim + d);
        odd += load(row + d + LANES) * load(query + r * dim + d + LANES);
      }
      if (d < whole) even += load(row + d) * load(query + r * dim + d);
      float sum = total(even + odd);
      for (d = whole; d < dim; d++) sum += row[d] * query[r * dim + d];
      to[r] = sum;
    }
  }
}

static void logits(State *t, float *p, int64_t start, int64_t keys) {
  const Args *a = t->a;
  int64_t at = t->batch * a->key.batch + t->kv_head * a->key.head + start * a->key.row;
  const float *key = read_rows(t->w->key, &a->key, at, keys, a->head_dim, a->head_dim);
  if (t->rows <= FEW) {
    product_few(t, keys, key, p);
    return;
  }
  for (int64_t lane = 0; lane < t->lanes; lane += PANEL) {
    int64_t width = least(PANEL, t->lanes - lane);
    product_logits((int)(width / LANES), keys, a->head_dim, key, t->w->query + lane * a->head_dim, p + lane * keys);
  }
}

static void add_plane(State *t, float *p, int64_t start, int64_t keys) {
  const Plane *bias = &t->a->bias;
  const float *from = (const float *)bias->data + t->batch * bias->batch + t->head * bias->head;
  for (int64_t r = 0; r < t->rows; r++) {
    Column to = column(p, keys, r, t->lanes);
    const float *row = from + (t->start + r) * bias->query + start * bias->key;
    for (int64_t k = 0; k < keys; k++) to.first[k * to.step] += row[k * bias->key];
  }
}

static void add_slope(State *t, float *p, int64_t start, int64_t keys) {
  float slope = t->a->slopes[t->head], lane_number[LANES];
  for (int i = 0; i < LANES; i++) lane_number[i] = (float)i;
  for (int64_t r = 0; r < t->lanes; r += LANES) {
    Column to = column(p, keys, r, t->lanes);
    vec query = load(lane_number) + splat((float)(t->anchor + r - start));
    for (int64_t k = 0; k < keys; k++) {
      vec distance = query - splat((float)k);
      distance = choose(distance < splat(0.0f), -distance, distance);
      store(to.first + k * to.step, load(to.first + k * to.step) - splat(slope) * distance);
    }
  }
}

static void cap(State *t, float *p, int64_t keys) {
  vec softcap = splat((float)t->a->softcap), inverse = splat((float)(1.0 / t->a->softcap));
  for (int64_t i = 0; i < t->lanes * keys; i += LANES) store(p + i, softcap * hyperbolic_tangent(load(p + i) * inverse));
}

static void hide_outside(State *t, float *p, int64_t start, int64_t keys) {
  const vec nothing = splat(-INFINITY);
  for (int64_t r = 0; r < t->lanes; r += LANES) {
    Column c = column(p, keys, r, t->lanes);
    ivec low = load_int(t->low + r), high = load_int(t->high + r);
    for (int64_t k = 0; k < keys; k++) {
      ivec j = splat_int((int32_t)(start + k));
      store(c.first + k * c.step, choose((j >= low) & (j < high), load(c.first + k * c.step), nothing));
    }
  }
}

/* Hides whole keys: those with keep == 0, or of another group. */
static void hide_key(State *t, float *p, int64_t keys, int64_t k) {
  for (int64_t r = 0; r < t->lanes; r += LANES) {
    Column c = column(p, keys, r, t->lanes);
    store(c.first + k * c.step, splat(-INFINITY));
  }
}

static void hide_plane(State *t, float *p, int64_t start, int64_t keys) {
  const Plane *mask = &t->a->allowed;
  const uint8_t *from = (const uint8_t *)mask->data + t->batch * mask->batch + t->head * mask->head;
  for (int64_t r = 0; r < t->rows; r++) {
    Column c = column(p, keys, r, t->lanes);
    const uint8_t *row = from + (t->start + r) * mask->query + start * mask->key;
    for (int64_t k = 0; k < keys; k++)
      if (!row[k * mask->key]) c.first[k * c.step] = -INFINITY;
  }
}

/* Largest logit per lane over keys [from, to) of the tile. */
static void largest(State *t, float *p, int64_t keys, int64_t from, int64_t to, float *out) {
  for (int64_t r = 0; r < t->lanes; r += LANES) {
    Column c = column(p, keys, r, t->lanes);
    vec best0 = splat(-INFINITY), best1 = best0;
    int64_t k = from;
    for (; k + 2 <= to; k += 2) {
      best0 = greater(load(c.first + k * c.step), best0);
      best1 = greater(load(c.first + (k + 1) * c.step), best1);
    }
    if (k < to) best0 = greater(load(c.first + k * c.step), best0);
    store(out + r, greater(best0, best1));
  }
}

/* p = exp(s - pivot) over keys [from, to), with the row sums of p, p * (s - pivot), p^2 and p * distance. */
INLINE void exponentials(State *t, Sums *sums, const int rows_wanted, float *p, int64_t start, int64_t keys,
                         int64_t from, int64_t to, const float *pivot, float *part_sum) {
  const vec low = splat(-87.33f);
  for (int64_t r = 0; r < t->lanes; r += LANES) {
    Column c = column(p, keys, r, t->lanes);
    vec at = load(pivot + r), sum = splat(0.0f), log_part = sum, squares = sum, moment = sum;
    for (int64_t k = from; k < to; k++) {
      vec x = load(c.first + k * c.step) - at;
      vec e = exponential(x);
      store(c.first + k * c.step, e);
      sum += e;
      if (rows_wanted) {
        log_part += e * choose(x < low, low, x); /* -inf is where e is 0: keep 0 * -inf away */
        squares += e * e;
        moment += e * splat((float)k);
      }
    }
    store(part_sum + r, sum);
    store(sums->sum + r, load(sums->sum + r) + sum);
    if (rows_wanted) {
      float distance[LANES]; /* of the lane's query from key `start` */
      for (int i = 0; i < LANES; i++) distance[i] = (float)(t->anchor + r + i - start);
      store(sums->log_part + r, load(sums->log_part + r) + log_part);
      store(sums->squares + r, load(sums->squares + r) + squares);
      store(sums->distance + r, load(sums->distance + r) + sum * load(distance) - moment);
    }
  }
}

/* Moves the running sums from pivot `max` to the new pivot; alpha = exp(max - pivot) is left for the vector sums. */
static void rescale(State *t, Sums *sums, const float *pivot) {
  for (int64_t r = 0; r < t->lanes; r += LANES) {
    vec sum = load(sums->sum + r), step = load(sums->max + r) - load(pivot + r);
    vec alpha = exponential(step);
    vec carried = choose(sum == splat(0.0f), sum, step * sum); /* step is -inf where nothing was seen yet */
    store(t->alpha + r, alpha);
    store(sums->log_part + r, alpha * (load(sums->log_part + r) + carried));
    store(sums->squares + r, alpha * alpha * load(sums->squares + r));
    store(sums->distance + r, alpha * load(sums->distance + r));
    store(sums->sum + r, alpha * sum);
  }
}

enum { AT_ONCE = 4 }; /* features that share one reading of p: independent chains of additions */

static void accumulate_features(State *t, Sums *sums, float *p, int64_t start, int64_t keys) {
  const Args *a = t->a;
  const int64_t stride = a->batch * a->kv_heads * a->keys;
  const float *first = a->features_of_keys + (t->batch * a->kv_heads + t->kv_head) * a->keys + start;
  for (int64_t f = 0; f < a->features; f += AT_ONCE) {
    const int64_t count = least(AT_ONCE, a->features - f);
    const float *feature[AT_ONCE];
    for (int64_t i = 0; i < AT_ONCE; i++) feature[i] = first + (f + (i < count ? i : 0)) * stride;
    for (int64_t r = 0; r < t->lanes; r += LANES) {
      Column c = column(p, keys, r, t->lanes);
      vec sum[AT_ONCE] = {0};
      for (int64_t k = 0; k < keys; k++) {
        vec e = load(c.first + k * c.step);
        UNROLL for (int i = 0; i < AT_ONCE; i++) sum[i] += e * splat(feature[i][k]);
      }
      for (int64_t i = 0; i < count; i++) {
        float *to = sums->features + (f + i) * ROWS + r;
        store(to, load(to) * load(t->alpha + r) + sum[i]);
      }
    }
  }
}

static void accumulate_matches(State *t, Sums *sums, float *p, int64_t start, int64_t keys) {
  const Args *a = t->a;
  for (int64_t f = 0; f < a->pairs; f++) {
    const int32_t *key = a->key_labels + (f * a->batch + t->batch) * a->keys + start;
    const int32_t *query = a->query_labels + (f * a->batch + t->batch) * a->queries + t->start;
    for (int64_t r = 0; r < t->lanes; r += LANES) {
      Column c = column(p, keys, r, t->lanes);
      int32_t label[LANES];
      for (int64_t i = 0; i < LANES; i++) label[i] = query[least(r + i, t->rows - 1)];
      ivec wanted = load_int(label);
      vec sum[AT_ONCE] = {0};
      int64_t k = 0;
      for (; k + AT_ONCE <= keys; k += AT_ONCE)
        UNROLL for (int i = 0; i < AT_ONCE; i++)
          sum[i] += (vec)((wanted == splat_int(key[k + i])) & (ivec)load(c.first + (k + i) * c.step));
      for (; k < keys; k++) sum[0] += (vec)((wanted == splat_int(key[k])) & (ivec)load(c.first + k * c.step));
      vec matched = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      matched = (vec)((wanted >= splat_int(0)) & (ivec)matched); /* a negative label matches nothing */
      float *to = sums->matched + f * ROWS + r;
      store(to, load(to) * load(t->alpha + r) + matched);
    }
  }
}

static void accumulate_output(State *t, Sums *sums, float *p, int64_t start, int64_t keys) {
  const Args *a = t->a;
  int64_t width = t->plan->value_width;
  int64_t at = t->batch * a->value.batch + t->kv_head * a->value.head + start * a->value.row;
  const float *value = read_rows(t->w->value, &a->value, at, keys, a->value_dim, width);
  for (int64_t lane = 0; lane < t->lanes; lane += PANEL) {
    int64_t panel = least(PANEL, t->lanes - lane), rows = least(panel, round_up(t->rows - lane, 2));
    for (int64_t d = 0; d < width; d += PANEL)
      product_values((int)(least(PANEL, width - d) / LANES), rows, keys, p + lane * keys, panel, value + d, width,
                     sums->output + lane * width + d, width, t->alpha + lane);
  }
}

/* The keys of one strip, whose logits stand in strip->p: exact update of every sum of their group. */
static void absorb(State *t, Sums *sums, Strip *strip) {
  const Args *a = t->a;
  const Plan *plan = t->plan;
  float *p = strip->p, highest[ROWS];
  int64_t start = strip->start, keys = strip->keys, end = start + keys, first_part = t->part_count;
  memcpy(highest, sums->max, sizeof highest);
  for (int64_t j = start; j < end; t->part_count++) {
    int64_t block = j / a->key_block, stop = plan->blocks ? least(end, (block + 1) * a->key_block) : end;
    float *part_max = t->w->part_max + t->part_count * ROWS;
    t->w->parts[t->part_count] = (Part){t->strip_count, block};
    largest(t, p, keys, j - start, stop - start, part_max);
    for (int64_t r = 0; r < t->lanes; r += LANES) store(highest + r, greater(load(part_max + r), load(highest + r)));
    j = stop;
  }
  for (int64_t r = 0; r < t->lanes; r++) strip->pivot[r] = highest[r] == -INFINITY ? 0.0f : highest[r];
  rescale(t, sums, strip->pivot);
  memcpy(sums->max, highest, sizeof highest);
  int64_t j = start;
  for (int64_t i = first_part; i < t->part_count; i++) {
    int64_t stop = plan->blocks ? least(end, (t->w->parts[i].block + 1) * a->key_block) : end;
    float *part_sum = t->w->part_sum + i * ROWS;
    if (plan->rows) exponentials(t, sums, 1, p, start, keys, j - start, stop - start, strip->pivot, part_sum);
    else exponentials(t, sums, 0, p, start, keys, j - start, stop - start, strip->pivot, part_sum);
    if (a->block_weighted) {
      const float *weight = a->key_weights + (t->batch * a->heads + t->head) * a->keys + start;
      for (int64_t r = 0; r < t->lanes; r += LANES) {
        Column c = column(p, keys, r, t->lanes);
        vec sum = splat(0.0f);
        for (int64_t k = j - start; k < stop - start; k++) sum += load(c.first + k * c.step) * splat(weight[k]);
        store(t->w->part_weighted + i * ROWS + r, sum);
      }
    }
    j = stop;
  }
  if (a->features) accumulate_features(t, sums, p, start, keys);
  if (a->pairs) accumulate_matches(t, sums, p, start, keys);
  accumulate_output(t, sums, p, start, keys);
  if (plan->columns || plan->blocks) t->strip_count++;
  else t->part_count = 0;
}

/* A strip for keys [start, start + keys); strips are kept one after the other where columns need them. */
static Strip *new_strip(State *t, int64_t start, int64_t keys) {
  Strip *strip = t->w->strips + t->strip_count;
  strip->p = t->w->p;
  if (t->plan->columns && t->strip_count) strip->p = strip[-1].p + strip[-1].keys * t->lanes;
  strip->start = start, strip->keys = keys;
  return strip;
}

/* Keys [start, start + keys): the final logits, then one strip per group that occurs among them. */
static void key_tile(State *t, int64_t start, int64_t keys) {
  const Args *a = t->a;
  const int32_t *group = a->groups ? a->group_of_key + t->batch * a->keys + start : NULL;
  int mixed = 0;
  for (int64_t k = 1; group && k < keys; k++) mixed |= group[k] != group[0];
  Strip *strip = mixed ? NULL : new_strip(t, start, keys);
  float *s = mixed ? t->w->s : strip->p;

  logits(t, s, start, keys);
  if (a->softcap > 0) cap(t, s, keys);
  if (a->bias.data) add_plane(t, s, start, keys);
  if (a->slopes) add_slope(t, s, start, keys);
  if (t->all_low > start || t->all_high < start + keys) hide_outside(t, s, start, keys);
  for (int64_t k = 0; a->keep && k < keys; k++)
    if (!a->keep[t->batch * a->keys + start + k]) hide_key(t, s, keys, k);
  if (a->allowed.data) hide_plane(t, s, start, keys);

  if (!mixed) {
    absorb(t, t->w->sums + (group ? group[0] : 0), strip);
    return;
  }
  for (int32_t g = 0; g < a->groups; g++) {
    int64_t members = 0;
    for (int64_t k = 0; k < keys; k++) members += group[k] == g;
    if (!members) continue;
    strip = new_strip(t, start, keys);
    memcpy(strip->p, s, 4 * keys * t->lanes);
    for (int64_t k = 0; k < keys; k++)
      if (group[k] != g) hide_key(t, strip->p, keys, k);
    absorb(t, t->w->sums + g, strip);
  }
}

/* Writes the state of each group and merges them all into the first. */
static void finish_groups(State *t) {
  const Args *a = t->a;
  const int64_t width = t->plan->value_width, rows = a->batch * a->heads * a->queries;
  const int64_t row0 = (t->batch * a->heads + t->head) * a->queries + t->start;
  for (int64_t g = 0; g < a->groups; g++) {
    const Sums *sums = t->w->sums + g;
    for (int64_t r = 0; r < t->rows; r++) {
      float l = sums->sum[r], *to = a->group_output + (g * rows + row0 + r) * a->value_dim;
      int64_t row = g * rows + row0 + r;
      a->group_lse[row] = l == 0.0f ? -INFINITY : sums->max[r] + logf(l);
      if (a->group_max_logit) a->group_max_logit[row] = sums->max[r];
      if (a->group_entropy) a->group_entropy[row] = l == 0.0f ? 0.0f : logf(l) - sums->log_part[r] / l;
      if (a->group_concentration) a->group_concentration[row] = l == 0.0f ? 0.0f : sums->squares[r] / l / l;
      if (a->group_distance) a->group_distance[row] = l == 0.0f ? 0.0f : sums->distance[r] / l;
      for (int64_t d = 0; d < a->value_dim; d++) to[d] = l == 0.0f ? 0.0f : sums->output[r * width + d] / l;
    }
  }
  Sums *whole = t->w->sums;
  float pivot[ROWS], highest[ROWS];
  memcpy(highest, whole->max, sizeof highest);
  for (int64_t g = 1; g < a->groups; g++)
    for (int64_t r = 0; r < t->lanes; r += LANES)
      store(highest + r, greater(load(t->w->sums[g].max + r), load(highest + r)));
  for (int64_t r = 0; r < t->lanes; r++) pivot[r] = highest[r] == -INFINITY ? 0.0f : highest[r];
  for (int64_t g = 0; g < a->groups; g++) {
    Sums *sums = t->w->sums + g;
    rescale(t, sums, pivot);
    for (int64_t r = 0; r < t->lanes; r++) {
      float alpha = t->alpha[r], old = g ? 1.0f : 0.0f; /* group 0 is scaled in place, the others are added */
      if (g) {
        whole->sum[r] += sums->sum[r], whole->log_part[r] += sums->log_part[r];
        whole->squares[r] += sums->squares[r], whole->distance[r] += sums->distance[r];
      }
      for (int64_t d = 0; d < width; d++)
        whole->output[r * width + d] = old * whole->output[r * width + d] + alpha * sums->output[r * width + d];
      for (int64_t f = r; f < a->features * ROWS; f += ROWS)
        whole->features[f] = old * whole->features[f] + alpha * sums->features[f];
      for (int64_t f = r; f < a->pairs * ROWS; f += ROWS)
        whole->matched[f] = old * whole->matched[f] + alpha * sums->matched[f];
    }
  }
  memcpy(whole->max, highest, sizeof highest);
}

/* Divides by the row's denominator (with the learned sink) and writes the row statistics. */
static void finish_rows(State *t) {
  const Args *a = t->a;
  const Sums *sums = t->w->sums;
  const int64_t row0 = (t->batch * a->heads + t->head) * a->queries + t->start, width = t->plan->value_width;
  const int64_t all_rows = a->batch * a->heads * a->queries;
  for (int64_t r = 0; r < t->rows; r++) {
    const int64_t row = row0 + r;
    const float m = sums->max[r], l = sums->sum[r];
    float inverse = 0.0f, shift = 0.0f, lse = -INFINITY; /* exp(m - lse), m - lse: as for an empty row */
    if (l != 0.0f && a->sinks) {
      float sink = a->sinks[t->head], top = sink > m ? sink : m;
      float rest = expf(m - top), whole = l * rest + expf(sink - top);
      inverse = rest / whole, shift = (m - top) - logf(whole), lse = top + logf(whole);
    } else if (l != 0.0f) {
      inverse = 1.0f / l, shift = -logf(l), lse = m + logf(l);
    }
    t->lse[r] = l != 0.0f ? lse : INFINITY; /* for exp(pivot - lse): nothing comes from an empty row */
    a->lse[row] = lse;
    if (a->max_logit) a->max_logit[row] = m;
    if (a->entropy) a->entropy[row] = -inverse * (sums->log_part[r] + l * shift);
    if (a->concentration) a->concentration[row] = sums->squares[r] * inverse * inverse;
    if (a->distance) a->distance[row] = sums->distance[r] * inverse;
    for (int64_t f = 0; f < a->features; f++) a->feature_means[f * all_rows + row] = sums->features[f * ROWS + r] * inverse;
    for (int64_t f = 0; f < a->pairs; f++) a->match_mass[row * a->pairs + f] = sums->matched[f * ROWS + r] * inverse;
    for (int64_t d = 0; d < a->value_dim; d++) a->output[row * a->value_dim + d] = sums->output[r * width + d] * inverse;
  }
  for (int64_t r = t->rows; r < t->lanes; r++) t->lse[r] = INFINITY;
}

/* exp(logit - lse) of each row; 0 in rows that see nothing. */
INLINE void factors(const State *t, const float *logit, float *out) {
  for (int64_t r = 0; r < t->lanes; r += LANES) store(out + r, exponential(load(logit + r) - load(t->lse + r)));
}

/* The k largest of a row of block masses, strongest first, ties by lower index. */
static void strongest(const float *mass, int64_t blocks, int64_t k, int64_t *keys, float *top) {
  int64_t found = 0;
  for (int64_t i = 0; i < blocks; i++) {
    if (found == k && !(mass[i] > top[k - 1])) continue;
    int64_t at = found < k ? found++ : k - 1;
    for (; at > 0 && mass[i] > top[at - 1]; at--) top[at] = top[at - 1], keys[at] = keys[at - 1];
    top[at] = mass[i], keys[at] = i;
  }
}

/* Block maps of the query blocks that this tile covers; a block taller than a tile is added up over its tiles. */
static void finish_blocks(State *t, int64_t *seen_rows) {
  const Args *a = t->a;
  const Plan *plan = t->plan;
  for (int64_t r = 0; r < t->rows;) {
    int64_t block = (t->start + r) / a->query_block, block_end = least((block + 1) * a->query_block, a->queries);
    int64_t stop = least(t->rows, block_end - t->start);
    int64_t line = (t->batch * a->heads + t->head) * plan->query_blocks + block, at = line * plan->key_blocks;
    float *mass = a->block_mass ? a->block_mass + at : a->top_k ? t->w->block_row : NULL;
    float *max = a->block_max ? a->block_max + at : NULL;
    float *logit = a->block_max_logit ? a->block_max_logit + at : NULL;
    float *weighted = a->block_weighted ? a->block_weighted + at : NULL;
    if (t->start + r == block * a->query_block) {
      *seen_rows = 0;
      for (int64_t i = 0; i < plan->key_blocks; i++) {
        if (mass) mass[i] = 0.0f;
        if (max) max[i] = 0.0f;
        if (logit) logit[i] = -INFINITY;
        if (weighted) weighted[i] = 0.0f;
      }
    }
    for (int64_t i = r; i < stop; i++) *seen_rows += t->lse[i] != INFINITY;
    for (int64_t i = 0; i < t->part_count; i++) {
      const Strip *strip = t->w->strips + t->w->parts[i].strip;
      const float *part_sum = t->w->part_sum + i * ROWS, *part_max = t->w->part_max + i * ROWS;
      const float *part_weighted = t->w->part_weighted + i * ROWS;
      const int64_t to = t->w->parts[i].block;
      float factor[ROWS], sum = 0.0f, weighted_sum = 0.0f;
      factors(t, strip->pivot, factor);
      if (mass) {
        for (int64_t row = r; row < stop; row++) sum += part_sum[row] * factor[row];
        mass[to] += sum;
      }
      if (weighted) {
        for (int64_t row = r; row < stop; row++) weighted_sum += part_weighted[row] * factor[row];
        weighted[to] += weighted_sum;
      }
      if (max) {
        float highest[ROWS];
        factors(t, part_max, highest);
        for (int64_t row = r; row < stop; row++) max[to] = highest[row] > max[to] ? highest[row] : max[to];
      }
      if (logit)
        for (int64_t row = r; row < stop; row++) logit[to] = part_max[row] > logit[to] ? part_max[row] : logit[to];
    }
    if (t->start + stop == block_end) {
      for (int64_t i = 0; *seen_rows && i < plan->key_blocks; i++) {
        if (mass) mass[i] /= (float)*seen_rows;
        if (weighted) weighted[i] /= (float)*seen_rows;
      }
      if (a->top_k) strongest(mass, plan->key_blocks, a->top_k, a->top_keys + line * a->top_k, a->top_mass + line * a->top_k);
    }
    r = stop;
  }
}

static void finish_columns(State *t, float *received, float *diagonal) {
  for (int64_t i = 0; i < t->strip_count; i++) {
    const Strip *strip = t->w->strips + i;
    float factor[ROWS];
    factors(t, strip->pivot, factor);
    if (received)
      for (int64_t k = 0; k < strip->keys; k++) {
        vec sum = splat(0.0f);
        for (int64_t r = 0; r < t->lanes; r += LANES) {
          Column c = column(strip->p, strip->keys, r, t->lanes);
          sum += load(c.first + k * c.step) * load(factor + r);
        }
        received[strip->start + k] += total(sum);
      }
    if (diagonal)
      for (int64_t r = 0; r < t->lanes; r += LANES) {
        Column c = column(strip->p, strip->keys, r, t->lanes);
        vec scale = load(factor + r);
        /* Entry of lane 0 and key 0. Masked lanes may lie outside: they add 0 in the slack round the array. */
        float *to = diagonal + (t->anchor + r - strip->start - t->a->first_distance);
        for (int64_t phase = 0; phase < LANES; phase++) /* neighbours in the inner loop never overlap */
          for (int64_t k = phase; k < strip->keys; k += LANES)
            store(to - k, load(to - k) + load(c.first + k * c.step) * scale);
      }
  }
}

static int skipped(const State *t, int64_t start) {
  const Plane *blocks = &t->a->blocks;
  if (!blocks->data) return 0;
  const uint8_t *from = (const uint8_t *)blocks->data;
  return !from[t->batch * blocks->batch + t->head * blocks->head + t->start / t->a->query_block * blocks->query +
               start / t->a->key_block * blocks->key];
}

static void query_tile(const Plan *plan, Scratch *w, int64_t head, int64_t tile, float *received, float *diagonal,
                       int64_t *seen_rows) {
  const Args *a = plan->args;
  State t = {.plan = plan, .a = a, .w = w, .batch = head / a->heads, .head = head % a->heads};
  t.kv_head = t.head / (a->heads / a->kv_heads);
  t.start = plan->tiles[tile].start, t.rows = plan->tiles[tile].rows, t.lanes = round_up(t.rows, LANES);
  t.anchor = a->anchor[t.batch] + t.start;
  load_query(&t);
  load_intervals(&t);
  for (int64_t g = 0; g < plan->groups; g++) {
    Sums *sums = w->sums + g;
    for (int r = 0; r < ROWS; r++) {
      sums->max[r] = -INFINITY;
      sums->sum[r] = sums->log_part[r] = sums->squares[r] = sums->distance[r] = 0.0f;
    }
    memset(sums->output, 0, 4 * ROWS * plan->value_width);
    memset(sums->features, 0, 4 * ROWS * a->features);
    memset(sums->matched, 0, 4 * ROWS * a->pairs);
  }
  for (int64_t start = 0, stop; start < a->keys; start = stop) {
    stop = least(start + plan->key_tile, plan->split ? (start / a->key_block + 1) * a->key_block : a->keys);
    stop = least(stop, a->keys);
    int64_t from = most(start, t.any_low), to = least(stop, t.any_high);
    if (from < to && !skipped(&t, start)) key_tile(&t, from, to - from);
  }
  if (a->groups) finish_groups(&t);
  finish_rows(&t);
  if (plan->blocks) finish_blocks(&t, seen_rows);
  if (plan->columns) finish_columns(&t, received, diagonal);
}

/* --- threads --- */

static void *allocate(int64_t bytes) {
  void *p = NULL;
  return posix_memalign(&p, ALIGN, (size_t)most(bytes, ALIGN)) ? NULL : p;
}

typedef struct {
  char *base;
  int64_t size;
} Layout;

static void *take(Layout *layout, int64_t bytes) {
  void *p = layout->base ? layout->base + layout->size : NULL;
  layout->size += round_up(bytes, ALIGN) + ALIGN;
  return p;
}

static Scratch lay_out(const Plan *plan, Layout *layout) {
  const Args *a = plan->args;
  int64_t per_block = (a->key_block + plan->key_tile - 1) / plan->key_tile;
  int64_t tiles = plan->split ? plan->key_blocks * per_block : a->keys / plan->key_tile + 1;
  int64_t strips = plan->blocks || plan->columns ? tiles * plan->groups + 1 : 1;
  int64_t parts = plan->blocks && !plan->split ? plan->key_blocks * plan->groups + 1 : strips;
  Scratch w = {0};
  w.block_row = take(layout, a->top_k ? 4 * plan->key_blocks : 0); /* first: it outlives the tile */
  w.query = take(layout, 4 * ROWS * a->head_dim);
  w.query_rows = take(layout, 4 * FEW * a->head_dim);
  w.p = take(layout, 4 * ROWS * (plan->columns ? a->keys * plan->groups : plan->key_tile));
  w.s = take(layout, a->groups ? 4 * ROWS * plan->key_tile : 0);
  w.key = take(layout, 4 * plan->key_tile * a->head_dim);
  w.value = take(layout, 4 * plan->key_tile * plan->value_width);
  w.part_sum = take(layout, 4 * ROWS * parts);
  w.part_max = take(layout, 4 * ROWS * parts);
  w.part_weighted = take(layout, a->block_weighted ? 4 * ROWS * parts : 0);
  w.strips = take(layout, strips * (int64_t)sizeof(Strip));
  w.parts = take(layout, parts * (int64_t)sizeof(Part));
  for (int64_t g = 0; g < plan->groups; g++) {
    w.sums[g].output = take(layout, 4 * ROWS * plan->value_width);
    w.sums[g].features = take(layout, 4 * ROWS * a->features);
    w.sums[g].matched = take(layout, 4 * ROWS * a->pairs);
  }
  return w;
}

static void work(void *argument) {
  Plan *plan = argument;
  const Args *a = plan->args;
  int64_t heads = a->batch * a->heads, units = heads * plan->chunks;
  if (__atomic_load_n(&plan->next, __ATOMIC_RELAXED) >= units) return;
  Layout size = {NULL, 0};
  lay_out(plan, &size);
  Layout layout = {allocate(size.size), 0};
  if (!layout.base) return; /* the other threads do the work */
  Scratch w = lay_out(plan, &layout);
  for (;;) {
    int64_t unit = __atomic_fetch_add(&plan->next, 1, __ATOMIC_RELAXED);
    if (unit >= units) break;
    int64_t chunk = plan->chunks - 1 - unit / heads, head = unit % heads; /* late queries see more keys: first */
    float *received = plan->received ? plan->received + (head * plan->chunks + chunk) * a->keys : NULL;
    float *diagonal = plan->diagonal ? plan->diagonal + (head * plan->chunks + chunk) * plan->diagonal_width + ROWS + COLS : NULL;
    int64_t seen_rows = 0;
    for (int64_t tile = plan->chunk_start[chunk]; tile < plan->chunk_start[chunk + 1]; tile++) {
      if (a->poison) memset(w.query, 0xff, (size_t)(layout.base + layout.size - (char *)w.query));
      query_tile(plan, &w, head, tile, received, diagonal, &seen_rows);
    }
  }
  free(layout.base);
}

static void *work_thread(void *plan) {
  work(plan);
  return NULL;
}

/* Every thread takes units until none is left. torch's own OpenMP threads are used where the caller
 * found them: others would share the cores with these, which spin for milliseconds after each operation. */
static void work_in_parallel(Plan *plan) {
  const Args *a = plan->args;
  if (a->threads > 1 && a->openmp_parallel) {
    a->openmp_parallel(work, plan, (unsigned)a->threads, 0);
    return;
  }
  int64_t helpers = least(a->threads, a->batch * a->heads * plan->chunks) - 1, started = 0;
  pthread_t *thread = helpers > 0 ? malloc((size_t)helpers * sizeof *thread) : NULL;
  for (; thread && started < helpers; started++)
    if (pthread_create(&thread[started], NULL, work_thread, plan)) break; /* fewer threads, same result */
  work(plan);
  for (int64_t i = 0; i < started; i++) pthread_join(thread[i], NULL);
  free(thread);
}

/* Adds the partial columns of a head in the order of the chunks. */
static void reduce(const float *partial, int64_t chunks, int64_t width, int64_t skip, float *out, int64_t n, int64_t heads) {
  for (int64_t head = 0; head < heads; head++)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const float *from = partial + (head * chunks + chunk) * width + skip;
      for (int64_t i = 0; i < n; i++) out[head * n + i] = (chunk ? out[head * n + i] : 0.0f) + from[i];
    }
}

/* Query tiles end where query blocks end; chunks are whole query blocks. */
static int cut(Plan *plan) {
  const Args *a = plan->args;
  int64_t blocks_per_tile = a->blocks.data ? 1 : most(1, ROWS / a->query_block);
  int64_t heads = a->batch * a->heads, limit = a->queries / least(ROWS, a->query_block) + plan->query_blocks + 1;
  plan->tiles = allocate(limit * (int64_t)sizeof(Tile));
  int64_t most_chunks = plan->columns ? most(1, 256 / most(1, heads)) : limit;
  plan->chunk_start = allocate((limit + 1) * 8);
  if (!plan->tiles || !plan->chunk_start) return NO_MEMORY;
  int64_t per_chunk = most(round_up(a->queries, most_chunks) / most_chunks, 1), chunk_end = 0;
  for (int64_t start = 0; start < a->queries;) {
    int64_t block = start / a->query_block;
    int64_t stop = a->query_block <= ROWS ? (block + blocks_per_tile) * a->query_block
                                          : least(start + ROWS, (block + 1) * a->query_block);
    stop = least(stop, a->queries);
    if (start >= chunk_end && start % a->query_block == 0) {
      plan->chunk_start[plan->chunks++] = plan->tile_count;
      chunk_end = start + per_chunk;
    }
    plan->tiles[plan->tile_count++] = (Tile){start, stop - start};
    start = stop;
  }
  plan->chunk_start[plan->chunks] = plan->tile_count;
  return OK;
}

int lens_attention(const Args *a) {
  Plan plan = {.args = a};
  plan.value_width = round_up(a->value_dim, LANES);
  plan.query_blocks = (a->queries + a->query_block - 1) / a->query_block;
  plan.key_blocks = (a->keys + a->key_block - 1) / a->key_block;
  int64_t widest = most(a->head_dim, a->value_dim) > 128 ? COLS / 2 : COLS;
  plan.groups = most(1, a->groups);
  plan.columns = a->received || a->diagonal;
  plan.blocks = a->block_mass || a->block_max || a->block_max_logit || a->block_weighted || a->top_k;
  plan.rows = a->entropy || a->concentration || a->distance;
  plan.split = a->blocks.data || (plan.blocks && a->key_block > widest);
  plan.key_tile = plan.split ? least(widest, a->key_block) : plan.blocks ? widest / a->key_block * a->key_block : widest;
  plan.diagonal_width = a->distances + 2 * (ROWS + COLS);
  int64_t heads = a->batch * a->heads;
  int status = cut(&plan);
  if (status == OK && a->received) {
    plan.received = calloc((size_t)(heads * plan.chunks * a->keys), 4);
    if (!plan.received) status = NO_MEMORY;
  }
  if (status == OK && a->diagonal) {
    plan.diagonal = calloc((size_t)(heads * plan.chunks * plan.diagonal_width), 4);
    if (!plan.diagonal) status = NO_MEMORY;
  }
  if (status == OK) {
    work_in_parallel(&plan);
    if (plan.next < heads * plan.chunks) status = NO_MEMORY;
  }
  if (status == OK && a->received) reduce(plan.received, plan.chunks, a->keys, 0, a->received, a->keys, heads);
  if (status == OK && a->diagonal)
    reduce(plan.diagonal, plan.chunks, plan.diagonal_width, ROWS + COLS, a->diagonal, a->distances, heads);
  free(plan.received);
  free(plan.diagonal);
  free(plan.tiles);
  free(plan.chunk_start);
  return status;
}
