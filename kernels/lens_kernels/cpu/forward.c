/* Forward pass: softmax(Q K') V and the statistics of P, without the N x N matrix.
 *
 * A tile of up to 64 queries meets tiles of up to 128 keys. Logits are kept transposed, S' = K Q' as
 * [key][query], so that one SIMD lane is one query: every row statistic is a vertical vector
 * operation, K is read row by row as it lies in memory, and P' is already the packed operand that
 * P V needs. Rows are exact by the online softmax; what needs the final log-sum-exp (block and
 * column statistics) is kept relative to the pivot of its key tile and multiplied by
 * exp(pivot - lse) when the row is finished, so Q K' is computed once.
 *
 * Memory per thread is O(keys): sums per (query, key block), and, only for column statistics, a strip
 * of P' with 64 queries. Partial columns are kept per unit of work and added in order.
 *
 * Key groups keep one running state (maximum, sums, output) per group, each with its own pivot, so
 * a group that holds 1e-60 of the mass is still exact; the row is their merge.
 */
#include "forward.h"

int64_t lens_forward_size(void) { return sizeof(Forward); }

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

/* to = factor * from, n numbers. */
INLINE void scaled(float *to, const float *from, float factor, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, splat(factor) * load(from + i));
  for (; i < n; i++) to[i] = factor * from[i];
}

/* to = alpha * from, or to += alpha * from, lane by lane. */
INLINE void carry(float *to, const float *from, const float *alpha, int onto, int64_t lanes) {
  for (int64_t r = 0; r < lanes; r += LANES) {
    vec part = load(alpha + r) * load(from + r);
    store(to + r, onto ? load(to + r) + part : part);
  }
}

/* Writes the state of each group and merges them all into the first. */
static void finish_groups(State *t) {
  const Forward *a = t->a;
  const Inputs *in = &a->in;
  const int64_t width = t->plan->value_width, rows = in->batch * in->heads * in->queries, lanes = t->q.lanes;
  const int64_t row0 = (t->q.batch * in->heads + t->q.head) * in->queries + t->q.start;
  for (int64_t g = 0; g < a->groups; g++) {
    const Sums *sums = t->w->sums + g;
    for (int64_t r = 0; r < t->q.rows; r++) {
      const int64_t row = g * rows + row0 + r;
      const float l = sums->sum[r], inverse = l == 0.0f ? 0.0f : 1.0f / l, log_sum = l == 0.0f ? 0.0f : logf(l);
      if (a->group_output) scaled(a->group_output + row * in->value_dim, sums->output + r * width, inverse, in->value_dim);
      a->group_lse[row] = sums->max[r] + log_sum;
      if (a->group_max_logit) a->group_max_logit[row] = sums->max[r];
      if (a->group_entropy) a->group_entropy[row] = log_sum - sums->log_part[r] * inverse;
      if (a->group_concentration) a->group_concentration[row] = sums->squares[r] * inverse * inverse;
      if (a->group_distance) a->group_distance[row] = sums->distance[r] * inverse;
    }
  }
  Sums *whole = t->w->sums;
  float pivot[ROWS], highest[ROWS];
  memcpy(highest, whole->max, sizeof highest);
  for (int64_t g = 1; g < a->groups; g++)
    for (int64_t r = 0; r < lanes; r += LANES)
      store(highest + r, greater(load(t->w->sums[g].max + r), load(highest + r)));
  for (int64_t r = 0; r < lanes; r++) pivot[r] = highest[r] == -INFINITY ? 0.0f : highest[r];
  for (int64_t g = 0; g < a->groups; g++) { /* group 0 is scaled in place, the others are added */
    Sums *sums = t->w->sums + g;
    rescale(t, sums, pivot);
    for (int64_t r = 0; g && r < lanes; r += LANES) {
      store(whole->sum + r, load(whole->sum + r) + load(sums->sum + r));
      store(whole->log_part + r, load(whole->log_part + r) + load(sums->log_part + r));
      store(whole->squares + r, load(whole->squares + r) + load(sums->squares + r));
      store(whole->distance + r, load(whole->distance + r) + load(sums->distance + r));
    }
    for (int64_t r = 0; r < t->q.rows; r++)
      for (int64_t d = r * width; d < (r + 1) * width; d += LANES) {
        vec part = splat(t->alpha[r]) * load(sums->output + d);
        store(whole->output + d, g ? load(whole->output + d) + part : part);
      }
    for (int64_t f = 0; f < a->features; f++) carry(whole->features + f * ROWS, sums->features + f * ROWS, t->alpha, g > 0, lanes);
    for (int64_t f = 0; f < a->pairs; f++) carry(whole->matched + f * ROWS, sums->matched + f * ROWS, t->alpha, g > 0, lanes);
  }
  memcpy(whole->max, highest, sizeof highest);
}

/* Divides by the row's denominator (with the learned sink) and writes the row statistics. */
static void finish_rows(State *t) {
  const Forward *a = t->a;
  const Inputs *in = &a->in;
  const Sums *sums = t->w->sums;
  const int64_t row0 = (t->q.batch * in->heads + t->q.head) * in->queries + t->q.start, width = t->plan->value_width;
  const int64_t all_rows = in->batch * in->heads * in->queries;
  for (int64_t r = 0; r < t->q.rows; r++) {
    const int64_t row = row0 + r;
    const float m = sums->max[r], l = sums->sum[r];
    float inverse = 0.0f, shift = 0.0f, lse = -INFINITY; /* exp(m - lse), m - lse: as for an empty row */
    if (l != 0.0f && in->sinks) {
      float sink = in->sinks[t->q.head], top = sink > m ? sink : m;
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
    scaled(output_of(a, row), sums->output + r * width, inverse, in->value_dim);
  }
  for (int64_t r = t->q.rows; r < t->q.lanes; r++) t->lse[r] = INFINITY;
}

/* exp(logit - lse) of each row; 0 in rows that see nothing. */
INLINE void factors(const State *t, const float *logit, float *out) {
  for (int64_t r = 0; r < t->q.lanes; r += LANES) store(out + r, exponential(load(logit + r) - load(t->lse + r)));
}

/* Block maps of the query blocks that this tile covers; a block taller than a tile is added up over its tiles. */
static void finish_blocks(State *t, int64_t *seen_rows) {
  const Forward *a = t->a;
  const Inputs *in = &a->in;
  const Plan *plan = t->plan;
  for (int64_t r = 0; r < t->q.rows;) {
    int64_t block = (t->q.start + r) / in->query_block, block_end = least((block + 1) * in->query_block, in->queries);
    int64_t stop = least(t->q.rows, block_end - t->q.start);
    int64_t line = (t->q.batch * in->heads + t->q.head) * plan->query_blocks + block, at = line * plan->key_blocks;
    float *mass = a->block_mass ? a->block_mass + at : a->top_k ? t->w->block_row : NULL;
    float *max = a->block_max ? a->block_max + at : NULL;
    float *logit = a->block_max_logit ? a->block_max_logit + at : NULL;
    float *weighted = a->block_weighted ? a->block_weighted + at : NULL;
    if (t->q.start + r == block * in->query_block) {
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
    if (t->q.start + stop == block_end) {
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
        for (int64_t r = 0; r < t->q.lanes; r += LANES) {
          Column c = column(strip->p, strip->keys, r, t->q.lanes);
          sum += load(c.first + k * c.step) * load(factor + r);
        }
        received[strip->start + k] += total(sum);
      }
    if (diagonal)
      for (int64_t r = 0; r < t->q.lanes; r += LANES) {
        Column c = column(strip->p, strip->keys, r, t->q.lanes);
        vec scale = load(factor + r);
        /* Entry of lane 0 and key 0. Masked lanes may lie outside: they add 0 in the slack round the array. */
        float *to = diagonal + (t->q.anchor + r - strip->start - t->a->first_distance);
        for (int64_t phase = 0; phase < LANES; phase++) /* neighbours in the inner loop never overlap */
          for (int64_t k = phase; k < strip->keys; k += LANES)
            store(to - k, load(to - k) + load(c.first + k * c.step) * scale);
      }
  }
}

static void query_tile(const Plan *plan, Scratch *w, int64_t head, int64_t tile, float *received, float *diagonal,
                       int64_t *seen_rows) {
  const Forward *a = plan->args;
  const Inputs *in = &a->in;
  State t = {.plan = plan, .a = a, .w = w};
  t.q = (Rows){.in = in, .query = w->query, .query_rows = w->query_rows, .key = w->key, .brain = plan->brain};
  load_rows(&t.q, head, plan->cut.tiles[tile]);
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
  for (int64_t start = 0, stop; start < in->keys; start = stop) {
    stop = least(start + plan->key_tile, plan->split ? (start / in->key_block + 1) * in->key_block : in->keys);
    stop = least(stop, in->keys);
    int64_t from = most(start, t.q.any_low), to = least(stop, t.q.any_high);
    if (from < to && !is_skipped(&t.q, start)) key_tile(&t, from, to - from);
  }
  if (a->groups) finish_groups(&t);
  finish_rows(&t);
  if (plan->blocks) finish_blocks(&t, seen_rows);
  if (plan->columns) finish_columns(&t, received, diagonal);
}
/* --- units --- */

static Scratch lay_out(const Plan *plan, Layout *layout) {
  const Forward *a = plan->args;
  const Inputs *in = &a->in;
  int64_t per_block = (in->key_block + plan->key_tile - 1) / plan->key_tile;
  int64_t tiles = plan->split ? plan->key_blocks * per_block : in->keys / plan->key_tile + 1;
  int64_t strips = plan->blocks || plan->columns ? tiles * plan->groups + 1 : 1;
  int64_t parts = plan->blocks && !plan->split ? plan->key_blocks * plan->groups + 1 : strips;
  Scratch w = {0};
  w.block_row = take(layout, a->top_k ? 4 * plan->key_blocks : 0); /* first: it outlives the tile */
  w.query = take(layout, 4 * ROWS * in->head_dim);
  w.query_rows = take(layout, 4 * FEW * in->head_dim);
  w.p = take(layout, 4 * ROWS * (plan->columns ? in->keys * plan->groups : plan->key_tile));
  w.s = take(layout, a->groups ? 4 * ROWS * plan->key_tile : 0);
  w.key = take(layout, 4 * plan->key_tile * in->head_dim);
  w.value = take(layout, 4 * (plan->key_tile + 1) * plan->value_width);
  w.pairs = take(layout, plan->brain ? 2 * ROWS * (plan->key_tile + 1) : 0);
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

static void run_unit(void *argument, char *scratch, int64_t unit) {
  const Plan *plan = argument;
  const Inputs *in = &plan->args->in;
  const int64_t head = unit / plan->cut.chunks, chunk = unit % plan->cut.chunks;
  Layout layout = {scratch, 0};
  Scratch w = lay_out(plan, &layout);
  float *received = plan->received ? plan->received + unit * in->keys : NULL;
  float *diagonal = plan->diagonal ? plan->diagonal + unit * plan->diagonal_width + SLACK : NULL;
  int64_t seen_rows = 0;
  for (int64_t tile = plan->cut.chunk_start[chunk]; tile < plan->cut.chunk_start[chunk + 1]; tile++) {
    if (in->poison) memset(w.query, 0xff, (size_t)(scratch + layout.size - (char *)w.query));
    query_tile(plan, &w, head, tile, received, diagonal, &seen_rows);
  }
}

/* Fills every output that is wanted; OK, or NO_MEMORY. */
int lens_forward(const Forward *a) {
  if (a->few) return lens_decode(a);
  const Inputs *in = &a->in;
  const int64_t heads = in->batch * in->heads, widest = most(in->head_dim, in->value_dim) > 128 ? COLS / 2 : COLS;
  Plan plan = {.args = a};
  plan.value_width = round_up(in->value_dim, LANES);
  plan.query_blocks = (in->queries + in->query_block - 1) / in->query_block;
  plan.key_blocks = (in->keys + in->key_block - 1) / in->key_block;
  plan.groups = most(1, a->groups);
  plan.columns = a->received || a->diagonal;
  plan.blocks = a->block_mass || a->block_max || a->block_max_logit || a->block_weighted || a->top_k;
  plan.brain = HAS_BRAIN && in->query.type == BF16 && in->head_dim % 2 == 0;
  plan.rows = a->entropy || a->concentration || a->distance;
  plan.split = in->blocks.data || (plan.blocks && in->key_block > widest);
  plan.key_tile = widest;
  if (plan.split) plan.key_tile = least(widest, in->key_block);
  else if (plan.blocks) plan.key_tile = widest / in->key_block * in->key_block;
  plan.diagonal_width = a->distances + 2 * SLACK;
  int status = cut_queries(in, plan.columns ? most(1, 256 / heads) : in->queries, &plan.cut);
  const int64_t units = heads * plan.cut.chunks;
  if (status == OK && a->received) {
    plan.received = calloc((size_t)(units * in->keys), 4);
    if (!plan.received) status = NO_MEMORY;
  }
  if (status == OK && a->diagonal) {
    plan.diagonal = calloc((size_t)(units * plan.diagonal_width), 4);
    if (!plan.diagonal) status = NO_MEMORY;
  }
  if (status == OK) {
    Layout size = {NULL, 0};
    lay_out(&plan, &size);
    Work all = {.in = in, .plan = &plan, .units = units, .scratch = size.size, .run = run_unit};
    status = work_in_parallel(&all);
  }
  if (status == OK && a->received) reduce(plan.received, heads, plan.cut.chunks, 1, in->keys, in->keys, a->received);
  if (status == OK && a->diagonal)
    reduce(plan.diagonal + SLACK, heads, plan.cut.chunks, 1, plan.diagonal_width, a->distances, a->diagonal);
  free(plan.received);
  free(plan.diagonal);
  free_cut(&plan.cut);
  return status;
}
