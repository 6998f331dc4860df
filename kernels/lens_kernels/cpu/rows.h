/* What both passes share: the caller's inputs, a tile of query rows, and its logits with every mask. */
#pragma once

#include "blocks.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

enum {
  ROWS = 64,  /* queries per tile; a multiple of PANEL */
  COLS = 128, /* keys per tile at most */
  FEW = 4,    /* queries for which dot products are faster */
};
enum { F32 = 0, F16 = 1, BF16 = 2 };
enum { OK = 0, NO_MEMORY = 1 };

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
} Inputs;

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

static inline void read_row(float *out, const Operand *x, int64_t at, int64_t dim) {
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
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) store(out + d, load_brain(p + d));
    for (; d < dim; d++) {
      uint32_t word = (uint32_t)p[d] << 16;
      memcpy(out + d, &word, 4);
    }
  }
}

/* Rows as float32 with `width` columns (zero beyond dim): in place when they lie so already, else copied. */
static inline const float *read_rows(float *buffer, const Operand *x, int64_t at, int64_t rows, int64_t dim, int64_t width) {
  if (x->type == F32 && x->row == dim && width == dim) return (const float *)x->data + at;
  for (int64_t i = 0; i < rows; i++) {
    read_row(buffer + i * width, x, at + i * x->row, dim);
    for (int64_t d = dim; d < width; d++) buffer[i * width + d] = 0.0f;
  }
  return buffer;
}

/* Whether none of `dim` numbers is NaN or infinite. */
static inline int is_finite_row(const Operand *x, int64_t at, int64_t dim) {
  const int32_t top = x->type == F16 ? 0x7c00 : x->type == BF16 ? 0x7f80 : 0x7f800000; /* the exponent of those */
  int64_t d = 0;
  ivec bad = splat_int(0);
  int found;
  if (x->type == F32) {
    const int32_t *p = (const int32_t *)x->data + at;
    for (; d + LANES <= dim; d += LANES) bad |= (load_int(p + d) & splat_int(top)) == splat_int(top);
    for (found = any_set(bad); d < dim; d++) found |= (p[d] & top) == top;
  } else {
    const uint16_t *p = (const uint16_t *)x->data + at;
    for (; d + LANES <= dim; d += LANES)
      bad |= ((ivec)load_short(p + d) & splat_int(top)) == splat_int(top);
    for (found = any_set(bad); d < dim; d++) found |= (p[d] & top) == top;
  }
  return !found;
}

/* The same of rows [part / parts, (part + 1) / parts) of the rows of one head. */
static inline int is_finite_part(const Operand *x, int64_t batch, int64_t head, int64_t rows, int64_t dim, int64_t part,
                                 int64_t parts) {
  int64_t at = batch * x->batch + head * x->head;
  for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; i++)
    if (!is_finite_row(x, at + i * x->row, dim)) return 0;
  return 1;
}

/* --- a tile of query rows --- */

typedef struct {
  int64_t start, rows;
} Tile;

typedef struct {
  const Inputs *in;
  int64_t batch, head, kv_head, start, rows, lanes; /* lanes: rows rounded up to whole vectors */
  int64_t anchor;                                   /* key index at which the tile's first query stands */
  int32_t low[ROWS], high[ROWS];
  int32_t any_low, any_high, all_low, all_high; /* some row sees from .. to; all rows see from .. to */
  float *query;      /* Q' scaled: panels of [head_dim][width] */
  float *query_rows; /* the first FEW rows of Q scaled */
  int brain;         /* query holds pairs of bfloat16, not scaled: panels of [head_dim / 2][width] */
  uint32_t *query_blocks; /* for the tiles of AMX, else NULL: rows of pairs of depths, a lane beside the other */
  const Split *split;     /* the keys that are multiplied next, or NULL */
  float left;        /* the scale where logits do not have it yet, else 1 */
  float *key;        /* a copy of a key tile, where it cannot be read in place */
} Rows;

/* The entries of lanes [lane, lane + LANES) in panels of [steps][width]: the first, and the step to the next. */
typedef struct {
  float *first;
  int64_t step;
} Column;

INLINE Column column(float *p, int64_t steps, int64_t lane, int64_t lanes) {
  int64_t panel = lane / PANEL * PANEL;
  return (Column){p + panel * steps + (lane - panel), least(PANEL, lanes - panel)};
}

/* Writes one row as a column of panels. */
static inline void transpose_row(float *panels, int64_t dim, int64_t lane, int64_t lanes, const float *row, float scale) {
  Column to = column(panels, dim, lane, lanes);
  for (int64_t d = 0; d < dim; d++) to.first[d * to.step] = row[d] * scale;
}

static inline void load_queries(Rows *t) {
  const Inputs *in = t->in;
  const float scale = (float)in->scale;
#if defined(__AVX512BF16__)
  if (t->brain) {
    for (int64_t lane = 0; lane < t->lanes; lane += PANEL) {
      int64_t width = least(PANEL, t->lanes - lane), rows = most(0, least(width, t->rows - lane));
      uint32_t *to = (uint32_t *)t->query + lane * (in->head_dim / 2);
      memset(to, 0, 4 * width * (in->head_dim / 2));
      for (int64_t r = 0; r < rows; r++) {
        const uint16_t *from = (const uint16_t *)in->query.data + t->batch * in->query.batch + t->head * in->query.head +
                               (t->start + lane + r) * in->query.row;
        for (int64_t d = 0; d < in->head_dim / 2; d++) memcpy(to + d * width + r, from + 2 * d, 4);
      }
    }
#if HAS_AMX
    const Pairs blocks = pairs_at(t->query_blocks, t->lanes);
    for (int64_t d = 0; t->query_blocks && d < in->head_dim / 2; d++)
      for (int64_t r = 0; r < t->lanes; r += SIDE) memcpy(place_of(blocks, d, r), (uint32_t *)t->query + d * t->lanes + r, 4 * SIDE);
#endif
    return;
  }
#endif
  float *row = t->key;
  memset(row, 0, 4 * in->head_dim);
  for (int64_t r = t->lanes - 1; r >= 0; r--) { /* lanes beyond the last row are 0 */
    int64_t at = t->batch * in->query.batch + t->head * in->query.head + (t->start + r) * in->query.row;
    if (r < t->rows) read_row(row, &in->query, at, in->head_dim);
    transpose_row(t->query, in->head_dim, r, t->lanes, row, scale);
    for (int64_t d = 0; r < FEW && d < in->head_dim; d++) t->query_rows[r * in->head_dim + d] = row[d] * scale;
  }
}

static inline void load_intervals(Rows *t) {
  int64_t at = t->batch * t->in->queries + t->start;
  t->any_low = t->all_high = INT32_MAX;
  t->any_high = t->all_low = INT32_MIN;
  for (int64_t r = 0; r < t->lanes; r++) {
    int64_t row = at + (r < t->rows ? r : 0); /* lanes beyond the last row repeat the first */
    int32_t low = t->low[r] = t->in->low[row], high = t->high[r] = t->in->high[row];
    if (low < high && low < t->any_low) t->any_low = low;
    if (low < high && high > t->any_high) t->any_high = high;
    if (low > t->all_low) t->all_low = low;
    if (high < t->all_high) t->all_high = high;
  }
}

static inline int is_skipped(const Rows *t, int64_t start) {
  const Plane *blocks = &t->in->blocks;
  if (!blocks->data) return 0;
  const uint8_t *from = (const uint8_t *)blocks->data;
  return !from[t->batch * blocks->batch + t->head * blocks->head + t->start / t->in->query_block * blocks->query +
               start / t->in->key_block * blocks->key];
}

/* Everything of a tile but its logits; the three pointers are set. */
static inline void load_rows(Rows *t, int64_t head, Tile tile) {
  const Inputs *in = t->in;
  t->batch = head / in->heads, t->head = head % in->heads, t->kv_head = t->head / (in->heads / in->kv_heads);
  t->start = tile.start, t->rows = tile.rows, t->lanes = round_up(tile.rows, LANES);
  t->anchor = in->anchor[t->batch] + tile.start;
  load_queries(t);
  load_intervals(t);
}

/* --- logits of a tile: panels of [keys][width] --- */

/* s[key][lane] = sum_d key[key][d] * query[d][lane] for a few queries, as dot products along d: a lane per query
 * would leave most lanes idle. */
static inline void product_few(const Rows *t, int64_t keys, const float *key, float *s) {
  const int64_t dim = t->in->head_dim, whole = dim / LANES * LANES;
  const float *query = t->query_rows;
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

static inline void add_plane(const Rows *t, float *p, int64_t start, int64_t keys) {
  const Plane *bias = &t->in->bias;
  const float *from = (const float *)bias->data + t->batch * bias->batch + t->head * bias->head;
  for (int64_t r = 0; r < t->rows; r++) {
    Column to = column(p, keys, r, t->lanes);
    const float *row = from + (t->start + r) * bias->query + start * bias->key;
    for (int64_t k = 0; k < keys; k++) to.first[k * to.step] += row[k * bias->key];
  }
}

static inline void add_slope(const Rows *t, float *p, int64_t start, int64_t keys) {
  float slope = t->in->slopes[t->head], lane_number[LANES];
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

/* slope != NULL: takes the derivative of the cap. */
static inline void cap(const Rows *t, float *p, int64_t keys, float *slope) {
  const vec softcap = splat((float)t->in->softcap), inverse = splat((float)(1.0 / t->in->softcap));
  for (int64_t i = 0; i < t->lanes * keys; i += LANES) {
    vec part = hyperbolic_tangent(load(p + i) * inverse);
    store(p + i, softcap * part);
    if (slope) store(slope + i, splat(1.0f) - part * part);
  }
}

static inline void hide_outside(const Rows *t, float *p, int64_t start, int64_t keys) {
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
static inline void hide_key(const Rows *t, float *p, int64_t keys, int64_t k) {
  for (int64_t r = 0; r < t->lanes; r += LANES) {
    Column c = column(p, keys, r, t->lanes);
    store(c.first + k * c.step, splat(-INFINITY));
  }
}

static inline void hide_plane(const Rows *t, float *p, int64_t start, int64_t keys) {
  const Plane *mask = &t->in->allowed;
  const uint8_t *from = (const uint8_t *)mask->data + t->batch * mask->batch + t->head * mask->head;
  for (int64_t r = 0; r < t->rows; r++) {
    Column c = column(p, keys, r, t->lanes);
    const uint8_t *row = from + (t->start + r) * mask->query + start * mask->key;
    for (int64_t k = 0; k < keys; k++)
      if (!row[k * mask->key]) c.first[k * c.step] = -INFINITY;
  }
}

/* How many of the keys from `start` on rows [lane, lane + LANES) reach at most; the others are hidden from them. */
static inline int64_t reached(const Rows *t, int64_t lane, int64_t start, int64_t keys) {
  if (t->all_high >= start + keys) return keys;
  int32_t furthest = t->high[lane];
  for (int r = 1; r < LANES; r++) furthest = t->high[lane + r] > furthest ? t->high[lane + r] : furthest;
  return most(0, least(keys, furthest - start));
}

/* Q K' of the keys from `start` on for one panel; of keys that its first rows do not reach only for those behind them. */
static inline void multiply_panel(Rows *t, float *p, int64_t lane, int64_t start, int64_t keys, const float *key) {
  const int64_t dim = t->in->head_dim, width = least(PANEL, t->lanes - lane);
  int64_t from = 0;
  for (int64_t k = 0, stop; k < keys; k = stop) {
    while (from < width && (stop = reached(t, lane + from, start, keys)) <= k) from += LANES;
    if (from == width) return;
    product(width - from, stop - k, dim, key + k * dim, dim, t->query + lane * dim + from, width,
            p + lane * keys + k * width + from, width, NULL);
  }
}

/* scale * Q K' of the keys from `start` on, but for t->left; what a row does not reach may be left as it was, if nothing asks for it. */
static inline void multiply_keys(Rows *t, float *p, int64_t start, int64_t keys) {
  const Inputs *in = t->in;
  int64_t at = t->batch * in->key.batch + t->kv_head * in->key.head + start * in->key.row;
  t->left = 1.0f;
#if defined(__AVX512BF16__)
  const float scale = (float)in->scale;
  const int64_t pairs = in->head_dim / 2;
#if HAS_AMX
  if (t->split) {
    const int64_t lanes = t->lanes, rows = round_up(keys, SIDE);
    product_amx(1, lanes, rows, pairs, keys_from(t->split, start), pairs_at(t->query_blocks, lanes), p, lanes);
    if (scale > 0 && in->softcap == 0 && !in->bias.data && !in->slopes) t->left = scale;
    else
      for (int64_t i = 0; i < keys * lanes; i += LANES) store(p + i, load(p + i) * splat(scale));
    return;
  }
#endif
  if (t->brain) {
    const char *key = (const char *)((const uint16_t *)in->key.data + at);
    for (int64_t lane = 0; lane < t->lanes; lane += PANEL) {
      int64_t width = least(PANEL, t->lanes - lane);
      product_brain(1, width, keys, pairs, key, 2 * in->key.row, 4, (const uint32_t *)t->query + lane * pairs, width,
                    p + lane * keys, width, &scale);
    }
    return;
  }
#endif
  const float *key = read_rows(t->key, &in->key, at, keys, in->head_dim, in->head_dim);
  if (t->rows <= FEW) product_few(t, keys, key, p);
  else
    for (int64_t lane = 0; lane < t->lanes; lane += PANEL) {
      int64_t width = least(PANEL, t->lanes - lane);
      if (in->softcap == 0) multiply_panel(t, p, lane, start, keys, key); /* a cap's slope is read everywhere */
      else product(width, keys, in->head_dim, key, in->head_dim, t->query + lane * in->head_dim, width, p + lane * keys, width, NULL);
    }
}

/* The logits of keys [start, start + keys) but for t->left, -inf where hidden; slope as in `cap`. */
static inline void logits(Rows *t, float *p, int64_t start, int64_t keys, float *slope) {
  const Inputs *in = t->in;
  multiply_keys(t, p, start, keys);
  if (in->softcap > 0) cap(t, p, keys, slope);
  if (in->bias.data) add_plane(t, p, start, keys);
  if (in->slopes) add_slope(t, p, start, keys);
  if (t->all_low > start || t->all_high < start + keys) hide_outside(t, p, start, keys);
  for (int64_t k = 0; in->keep && k < keys; k++)
    if (!in->keep[t->batch * in->keys + start + k]) hide_key(t, p, keys, k);
  if (in->allowed.data) hide_plane(t, p, start, keys);
}
