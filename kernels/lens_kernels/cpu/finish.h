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
