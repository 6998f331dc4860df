/* Forward pass for few queries on many keys, as in decoding: the keys are the lanes.
 *
 * A unit is a piece of the keys of one key-value head, for all rows that read it (its heads' queries),
 * so each key and value is read once. Probabilities stay where they are, relative to the largest logit of
 * their piece, [rows][keys], pieces padded to whole vectors: with few rows that is no more than the received mass. When all pieces are
 * done, the sums of a head's pieces are merged in order, and what needs the log-sum-exp (block maps,
 * received mass, diagonals) is read off the row.
 */
#include "few.h"

enum {
  PIECE = 1024, /* keys of a unit, about: whole key blocks */
  TILE = 64,    /* values that are converted at once */
};
enum { SUM, LOG_PART, SQUARES, DISTANCE, VALUE_NORM, FIXED }; /* sums of a row in a piece; then features, pairs, output */

typedef struct {
  const Forward *a;
  int64_t rows, piece, pieces, padded, width, sums, value_width, key_blocks, query_blocks;
  int blocks;
  float *p;       /* [batch, heads, queries][pieces][padded]: exp(s - max of the piece); a row has `width` */
  float *max;     /* [batch, heads, queries][pieces] */
  float *partial; /* [batch, heads, queries][pieces][sums] */
  float *logit;   /* [batch, heads, queries][key_blocks]: largest logit of each block, where maps are wanted */
} Decode;

static int64_t keys_of(const Decode *plan, int64_t piece) {
  return least(plan->piece, plan->a->in.keys - piece * plan->piece);
}

/* Everything of one piece. */
typedef struct {
  const Decode *plan;
  int64_t batch, kv_head, row0, start, keys, number; /* row0: of [batch, heads, queries] */
  float *query, *key, *value, *norm;                 /* scratch: scaled queries, a key, some values, norms of values */
} Unit;

static float largest_of(const float *x, int64_t n) {
  float best = -INFINITY;
  int64_t i = 0;
  if (n >= LANES) {
    float lanes[LANES];
    vec top = load(x);
    for (i = LANES; i + LANES <= n; i += LANES) top = greater(load(x + i), top);
    store(lanes, top);
    for (int l = 0; l < LANES; l++) best = lanes[l] > best ? lanes[l] : best;
  }
  for (; i < n; i++) best = x[i] > best ? x[i] : best;
  return best;
}

/* Whether none of them is NaN or infinite: 0 times it is 0. */
static int all_finite(const float *x, int64_t n) {
  vec sum = splat(0.0f);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sum += load(x + i) * splat(0.0f);
  float all = total(sum);
  for (; i < n; i++) all += x[i] * 0.0f;
  return all == 0.0f;
}

/* --- a piece --- */

static void dot_products(const Unit *u, float *s) {
  const Inputs *in = &u->plan->a->in;
  const int64_t dim = in->head_dim, at = u->batch * in->key.batch + u->kv_head * in->key.head + u->start * in->key.row;
  const int64_t row = in->key.row, brain = in->key.type == BF16, rows = u->plan->rows, width = u->plan->width;
  int64_t k = 0;
  for (; dim % LANES == 0 && in->key.type != F16 && k + LANES <= u->keys; k += LANES) {
    const char *key = (const char *)in->key.data + (brain ? 2 : 4) * (at + k * row);
    for (int64_t r = 0; r < rows; r++)
      store(s + r * width + k, brain ? dots(1, !r, u->query + r * dim, key, 2 * row, dim)
                                     : dots(0, !r, u->query + r * dim, key, 4 * row, dim));
  }
  for (; k < u->keys; k++) {
    read_row(u->key, &in->key, at + k * row, dim);
    for (int64_t r = 0; r < rows; r++) s[r * width + k] = dot(u->key, u->query + r * dim, dim);
  }
}

/* Softcap, bias, slope and every mask on a row's logits of the piece. */
static void alter(const Unit *u, int64_t r, float *s) {
  const Inputs *in = &u->plan->a->in;
  const int64_t i = r % in->queries, head = u->kv_head * (in->heads / in->kv_heads) + r / in->queries;
  const int64_t line = u->batch * in->queries + i, end = u->start + u->keys;
  if (in->softcap > 0)
    for (int64_t k = 0; k < u->keys; k += LANES) {
      vec part = hyperbolic_tangent(load(s + k) * splat((float)(1.0 / in->softcap)));
      store(s + k, splat((float)in->softcap) * part);
    }
  if (in->bias.data) {
    const Plane *bias = &in->bias;
    const float *from = (const float *)bias->data + u->batch * bias->batch + head * bias->head + i * bias->query;
    for (int64_t k = 0; k < u->keys; k++) s[k] += from[(u->start + k) * bias->key];
  }
  if (in->slopes)
    for (int64_t k = 0; k < u->keys; k++)
      s[k] -= in->slopes[head] * (float)llabs(in->anchor[u->batch] + i - (u->start + k));
  const int64_t low = least(most(in->low[line], u->start), end), high = most(least(in->high[line], end), low);
  for (int64_t k = 0; k < low - u->start; k++) s[k] = -INFINITY;
  for (int64_t k = high - u->start; k < round_up(u->keys, LANES); k++) s[k] = -INFINITY;
  if (in->keep) {
    const uint8_t *keep = in->keep + u->batch * in->keys + u->start;
    for (int64_t k = 0; k < u->keys; k++)
      if (!keep[k]) s[k] = -INFINITY;
  }
  if (in->allowed.data) {
    const Plane *mask = &in->allowed;
    const uint8_t *from = (const uint8_t *)mask->data + u->batch * mask->batch + head * mask->head + i * mask->query;
    for (int64_t k = 0; k < u->keys; k++)
      if (!from[(u->start + k) * mask->key]) s[k] = -INFINITY;
  }
}

/* p = exp(s - pivot) in place, with the sums that need nothing else. */
static void exponentials_of(const Unit *u, int64_t r, float pivot, float *p, float *sums) {
  const Inputs *in = &u->plan->a->in;
  const vec at = splat(pivot);
  vec sum = splat(0.0f), log_part = sum, squares = sum, moment = sum, number;
  for (int i = 0; i < LANES; i++) number[i] = (float)i;
  for (int64_t k = 0; k < u->keys; k += LANES) {
    vec x = load(p + k) - at;
    vec e = exponential_of(&x);
    store(p + k, e);
    sum += e;
    log_part += e * x;
    squares += e * e;
    moment += e * (number + splat((float)k));
  }
  sums[SUM] = total(sum), sums[LOG_PART] = total(log_part), sums[SQUARES] = total(squares);
  sums[DISTANCE] = sums[SUM] * (float)(in->anchor[u->batch] + r % in->queries - u->start) - total(moment);
}

static float matched(const float *p, const int32_t *label, int32_t wanted, int64_t n) {
  vec sum = splat(0.0f);
  int64_t k = 0;
  if (wanted < 0) return 0.0f; /* a negative label matches nothing */
  for (; k + LANES <= n; k += LANES) sum += (vec)((load_int(label + k) == splat_int(wanted)) & (ivec)load(p + k));
  float all = total(sum);
  for (; k < n; k++) all += label[k] == wanted ? p[k] : 0.0f;
  return all;
}

/* sum_k p[r][k] v[k] of all rows into their sums, and the norms of the values where they are wanted. */
static void weigh_values(const Unit *u, const float *p, float *output) {
  const Decode *plan = u->plan;
  const Inputs *in = &plan->a->in;
  const Operand *from = &in->value;
  const int64_t at = u->batch * from->batch + u->kv_head * from->head + u->start * from->row, dim = plan->value_width;
  const int64_t stride = plan->pieces * plan->sums, width = plan->width, rows = plan->rows;
  const int whole = dim == in->value_dim, norm = plan->a->mean_value_norm != NULL, brain = from->type == BF16;
  for (int64_t k = 0, step; k < u->keys; k += step) {
    step = least(TILE, u->keys - k);
    const char *value = (const char *)from->data + (at + k * from->row) * (brain ? 2 : 4);
    if (whole && brain && !norm) {
      weigh_all(1, dim, rows, p + k, width, value, 2 * from->row, step, output, stride);
      continue;
    }
    int64_t row = from->row;
    if (!whole || from->type != F32) {
      value = (const char *)u->value, row = dim;
      for (int64_t i = 0; i < step; i++) {
        read_row(u->value + i * row, from, at + (k + i) * from->row, in->value_dim);
        for (int64_t d = in->value_dim; d < row; d++) u->value[i * row + d] = 0.0f;
      }
    }
    weigh_all(0, dim, rows, p + k, width, value, 4 * row, step, output, stride);
    if (norm) norms((const float *)value, row, in->value_dim, step, u->norm + k);
  }
}

static void piece(void *argument, char *scratch, int64_t unit) {
  const Decode *plan = argument;
  const Forward *a = plan->a;
  const Inputs *in = &a->in;
  Unit u = {.plan = plan, .number = unit % plan->pieces, .query = (float *)scratch};
  const int64_t line = unit / plan->pieces, features = in->batch * in->kv_heads * in->keys;
  u.batch = line / in->kv_heads, u.kv_head = line % in->kv_heads, u.row0 = line * plan->rows;
  u.start = u.number * plan->piece, u.keys = keys_of(plan, u.number);
  u.key = u.query + plan->rows * in->head_dim;
  u.value = u.key + in->head_dim;
  u.norm = u.value + TILE * plan->value_width;
  for (int64_t r = 0; r < plan->rows; r++) {
    float *query = u.query + r * in->head_dim;
    const int64_t head = u.kv_head * (in->heads / in->kv_heads) + r / in->queries;
    read_row(query, &in->query, u.batch * in->query.batch + head * in->query.head + r % in->queries * in->query.row, in->head_dim);
    for (int64_t d = 0; d < in->head_dim; d++) query[d] *= (float)in->scale;
  }
  float *p = plan->p + u.row0 * plan->width + u.number * plan->padded;
  float *partial = plan->partial + (u.row0 * plan->pieces + u.number) * plan->sums;
  dot_products(&u, p);
  for (int64_t r = 0; r < plan->rows; r++) {
    float *s = p + r * plan->width, *sums = partial + r * plan->pieces * plan->sums;
    if (!all_finite(s, u.keys)) __atomic_store_n(a->infinite, 1, __ATOMIC_RELAXED);
    alter(&u, r, s);
    float highest = -INFINITY;
    for (int64_t j = 0, stop; j < u.keys; j = stop) {
      stop = least(u.keys, plan->blocks ? j + in->key_block : u.keys);
      float top = largest_of(s + j, stop - j);
      if (plan->blocks) plan->logit[(u.row0 + r) * plan->key_blocks + (u.start + j) / in->key_block] = top;
      highest = top > highest ? top : highest;
    }
    plan->max[(u.row0 + r) * plan->pieces + u.number] = highest;
    memset(sums, 0, 4 * plan->sums);
    exponentials_of(&u, r, highest == -INFINITY ? 0.0f : highest, s, sums);
    for (int64_t f = 0; f < a->features; f++)
      sums[FIXED + f] = dot(s, a->features_of_keys + f * features + line * in->keys + u.start, u.keys);
    for (int64_t f = 0; f < a->pairs; f++)
      sums[FIXED + a->features + f] = matched(s, a->key_labels + (f * in->batch + u.batch) * in->keys + u.start,
                                              a->query_labels[(f * in->batch + u.batch) * in->queries + r % in->queries], u.keys);
  }
  weigh_values(&u, p, partial + FIXED + a->features + a->pairs);
  for (int64_t r = 0; a->mean_value_norm && r < plan->rows; r++)
    partial[r * plan->pieces * plan->sums + VALUE_NORM] = dot(p + r * plan->width, u.norm, u.keys);
}

/* --- a head: its pieces merged --- */

/* Merges the pieces of a row, writes its statistics, and turns its p into probabilities; whether it sees a key. */
static int finish_row(const Decode *plan, int64_t row) {
  const Forward *a = plan->a;
  const Inputs *in = &a->in;
  const float *max = plan->max + row * plan->pieces;
  float *whole = plan->partial + row * plan->pieces * plan->sums; /* of piece 0, then of all */
  const float top = largest_of(max, plan->pieces), m = top == -INFINITY ? 0.0f : top;
  for (int64_t i = 0; i < plan->pieces; i++) {
    const float *part = whole + i * plan->sums;
    const float share = max[i] == -INFINITY ? 0.0f : expf(max[i] - m), l = part[SUM];
    const float log_part = l == 0.0f ? 0.0f : share * (part[LOG_PART] + (max[i] - m) * l), squares = share * share * part[SQUARES];
    whole[LOG_PART] = (i ? whole[LOG_PART] : 0.0f) + log_part;
    whole[SQUARES] = (i ? whole[SQUARES] : 0.0f) + squares;
    for (int64_t f = 0; f < plan->sums; f++)
      if (f != LOG_PART && f != SQUARES) whole[f] = (i ? whole[f] : 0.0f) + share * part[f];
  }
  const float l = whole[SUM];
  float inverse = 0.0f, shift = 0.0f, lse = -INFINITY; /* exp(m - lse), m - lse: as for an empty row */
  if (l != 0.0f && in->sinks) {
    float sink = in->sinks[row / in->queries % in->heads], highest = sink > m ? sink : m;
    float rest = expf(m - highest), all = l * rest + expf(sink - highest);
    inverse = rest / all, shift = (m - highest) - logf(all), lse = highest + logf(all);
  } else if (l != 0.0f) {
    inverse = 1.0f / l, shift = -logf(l), lse = m + logf(l);
  }
  const int64_t all_rows = in->batch * in->heads * in->queries;
  a->lse[row] = lse;
  if (a->max_logit) a->max_logit[row] = top;
  if (a->entropy) a->entropy[row] = -inverse * (whole[LOG_PART] + l * shift);
  if (a->concentration) a->concentration[row] = whole[SQUARES] * inverse * inverse;
  if (a->distance) a->distance[row] = whole[DISTANCE] * inverse;
  if (a->mean_value_norm) a->mean_value_norm[row] = whole[VALUE_NORM] * inverse;
  const float *rest = whole + FIXED;
  for (int64_t f = 0; f < a->features; f++) a->feature_means[f * all_rows + row] = *rest++ * inverse;
  for (int64_t f = 0; f < a->pairs; f++) a->match_mass[row * a->pairs + f] = *rest++ * inverse;
  float *output = output_of(a, row);
  for (int64_t d = 0; d < in->value_dim; d++) output[d] = rest[d] * inverse;
  if (!plan->blocks && !a->received && !a->diagonal) return l != 0.0f;
  for (int64_t i = 0; i < plan->pieces; i++) {
    const float factor = l == 0.0f || max[i] == -INFINITY ? 0.0f : expf(max[i] - lse);
    float *p = plan->p + row * plan->width + i * plan->padded;
    for (int64_t k = 0; k < round_up(keys_of(plan, i), LANES); k += LANES)
      store(p + k, load(p + k) * splat(factor));
  }
  return l != 0.0f;
}

static float sum_of(const float *x, int64_t n) {
  vec sum = splat(0.0f);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sum += load(x + i);
  float all = total(sum);
  for (; i < n; i++) all += x[i];
  return all;
}

/* The maps of one query block: rows [first, first + count) of the head, of which `seen` see a key. */
static void finish_maps(const Decode *plan, int64_t head, int64_t first, int64_t count, int64_t seen, float *mass_row) {
  const Forward *a = plan->a;
  const Inputs *in = &a->in;
  const int64_t line = head * plan->query_blocks + first / in->query_block, at = line * plan->key_blocks;
  float *mass = a->block_mass ? a->block_mass + at : mass_row;
  for (int64_t b = 0; b < plan->key_blocks; b++) {
    const int64_t start = b * in->key_block, keys = least(in->key_block, in->keys - start);
    float sum = 0.0f, weighted = 0.0f, max = 0.0f, logit = -INFINITY;
    for (int64_t row = head * in->queries + first; row < head * in->queries + first + count; row++) {
      const float *p = plan->p + row * plan->width + start / plan->piece * plan->padded + start % plan->piece, top = plan->logit[row * plan->key_blocks + b];
      if (a->block_mass || a->top_k) sum += sum_of(p, keys);
      if (a->block_weighted) weighted += dot(p, a->key_weights + head * in->keys + start, keys);
      if (a->block_max) max = most_of(max, largest_of(p, keys));
      logit = most_of(logit, top);
    }
    const float rows = (float)most(seen, 1);
    mass[b] = sum / rows;
    if (a->block_weighted) a->block_weighted[at + b] = weighted / rows;
    if (a->block_max) a->block_max[at + b] = max;
    if (a->block_max_logit) a->block_max_logit[at + b] = logit;
  }
  if (a->top_k) strongest(mass, plan->key_blocks, a->top_k, a->top_keys + line * a->top_k, a->top_mass + line * a->top_k);
}

static void head(void *argument, char *scratch, int64_t number) {
  const Decode *plan = argument;
  const Forward *a = plan->a;
  const Inputs *in = &a->in;
  int seen[FEW];
  for (int64_t i = 0; i < in->queries; i++) seen[i] = finish_row(plan, number * in->queries + i);
  for (int64_t i = 0; plan->blocks && i < in->queries; i += in->query_block) {
    int64_t count = least(in->query_block, in->queries - i), rows = 0;
    for (int64_t r = i; r < i + count; r++) rows += seen[r];
    finish_maps(plan, number, i, count, rows, (float *)scratch);
  }
  float *received = a->received ? a->received + number * in->keys : NULL;
  float *diagonal = a->diagonal ? a->diagonal + number * a->distances : NULL;
  if (received) memset(received, 0, 4 * in->keys);
  if (diagonal) memset(diagonal, 0, 4 * a->distances);
  for (int64_t i = 0; i < in->queries; i++)
    for (int64_t part = 0; part < plan->pieces; part++) {
      const float *p = plan->p + (number * in->queries + i) * plan->width + part * plan->padded;
      const int64_t start = part * plan->piece, keys = keys_of(plan, part);
      for (int64_t k = 0; received && k < keys; k++) received[start + k] += p[k];
      const int64_t nearest = in->anchor[number / in->heads] + i - start - a->first_distance; /* entry of key 0 */
      const int64_t from = most(0, nearest - a->distances + 1), to = least(keys, nearest + 1);
      for (int64_t k = from; diagonal && k < to; k++) diagonal[nearest - k] += p[k];
    }
}

/* As lens_forward, for a->few; OK, or NO_MEMORY. */
int lens_decode(const Forward *a) {
  const Inputs *in = &a->in;
  const int64_t lines = in->batch * in->heads, all_rows = lines * in->queries;
  Decode plan = {.a = a, .rows = in->heads / in->kv_heads * in->queries};
  plan.blocks = a->block_mass || a->block_max || a->block_max_logit || a->block_weighted || a->top_k;
  plan.key_blocks = (in->keys + in->key_block - 1) / in->key_block;
  plan.query_blocks = (in->queries + in->query_block - 1) / in->query_block;
  plan.value_width = round_up(in->value_dim, LANES);
  plan.sums = FIXED + a->features + a->pairs + plan.value_width;
  plan.piece = plan.blocks ? most(1, PIECE / in->key_block) * in->key_block : PIECE;
  plan.piece = least(plan.piece, in->keys);
  plan.pieces = (in->keys + plan.piece - 1) / plan.piece;
  plan.padded = round_up(plan.piece, LANES);
  plan.width = plan.pieces * plan.padded;
  const int64_t numbers = all_rows * (plan.width + plan.pieces * (1 + plan.sums) + (plan.blocks ? plan.key_blocks : 0)) + LANES;
  plan.p = allocate(4 * numbers);
  if (!plan.p) return NO_MEMORY;
  if (in->poison) memset(plan.p, 0xff, (size_t)(4 * numbers));
  plan.max = plan.p + all_rows * plan.width;
  plan.partial = plan.max + all_rows * plan.pieces;
  plan.logit = plan.partial + all_rows * plan.pieces * plan.sums;
  Work pieces = {.in = in, .plan = &plan, .units = in->batch * in->kv_heads * plan.pieces, .run = piece};
  pieces.scratch = 4 * (plan.rows * in->head_dim + in->head_dim + TILE * plan.value_width + plan.piece + LANES);
  Work heads = {.in = in, .plan = &plan, .units = lines, .scratch = 4 * plan.key_blocks, .run = head};
  int status = work_in_parallel(&pieces);
  if (status == OK) status = work_in_parallel(&heads);
  free(plan.p);
  return status;
}
