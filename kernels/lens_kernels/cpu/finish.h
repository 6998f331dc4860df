/* A tile of queries that has met all its keys: its group states, rows, block maps, columns and diagonals. */
#pragma once
#include "tile.h"

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

/* Whether rows [from, to) are whole vectors of their own: lanes beyond the last row count as nothing. */
INLINE int is_whole(const State *t, int64_t from, int64_t to) {
  return from % LANES == 0 && (to % LANES == 0 || to == t->q.rows);
}

/* sum of x * factor over rows [from, to) */
static float summed(const State *t, const float *x, const float *factor, int64_t from, int64_t to) {
  float sum = 0.0f;
  if (is_whole(t, from, to)) {
    vec part = splat(0.0f);
    for (int64_t r = from; r < to; r += LANES) part += load(x + r) * load(factor + r);
    return total(part);
  }
  for (int64_t r = from; r < to; r++) sum += x[r] * factor[r];
  return sum;
}

/* The largest of `most` and x over rows [from, to). */
static float raised(float most, const float *x, int64_t from, int64_t to) {
  if (from % LANES == 0 && to % LANES == 0) {
    float lanes[LANES];
    vec best = splat(most);
    for (int64_t r = from; r < to; r += LANES) best = greater(load(x + r), best);
    store(lanes, best);
    for (int i = 0; i < LANES; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
  }
  for (int64_t r = from; r < to; r++) most = x[r] > most ? x[r] : most;
  return most;
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
      float factor[ROWS], highest[ROWS];
      factors(t, strip->pivot, factor);
      if (mass) mass[to] += summed(t, part_sum, factor, r, stop);
      if (weighted) weighted[to] += summed(t, part_weighted, factor, r, stop);
      if (max) {
        factors(t, part_max, highest);
        max[to] = raised(max[to], highest, r, stop);
      }
      if (logit) logit[to] = raised(logit[to], part_max, r, stop);
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

/* P' of key k of a strip over all rows with their factors, lane by lane. */
INLINE vec over_rows(float *p, int64_t keys, const int64_t lanes, const vec *factor, int64_t k) {
  vec sum = splat(0.0f);
  UNROLL for (int64_t r = 0; r < lanes; r += LANES) {
    const Column c = column(p, keys, r, lanes);
    sum += load(c.first + k * c.step) * factor[r / LANES];
  }
  return sum;
}

/* The same along diagonals: each vector of rows takes the key that is as much further on as its rows are. */
INLINE vec over_diagonals(float *p, int64_t keys, const int64_t lanes, const vec *factor, int64_t k) {
  const int inside = k >= 0 && k + lanes - LANES < keys;
  vec sum = splat(0.0f);
  if (inside) {
    UNROLL for (int64_t r = 0; r < lanes; r += LANES) {
      const Column c = column(p, keys, r, lanes);
      sum += load(c.first + (k + r) * c.step) * factor[r / LANES];
    }
    return sum;
  }
  for (int64_t r = 0; r < lanes; r += LANES) {
    const Column c = column(p, keys, r, lanes);
    if (k + r >= 0 && k + r < keys) sum += load(c.first + (k + r) * c.step) * factor[r / LANES];
  }
  return sum;
}

/* Adds a strip to what its keys receive. */
INLINE void add_received(float *p, int64_t keys, const int64_t lanes, const vec *factor, float *received) {
  int64_t k = 0;
  for (; k + LANES <= keys; k += LANES) {
    vec sums[LANES];
    UNROLL for (int lane = 0; lane < LANES; lane++) sums[lane] = over_rows(p, keys, lanes, factor, k + lane);
    store(received + k, load(received + k) + totals(sums));
  }
  for (; k < keys; k++) received[k] += total(over_rows(p, keys, lanes, factor, k));
}

/* Adds a strip to the diagonals: `to` is the entry of lane 0 and key 0. The next key's entries lie one lower: what is summed
 * moves up by a lane, and a lane that leaves is complete. Two runs of keys go side by side, as each step waits for the one
 * before. Masked lanes may lie outside: they add 0 in the slack round the array. */
INLINE void add_diagonals(float *p, int64_t keys, const int64_t lanes, const vec *factor, float *to) {
  const int64_t first = LANES - lanes, half = (keys - first + 1) / 2;
  vec sum[2] = {{0}}, complete[2] = {{0}};
  for (int64_t i = 0; i < half; i++) {
    UNROLL for (int run = 0; run < 2; run++) {
      const int64_t k = first + run * half + i;
      complete[run] = moved_up(sum[run], complete[run]);
      sum[run] = moved_up(splat(0.0f), sum[run]);
      if (i % LANES == LANES - 1) {
        store(to - k + LANES, load(to - k + LANES) + complete[run]);
        complete[run] = splat(0.0f);
      }
      sum[run] += over_diagonals(p, keys, lanes, factor, k);
    }
  }
  for (int run = 0; run < 2; run++) {
    float *last = to - (first + run * half + half - 1);
    store(last + LANES, load(last + LANES) + complete[run]);
    store(last, load(last) + sum[run]);
  }
}

INLINE void finish_strip(const State *t, const Strip *strip, const int64_t lanes, float *received, float *diagonal) {
  float exact[ROWS];
  vec factor[ROWS / LANES];
  factors(t, strip->pivot, exact);
  for (int64_t r = 0; r < lanes; r += LANES) factor[r / LANES] = load(exact + r);
  if (received) add_received(strip->p, strip->keys, lanes, factor, received + strip->start);
  if (diagonal)
    add_diagonals(strip->p, strip->keys, lanes, factor, diagonal + (t->q.anchor - strip->start - t->a->first_distance));
}

static void finish_columns(State *t, float *received, float *diagonal) {
  for (const Strip *strip = t->w->strips; strip < t->w->strips + t->strip_count; strip++) {
    if (t->q.lanes == ROWS) finish_strip(t, strip, ROWS, received, diagonal);
    else finish_strip(t, strip, t->q.lanes, received, diagonal);
  }
}
