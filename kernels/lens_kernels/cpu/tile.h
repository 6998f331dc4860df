/* A tile of queries of the forward pass, and what a tile of keys adds to it. */
#pragma once
#include "forward.h"

enum {
  GROUPS = 4,
  SLACK = ROWS + COLS, /* entries on either side of the diagonals, for masked lanes */
};

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
  float *query, *query_rows; /* see Rows */
  float *p, *s;       /* P' of one strip, or of all when column statistics are wanted; logits of a mixed tile */
  float *key, *value; /* copies of a key tile, where it cannot be read in place */
  uint32_t *pairs;    /* P' of a strip as pairs of bfloat16 */
  float *part_sum, *part_max, *part_weighted; /* [parts][ROWS]: sum of p, largest logit, sum of p * weight */
  float *block_row;                           /* [key_blocks]: block mass when only top_keys is wanted */
  Strip *strips;
  Part *parts;
  Sums sums[GROUPS];
} Scratch;

typedef struct {
  const Forward *args;
  Cut cut;
  int64_t key_tile, value_width, query_blocks, key_blocks, groups;
  int brain;                    /* bfloat16 by the machine's own instruction */
  int columns, blocks, rows;    /* which kinds of statistics are wanted */
  int split;                    /* a key tile lies in one key block */
  float *received, *diagonal;   /* partial sums [batch * heads, chunks, ...] */
  int64_t diagonal_width;
} Plan;

/* Everything about the tile that is being computed. */
typedef struct {
  const Plan *plan;
  const Forward *a;
  Scratch *w;
  Rows q;
  int64_t strip_count, part_count;
  float alpha[ROWS], lse[ROWS];
} State;

/* Largest logit per lane over keys [from, to) of the tile. */
static void largest(State *t, float *p, int64_t keys, int64_t from, int64_t to, float *out) {
  for (int64_t r = 0; r < t->q.lanes; r += LANES) {
    Column c = column(p, keys, r, t->q.lanes);
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
  for (int64_t r = 0; r < t->q.lanes; r += LANES) {
    Column c = column(p, keys, r, t->q.lanes);
    vec at = load(pivot + r), sum = splat(0.0f), log_part = sum, squares = sum, moment = sum, place = splat((float)from);
    for (int64_t k = from; k < to; k++) {
      vec x = load(c.first + k * c.step) - at;
      vec e = exponential(x);
      store(c.first + k * c.step, e);
      sum += e;
      if (rows_wanted) {
        log_part += e * choose(x < low, low, x); /* -inf is where e is 0: keep 0 * -inf away */
        squares += e * e;
        moment += e * place;
        place += splat(1.0f);
      }
    }
    store(part_sum + r, sum);
    store(sums->sum + r, load(sums->sum + r) + sum);
    if (rows_wanted) {
      float distance[LANES]; /* of the lane's query from key `start` */
      for (int i = 0; i < LANES; i++) distance[i] = (float)(t->q.anchor + r + i - start);
      store(sums->log_part + r, load(sums->log_part + r) + log_part);
      store(sums->squares + r, load(sums->squares + r) + squares);
      store(sums->distance + r, load(sums->distance + r) + sum * load(distance) - moment);
    }
  }
}

/* Moves the running sums from pivot `max` to the new pivot; alpha = exp(max - pivot) is left for the vector sums. */
static void rescale(State *t, Sums *sums, const float *pivot) {
  for (int64_t r = 0; r < t->q.lanes; r += LANES) {
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

static int is_zero(const float *x, int64_t n) {
  int64_t i = 0;
  ivec bits = splat_int(0);
  for (; i + LANES <= n; i += LANES) bits |= load(x + i) != splat(0.0f);
  int found = 0;
  for (int lane = 0; lane < LANES; lane++) found |= bits[lane] != 0;
  for (; i < n; i++) found |= x[i] != 0.0f;
  return !found;
}

static void accumulate_features(State *t, Sums *sums, float *p, int64_t start, int64_t keys) {
  const Forward *a = t->a;
  const Inputs *in = &a->in;
  const int64_t stride = in->batch * in->kv_heads * in->keys;
  const float *first = a->features_of_keys + (t->q.batch * in->kv_heads + t->q.kv_head) * in->keys + start;
  for (int64_t f = 0; f < a->features; f += AT_ONCE) {
    const int64_t count = least(AT_ONCE, a->features - f);
    const float *feature[AT_ONCE];
    int any = 0; /* of a mark of few keys (a prefix) most tiles have none */
    for (int64_t i = 0; i < AT_ONCE; i++) {
      feature[i] = first + (f + (i < count ? i : 0)) * stride;
      any = any || !is_zero(feature[i], keys);
    }
    for (int64_t r = 0; r < t->q.lanes; r += LANES) {
      Column c = column(p, keys, r, t->q.lanes);
      vec sum[AT_ONCE] = {0};
      for (int64_t k = 0; any && k < keys; k++) {
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

/* The least and the largest of n > 0 numbers. */
static void bounds(const int32_t *x, int64_t n, int32_t *low, int32_t *high) {
  ivec least_of = splat_int(x[0]), most_of_all = least_of;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    ivec part = load_int(x + i), less = part < least_of, more = part > most_of_all;
    least_of = (less & part) | (~less & least_of);
    most_of_all = (more & part) | (~more & most_of_all);
  }
  *low = *high = x[0];
  for (int lane = 0; lane < LANES; lane++) {
    *low = least_of[lane] < *low ? least_of[lane] : *low;
    *high = most_of_all[lane] > *high ? most_of_all[lane] : *high;
  }
  for (; i < n; i++) {
    *low = x[i] < *low ? x[i] : *low;
    *high = x[i] > *high ? x[i] : *high;
  }
}

/* Whether the ranges of two lists of labels overlap: of positions, those of most tiles do not. */
static int meets(const int32_t *query, int64_t queries, const int32_t *key, int64_t keys) {
  int32_t low[2], high[2];
  bounds(query, queries, &low[0], &high[0]);
  bounds(key, keys, &low[1], &high[1]);
  return low[0] <= high[1] && low[1] <= high[0];
}

static void accumulate_matches(State *t, Sums *sums, float *p, int64_t start, int64_t keys) {
  const Forward *a = t->a;
  const Inputs *in = &a->in;
  for (int64_t f = 0; f < a->pairs; f++) {
    const int32_t *key = a->key_labels + (f * in->batch + t->q.batch) * in->keys + start;
    const int32_t *query = a->query_labels + (f * in->batch + t->q.batch) * in->queries + t->q.start;
    const int may_meet = meets(query, t->q.rows, key, keys);
    for (int64_t r = 0; r < t->q.lanes; r += LANES) {
      Column c = column(p, keys, r, t->q.lanes);
      int32_t label[LANES];
      for (int64_t i = 0; i < LANES; i++) label[i] = query[least(r + i, t->q.rows - 1)];
      ivec wanted = load_int(label);
      vec sum[AT_ONCE] = {0};
      int64_t k = may_meet ? 0 : keys;
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
  const Inputs *in = &t->a->in;
  const int64_t width = t->plan->value_width;
  int64_t at = t->q.batch * in->value.batch + t->q.kv_head * in->value.head + start * in->value.row;
#if defined(__AVX512BF16__)
  if (t->plan->brain) {
    uint32_t *values = (uint32_t *)t->w->value;
    const float zero[LANES] = {0};
    pair_rows(values, (const uint16_t *)in->value.data + at, in->value.row, keys, in->value_dim, width);
    for (int64_t lane = 0; lane < t->q.lanes; lane += PANEL) {
      int64_t panel = least(PANEL, t->q.lanes - lane), rows = least(panel, round_up(t->q.rows - lane, 2));
      const float *from = p + lane * keys;
      for (int64_t k = 0; k < keys; k += 2)
        for (int64_t r = 0; r < panel; r += LANES)
          pair_floats(t->w->pairs + k / 2 * panel + r, from + k * panel + r, k + 1 < keys ? from + (k + 1) * panel + r : zero);
      product_brain(0, width, rows, (keys + 1) / 2, (const char *)t->w->pairs, 4, 4 * panel, values, width,
                    sums->output + lane * width, width, t->alpha + lane);
    }
    return;
  }
#endif
  const float *value = read_rows(t->w->value, &in->value, at, keys, in->value_dim, width);
  for (int64_t lane = 0; lane < t->q.lanes; lane += PANEL) {
    int64_t panel = least(PANEL, t->q.lanes - lane), rows = least(panel, round_up(t->q.rows - lane, 2));
    product_transposed(width, rows, keys, p + lane * keys, panel, value, width, sums->output + lane * width, width,
                       t->alpha + lane);
  }
}

/* The keys of one strip, whose logits stand in strip->p: exact update of every sum of their group. */
static void absorb(State *t, Sums *sums, Strip *strip) {
  const Forward *a = t->a;
  const Inputs *in = &a->in;
  const Plan *plan = t->plan;
  float *p = strip->p, highest[ROWS];
  int64_t start = strip->start, keys = strip->keys, end = start + keys, first_part = t->part_count;
  memcpy(highest, sums->max, sizeof highest);
  for (int64_t j = start; j < end; t->part_count++) {
    int64_t block = j / in->key_block, stop = plan->blocks ? least(end, (block + 1) * in->key_block) : end;
    float *part_max = t->w->part_max + t->part_count * ROWS;
    t->w->parts[t->part_count] = (Part){t->strip_count, block};
    largest(t, p, keys, j - start, stop - start, part_max);
    for (int64_t r = 0; r < t->q.lanes; r += LANES) store(highest + r, greater(load(part_max + r), load(highest + r)));
    j = stop;
  }
  for (int64_t r = 0; r < t->q.lanes; r++) strip->pivot[r] = highest[r] == -INFINITY ? 0.0f : highest[r];
  rescale(t, sums, strip->pivot);
  memcpy(sums->max, highest, sizeof highest);
  int64_t j = start;
  for (int64_t i = first_part; i < t->part_count; i++) {
    int64_t stop = plan->blocks ? least(end, (t->w->parts[i].block + 1) * in->key_block) : end;
    float *part_sum = t->w->part_sum + i * ROWS;
    if (plan->rows) exponentials(t, sums, 1, p, start, keys, j - start, stop - start, strip->pivot, part_sum);
    else exponentials(t, sums, 0, p, start, keys, j - start, stop - start, strip->pivot, part_sum);
    if (a->block_weighted) {
      const float *weight = a->key_weights + (t->q.batch * in->heads + t->q.head) * in->keys + start;
      for (int64_t r = 0; r < t->q.lanes; r += LANES) {
        Column c = column(p, keys, r, t->q.lanes);
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
  if (t->plan->columns && t->strip_count) strip->p = strip[-1].p + strip[-1].keys * t->q.lanes;
  strip->start = start, strip->keys = keys;
  return strip;
}

/* Keys [start, start + keys): the final logits, then one strip per group that occurs among them. */
static void key_tile(State *t, int64_t start, int64_t keys) {
  const Forward *a = t->a;
  const Inputs *in = &a->in;
  const int32_t *group = a->groups ? a->group_of_key + t->q.batch * in->keys + start : NULL;
  int mixed = 0;
  for (int64_t k = 1; group && k < keys; k++) mixed |= group[k] != group[0];
  Strip *strip = mixed ? NULL : new_strip(t, start, keys);
  float *s = mixed ? t->w->s : strip->p;

  logits(&t->q, s, start, keys, NULL);
  if (!mixed) {
    absorb(t, t->w->sums + (group ? group[0] : 0), strip);
    return;
  }
  for (int32_t g = 0; g < a->groups; g++) {
    int64_t members = 0, last = 0;
    for (int64_t k = 0; k < keys; k++)
      if (group[k] == g) members++, last = k;
    if (!members) continue;
    if (members == 1) { /* as the first key of a sequence: a strip of its own, not the tile once more */
      strip = new_strip(t, start + last, 1);
      for (int64_t r = 0; r < t->q.lanes; r += LANES) {
        Column from = column(s, keys, r, t->q.lanes);
        store(strip->p + r, load(from.first + last * from.step));
      }
      absorb(t, t->w->sums + g, strip);
      continue;
    }
    strip = new_strip(t, start, keys);
    memcpy(strip->p, s, 4 * keys * t->q.lanes);
    for (int64_t k = 0; k < keys; k++)
      if (group[k] != g) hide_key(&t->q, strip->p, keys, k);
    absorb(t, t->w->sums + g, strip);
  }
}
