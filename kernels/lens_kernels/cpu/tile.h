/* A tile of queries of the forward pass, and what a tile of keys adds to it. */
#pragma once
#include "split.h"

/* Largest logit per lane over keys [from, to) of the tile. */
static void largest(State *t, float *p, int64_t keys, int64_t from, int64_t to, float *out) {
  for (int64_t r = 0; r < t->q.lanes; r += LANES) {
    Column c = column(p, keys, r, t->q.lanes);
    vec best[4];
    UNROLL for (int i = 0; i < 4; i++) best[i] = splat(-INFINITY);
    int64_t k = from;
    for (; k + 4 <= to; k += 4)
      UNROLL for (int i = 0; i < 4; i++) best[i] = greater(load(c.first + (k + i) * c.step), best[i]);
    for (; k < to; k++) best[0] = greater(load(c.first + k * c.step), best[0]);
    store(out + r, greater(greater(best[0], best[1]), greater(best[2], best[3])) * splat(t->q.left));
  }
}

/* p = exp(s - pivot) over keys [from, to), with the row sums of p, p * (s - pivot), p^2 and p * distance. */
INLINE void exponentials(State *t, Sums *sums, const int rows_wanted, float *p, int64_t start, int64_t keys,
                         int64_t from, int64_t to, const float *pivot, float *part_sum) {
  for (int64_t r = 0; r < t->q.lanes; r += LANES) {
    Column c = column(p, keys, r, t->q.lanes);
    vec at = load(pivot + r), sum = splat(0.0f), log_part = sum, squares = sum, moment = sum, place = splat((float)from);
    for (int64_t k = from; k < to; k++) {
      vec x = load(c.first + k * c.step) * splat(t->q.left) - at;
      vec e = exponential_of(&x);
      store(c.first + k * c.step, e);
      sum += e;
      if (rows_wanted) {
        log_part += e * x;
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

static int is_zero(const float *x, int64_t n) {
  int64_t i = 0;
  ivec bits = splat_int(0);
  for (; i + LANES <= n; i += LANES) bits |= load(x + i) != splat(0.0f);
  int found = any_set(bits);
  for (; i < n; i++) found |= x[i] != 0.0f;
  return !found;
}

static void accumulate_features(State *t, Sums *sums, float *p, int64_t start, int64_t keys) {
  const Forward *a = t->a;
  const Inputs *in = &a->in;
  const int64_t stride = in->batch * in->kv_heads * in->keys;
  const float *first = a->features_of_keys + (t->q.batch * in->kv_heads + t->q.kv_head) * in->keys + start;
  int any = 0; /* of a mark of few keys (a prefix) most tiles have none */
  for (int64_t f = 0; f < a->features; f++) {
    any = any || !is_zero(first + f * stride, keys);
    float *to = sums->features + f * ROWS;
    for (int64_t r = 0; r < t->q.lanes; r += LANES) store(to + r, load(to + r) * load(t->alpha + r));
  }
  for (int64_t lane = 0; any && lane < t->q.lanes; lane += PANEL) {
    const int64_t width = least(PANEL, t->q.lanes - lane);
    product_onto(width, a->features, keys, first, stride, p + lane * keys, width, sums->features + lane, ROWS, NULL);
  }
}

/* What the labels of a tile's rows are: a key that is not among them matches no row. */
static void mark_labels(State *t) {
  const Inputs *in = &t->a->in;
  for (int64_t f = 0; f < t->a->pairs; f++) {
    const int32_t *label = t->a->query_labels + (f * in->batch + t->q.batch) * in->queries + t->q.start;
    Marks *marks = t->w->marks + f;
    *marks = (Marks){.low = INT32_MAX, .high = -1};
    for (int64_t r = 0; r < t->q.rows; r++) {
      if (label[r] < 0) continue;
      marks->low = label[r] < marks->low ? label[r] : marks->low;
      marks->high = label[r] > marks->high ? label[r] : marks->high;
      marks->bits[mark_of(label[r]) / 64] |= 1ull << mark_of(label[r]) % 64;
    }
  }
}

/* The keys whose labels may be one of those, and how many they are. */
static int64_t marked_keys(const Marks *marks, const int32_t *label, int64_t keys, int32_t *found) {
  int64_t k = 0, count = 0;
  ivec near = splat_int(0); /* of positions, most tiles have none between the least and the largest */
  for (; k + LANES <= keys; k += LANES) near |= (load_int(label + k) >= splat_int(marks->low)) & (load_int(label + k) <= splat_int(marks->high));
  int any = any_set(near);
  for (; k < keys; k++) any |= label[k] >= marks->low && label[k] <= marks->high;
  for (k = 0; any && k < keys; k++) {
    found[count] = (int32_t)k;
    count += marks->bits[mark_of(label[k]) / 64] >> mark_of(label[k]) % 64 & 1;
  }
  return count;
}

static void accumulate_matches(State *t, Sums *sums, float *p, int64_t start, int64_t keys) {
  const Forward *a = t->a;
  const Inputs *in = &a->in;
  for (int64_t f = 0; f < a->pairs; f++) {
    const int32_t *key = a->key_labels + (f * in->batch + t->q.batch) * in->keys + start;
    const int32_t *query = a->query_labels + (f * in->batch + t->q.batch) * in->queries + t->q.start;
    int32_t marked[COLS];
    const int64_t count = marked_keys(t->w->marks + f, key, keys, marked);
    for (int64_t r = 0; r < t->q.lanes; r += LANES) {
      Column c = column(p, keys, r, t->q.lanes);
      vec matched = splat(0.0f);
      if (count) {
        int32_t label[LANES];
        for (int64_t i = 0; i < LANES; i++) label[i] = query[least(r + i, t->q.rows - 1)];
        ivec wanted = load_int(label);
        for (int64_t i = 0; i < count; i++)
          matched += (vec)((wanted == splat_int(key[marked[i]])) & (ivec)load(c.first + marked[i] * c.step));
        matched = (vec)((wanted >= splat_int(0)) & (ivec)matched); /* a negative label matches nothing */
      }
      float *to = sums->matched + f * ROWS + r;
      store(to, load(to) * load(t->alpha + r) + matched);
    }
  }
}

static void accumulate_output(State *t, Sums *sums, float *p, int64_t start, int64_t keys) {
  const Inputs *in = &t->a->in;
  const int64_t width = t->plan->value_width;
#if HAS_AMX
  if (t->q.split) {
    accumulate_split(t, sums, p, start, keys);
    return;
  }
#endif
  int64_t at = t->q.batch * in->value.batch + t->q.kv_head * in->value.head + start * in->value.row;
#if defined(__AVX512BF16__)
  if (t->plan->brain) {
    uint32_t *values = (uint32_t *)t->w->value;
    pair_rows(values, (const uint16_t *)in->value.data + at, in->value.row, keys, in->value_dim, width);
    for (int64_t lane = 0; lane < t->q.lanes; lane += PANEL) {
      int64_t panel = least(PANEL, t->q.lanes - lane), rows = least(panel, round_up(t->q.rows - lane, 2));
      const float *from = p + lane * keys;
      for (int64_t k = 0; k < keys; k += 2)
        for (int64_t r = 0; r < panel; r += LANES)
          _mm512_storeu_si512(t->w->pairs + k / 2 * panel + r,
                              pair_floats(load(from + k * panel + r), k + 1 < keys ? load(from + (k + 1) * panel + r) : splat(0.0f)));
      product_brain(0, width, rows, (keys + 1) / 2, (const char *)t->w->pairs, 4, 4 * panel, values, width,
                    sums->output + lane * width, width, t->alpha + lane);
    }
    return;
  }
#endif
  const float *value = read_rows(t->w->value, &in->value, at, keys, in->value_dim, width);
  for (int64_t lane = 0; lane < t->q.lanes; lane += PANEL) {
    int64_t panel = least(PANEL, t->q.lanes - lane), rows = least(panel, round_up(t->q.rows - lane, 2));
    const int64_t step = t->q.all_high >= start + keys ? panel : LANES; /* rows that reach as many keys */
    for (int64_t r = 0; r < rows; r += step)
      product_transposed(width, least(step, rows - r), reached(&t->q, lane + r, start, keys), p + lane * keys + r, panel, value,
                         width, sums->output + (lane + r) * width, width, t->alpha + lane + r);
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

/* Whether keys of several groups are among these. */
static int is_mixed(const int32_t *group, int64_t keys) {
  ivec other = splat_int(0);
  int64_t k = 0;
  for (; k + LANES <= keys; k += LANES) other |= load_int(group + k) != splat_int(group[0]);
  int found = any_set(other);
  for (; k < keys; k++) found |= group[k] != group[0];
  return found;
}

/* Keys [start, start + keys): the final logits, then one strip per group that occurs among them. */
static void key_tile(State *t, int64_t start, int64_t keys) {
  const Forward *a = t->a;
  const Inputs *in = &a->in;
  const int32_t *group = a->groups ? a->group_of_key + t->q.batch * in->keys + start : NULL;
  const int mixed = group && is_mixed(group, keys);
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
