/* Keys and values as the tiles of AMX take them, and what they add to the output. */
#pragma once
#include "state.h"

#if HAS_AMX

/* Keys [start, start + keys) and their values. */
static Split split_keys(const State *t, int64_t start, int64_t keys) {
  const Inputs *in = &t->a->in;
  const int64_t rows = round_up(t->plan->key_tile, 2 * SIDE), depths = in->head_dim / 2, width = t->plan->value_width;
  const uint16_t *key = (const uint16_t *)in->key.data + t->q.batch * in->key.batch + t->q.kv_head * in->key.head + start * in->key.row;
  const uint16_t *value =
      (const uint16_t *)in->value.data + t->q.batch * in->value.batch + t->q.kv_head * in->value.head + start * in->value.row;
  const Split split = {start, pairs_at(t->w->key_blocks, depths), pairs_at(t->w->key_blocks + rows * depths, rows / 2)};
  for (int64_t i = 0; i < keys; i++)
    for (int64_t d = 0; d < in->head_dim; d += 2 * SIDE) memcpy(place_of(split.keys, i, d / 2), key + i * in->key.row + d, 4 * SIDE);
  uint32_t *lines = (uint32_t *)t->w->value; /* values as pairs [rows / 2][width] */
  const int64_t from = (keys + 1) / 2;
  pair_rows(lines, value, in->value.row, keys, in->value_dim, width);
  memset(lines + from * width, 0, (size_t)(4 * (rows / 2 - from) * width));
  for (int64_t k = 0; k < rows / 2; k += SIDE)
    for (int64_t d = 0; d < width; d += SIDE) turn_block(place_of(split.values, d, k), lines + k * width + d, width);
  return split;
}

/* Each lane of rows by its factor, where one is not 1: most tiles move no maximum. */
INLINE void scale_lanes(float *rows, int64_t count, int64_t lanes, const float *factor) {
  for (int64_t r = 0; r < lanes; r += LANES) {
    const vec by = load(factor + r);
    if (!any_set(by != splat(1.0f))) continue;
    for (int64_t i = r; i < count * lanes; i += lanes) store(rows + i, load(rows + i) * by);
  }
}

/* V' P' onto the output, [value_width][lanes]. */
static void accumulate_split(State *t, Sums *sums, const float *p, int64_t start, int64_t keys) {
  const Inputs *in = &t->a->in;
  const Split *split = t->q.split;
  const int64_t width = t->plan->value_width, lanes = t->q.lanes, pairs = round_up(keys, 2 * SIDE) / 2;
  scale_lanes(sums->output, width, lanes, t->alpha);
  if ((start - split->start) % (2 * SIDE) == 0) {
    const Pairs weights = pairs_at(t->w->pairs, lanes);
    pair_lines(weights, pairs, p, keys, lanes);
    product_amx(0, lanes, width, pairs, values_from(split, start), weights, sums->output, lanes);
    return;
  }
  const int64_t at = t->q.batch * in->value.batch + t->q.kv_head * in->value.head + start * in->value.row;
  const float *value = read_rows(t->w->value, &in->value, at, keys, in->value_dim, width);
  product_transposed_onto(lanes, width, keys, value, width, p, lanes, sums->output, lanes, NULL);
}

/* The outputs as [ROWS][value_width]. */
static void turn_outputs(State *t) {
  const int64_t width = t->plan->value_width;
  for (int64_t g = 0; g < t->plan->groups; g++) {
    turn(t->w->turned, t->w->sums[g].output, width, t->q.lanes);
    memcpy(t->w->sums[g].output, t->w->turned, (size_t)(4 * t->q.lanes * width));
  }
}

#endif
