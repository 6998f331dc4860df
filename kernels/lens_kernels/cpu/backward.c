/* Backward pass: gradients of query, key, value and learned sinks, and what they say per block.
 *
 * With dO, h, g, G, c the gradients of output, LSE, entropy, block mass and received mass,
 *
 *   a_ij  = dO_i . v_j                              x_ij = a_ij + G_IJ + c_j - g_i (log P_ij + 1)
 *   dS_ij = P_ij (x_ij - D_i + h_i),                D_i = sum_j P_ij x_ij
 *   dV = P' dO,  dQ = scale dS K,  dK = scale dS' Q (dS through the derivative of the soft cap)
 *
 * A tile of queries keeps the strips of P and x over all its keys, [key][query] as in the forward
 * pass, so D is exact before dS is formed, the output is not needed, and each of the five matrix
 * products is done once. Memory per thread is O(keys). A unit of work is a range of query tiles of all
 * heads of one key-value head, with its own partial dK and dV, added in order: no race, no atomics,
 * the same bits for any number of threads.
 */
#include "work.h"

typedef struct {
  Inputs in;
  const float *lse;                 /* [batch, heads, queries], of the forward pass */
  Operand of_output;                /* [batch, heads, queries, value_dim]; data NULL: no gradient */
  const float *of_lse, *of_entropy; /* [batch, heads, queries]; NULL: none, as below */
  const float *of_block_mass;       /* [batch, heads, query_blocks, key_blocks], over the seen rows of the block */
  const float *of_received;         /* [batch, heads, keys] */
  /* Outputs are contiguous float32 and start as 0; NULL: not wanted. */
  float *query, *key, *value; /* of the inputs' shapes */
  float *sinks;               /* [batch, heads, queries]: to be summed over batch and queries */
  float *row_attribution;     /* [batch, heads, queries] */
  float *block_attribution, *block_influence, *block_logit_gradient, *block_logit_gradient_abs; /* of_block_mass */
} Backward;

int64_t lens_backward_size(void) { return sizeof(Backward); }

typedef struct {
  int64_t start, keys;
  float *p, *x, *slope; /* panels of [keys][width] */
} Strip;

typedef struct {
  float *query, *query_rows, *key; /* see Rows */
  float *query_wide;               /* scaled Q, [ROWS][key_width] */
  float *of_output, *of_output_wide; /* dO as panels of [value_dim][width], and [ROWS][value_width] */
  float *key_wide, *value;         /* copies of a key tile: [keys][key_width], [keys][value_dim] */
  float *p, *x, *slope;            /* strips over all keys */
  float *query_gradient;           /* [ROWS][key_width] */
  Strip *strips;
} Scratch;

typedef struct {
  const Backward *args;
  Cut cut;
  int64_t key_tile, key_width, value_width, query_blocks, key_blocks;
  int extra; /* x differs from a */
  int split; /* a key tile lies in one key block */
  float *key, *value; /* partial gradients [batch * kv_heads, chunks, keys, width] */
} Plan;

typedef struct {
  const Plan *plan;
  const Backward *a;
  Scratch *w;
  Rows q;
  float *key, *value; /* partial gradients of the unit */
  int64_t strip_count;
  float lse[ROWS], of_entropy[ROWS]; /* lse: INFINITY where nothing may come from the row */
  float through[ROWS], row_sum[ROWS], level[ROWS]; /* sum P a, sum P x, h - D */
  float largest[ROWS], others[ROWS]; /* largest P of the row; sum P a over the other keys, over their mass */
  int32_t largest_key[ROWS];
} State;

/* Adds one number per query to the blocks of key block `block` in a block map. */
static void add_to_map(const State *t, float *map, int64_t block, const float *lane) {
  const Inputs *in = &t->a->in;
  const int64_t blocks = (t->q.batch * in->heads + t->q.head) * t->plan->query_blocks;
  for (int64_t r = 0; r < t->q.rows; r++)
    map[(blocks + (t->q.start + r) / in->query_block) * t->plan->key_blocks + block] += lane[r];
}

static void load_upstream(State *t) {
  const Backward *a = t->a;
  const Inputs *in = &a->in;
  const int64_t row0 = (t->q.batch * in->heads + t->q.head) * in->queries + t->q.start;
  for (int64_t r = 0; r < t->q.lanes; r++) {
    const int real = r < t->q.rows;
    t->lse[r] = real && a->lse[row0 + r] != -INFINITY ? a->lse[row0 + r] : INFINITY;
    t->of_entropy[r] = real && a->of_entropy ? a->of_entropy[row0 + r] : 0.0f;
    t->through[r] = t->row_sum[r] = 0.0f;
    t->largest[r] = -1.0f, t->largest_key[r] = -1;
    float *wide = t->w->query_wide + r * t->plan->key_width;
    memset(wide, 0, 4 * t->plan->key_width);
    int64_t at = t->q.batch * in->query.batch + t->q.head * in->query.head + (t->q.start + r) * in->query.row;
    if (real) read_row(wide, &in->query, at, in->head_dim);
    for (int64_t d = 0; d < in->head_dim; d++) wide[d] *= (float)in->scale;
    if (!a->of_output.data) continue;
    wide = t->w->of_output_wide + r * t->plan->value_width;
    memset(wide, 0, 4 * t->plan->value_width);
    const Operand *from = &a->of_output;
    if (real) read_row(wide, from, t->q.batch * from->batch + t->q.head * from->head + (t->q.start + r) * from->row, in->value_dim);
    transpose_row(t->w->of_output, in->value_dim, r, t->q.lanes, wide, 1.0f);
  }
}

/* x = dO v' for the keys of a strip. */
static void products_with_values(State *t, const Strip *strip) {
  const Inputs *in = &t->a->in;
  if (!t->a->of_output.data) {
    memset(strip->x, 0, 4 * strip->keys * t->q.lanes);
    return;
  }
  int64_t at = t->q.batch * in->value.batch + t->q.kv_head * in->value.head + strip->start * in->value.row;
  const float *value = read_rows(t->w->value, &in->value, at, strip->keys, in->value_dim, in->value_dim);
  for (int64_t lane = 0; lane < t->q.lanes; lane += PANEL) {
    int64_t width = least(PANEL, t->q.lanes - lane);
    product(width, strip->keys, in->value_dim, value, in->value_dim, t->w->of_output + lane * in->value_dim, width,
            strip->x + lane * strip->keys, width, NULL);
  }
}

/* What x has beyond a, without the entropy: G_IJ of each query, in `of_block`. */
static void gradients_of_block(const State *t, int64_t block, float *of_block) {
  const Inputs *in = &t->a->in;
  const int64_t blocks = (t->q.batch * in->heads + t->q.head) * t->plan->query_blocks;
  for (int64_t r = 0; r < t->q.lanes; r++) {
    int64_t row = least(t->q.start + r, in->queries - 1);
    of_block[r] = t->a->of_block_mass ? t->a->of_block_mass[(blocks + row / in->query_block) * t->plan->key_blocks + block] : 0.0f;
  }
}

/* P = exp(s - lse), x completed, and the sums of the rows. */
INLINE void probabilities(State *t, const Strip *strip, const int extra, float *attribution) {
  const Inputs *in = &t->a->in;
  const vec low = splat(-87.33f);
  const float *received = t->a->of_received;
  float of_block[ROWS];
  if (extra) gradients_of_block(t, strip->start / in->key_block, of_block);
  if (received) received += (t->q.batch * in->heads + t->q.head) * in->keys + strip->start;
  for (int64_t r = 0; r < t->q.lanes; r += LANES) {
    Column p = column(strip->p, strip->keys, r, t->q.lanes), x = column(strip->x, strip->keys, r, t->q.lanes);
    vec lse = load(t->lse + r), through = splat(0.0f), sum = through, largest = load(t->largest + r);
    ivec largest_key = load_int(t->largest_key + r);
    for (int64_t k = 0; k < strip->keys; k++) {
      vec logarithm = load(p.first + k * p.step) - lse, a = load(x.first + k * x.step);
      vec e = exponential(logarithm);
      store(p.first + k * p.step, e);
      through += e * a;
      ivec grows = e > largest;
      largest = choose(grows, e, largest);
      largest_key = (grows & splat_int((int32_t)(strip->start + k))) | (~grows & largest_key);
      if (extra) {
        logarithm = at_least(low, logarithm);
        a += load(of_block + r) - load(t->of_entropy + r) * (logarithm + splat(1.0f));
        if (received) a += splat(received[k]);
        store(x.first + k * x.step, a);
        sum += e * a;
      }
    }
    store(attribution + r, through);
    store(t->through + r, load(t->through + r) + through);
    store(t->row_sum + r, load(t->row_sum + r) + (extra ? sum : through));
    store(t->largest + r, largest);
    *(ivec_any *)(t->largest_key + r) = largest_key;
  }
}

/* The first sweep over the keys: P, x, dV. */
static void first_sweep(State *t, int64_t start, int64_t keys) {
  const Backward *a = t->a;
  const int64_t width = t->plan->value_width;
  Strip *strip = t->w->strips + t->strip_count;
  int64_t at = t->strip_count ? (strip[-1].p - t->w->p) + strip[-1].keys * t->q.lanes : 0;
  *strip = (Strip){start, keys, t->w->p + at, t->w->x + at, a->in.softcap > 0 ? t->w->slope + at : NULL};
  t->strip_count++;
  float attribution[ROWS];
  logits(&t->q, strip->p, start, keys, strip->slope);
  products_with_values(t, strip);
  if (t->plan->extra) probabilities(t, strip, 1, attribution);
  else probabilities(t, strip, 0, attribution);
  if (a->block_attribution) add_to_map(t, a->block_attribution, start / a->in.key_block, attribution);
  if (a->value && a->of_output.data)
    for (int64_t lane = 0; lane < t->q.lanes; lane += PANEL)
      product_onto(width, keys, least(PANEL, t->q.rows - lane), strip->p + lane * keys, least(PANEL, t->q.lanes - lane),
                   t->w->of_output_wide + lane * width, width, t->value + start * width, width, NULL);
}

/* Where a key holds nearly all the mass, 1 - P loses its digits: the row's largest key is judged by the others. */
static void sum_others(State *t) {
  const Inputs *in = &t->a->in;
  for (int64_t r = 0; r < t->q.lanes; r += LANES) {
    vec mass = splat(0.0f), through = mass;
    ivec largest_key = load_int(t->largest_key + r);
    if (in->sinks) {
      float sink[LANES];
      for (int i = 0; i < LANES; i++) sink[i] = in->sinks[t->q.head] - t->lse[r + i];
      mass = exponential(load(sink));
    }
    for (int64_t i = 0; i < t->strip_count; i++) {
      const Strip *strip = t->w->strips + i;
      Column p = column(strip->p, strip->keys, r, t->q.lanes), x = column(strip->x, strip->keys, r, t->q.lanes);
      vec strip_mass = splat(0.0f), strip_through = strip_mass;
      for (int64_t k = 0; k < strip->keys; k++) {
        ivec other = largest_key != splat_int((int32_t)(strip->start + k));
        vec e = (vec)(other & (ivec)load(p.first + k * p.step));
        strip_mass += e;
        strip_through += e * load(x.first + k * x.step);
      }
      mass += strip_mass;
      through += strip_through;
    }
    store(t->others + r, through / choose(mass > splat(0.0f), mass, splat(1.0f)));
  }
}

/* dS in place of x, and the block maps that come with it. */
static void gradients_of_logits(State *t, const Strip *strip) {
  const Backward *a = t->a;
  float sum[ROWS], absolute[ROWS], influence[ROWS];
  for (int64_t r = 0; r < t->q.lanes; r += LANES) {
    Column p = column(strip->p, strip->keys, r, t->q.lanes), x = column(strip->x, strip->keys, r, t->q.lanes);
    vec level = load(t->level + r), all = splat(0.0f), size = all, masked = all;
    vec through = load(t->through + r), others = load(t->others + r);
    ivec largest_key = load_int(t->largest_key + r);
    for (int64_t k = 0; k < strip->keys; k++) {
      vec e = load(p.first + k * p.step), value = load(x.first + k * x.step), gradient = e * (value + level);
      all += gradient;
      size += choose(gradient < splat(0.0f), -gradient, gradient);
      if (a->block_influence) {
        ivec largest = largest_key == splat_int((int32_t)(strip->start + k));
        masked += e * choose(largest, others - value, (through - value) / choose(largest, e, splat(1.0f) - e));
      }
      store(x.first + k * x.step, gradient);
    }
    store(sum + r, all);
    store(absolute + r, size);
    store(influence + r, masked);
  }
  const int64_t block = strip->start / a->in.key_block;
  if (a->block_logit_gradient) add_to_map(t, a->block_logit_gradient, block, sum);
  if (a->block_logit_gradient_abs) add_to_map(t, a->block_logit_gradient_abs, block, absolute);
  if (a->block_influence) add_to_map(t, a->block_influence, block, influence);
  for (int64_t i = 0; strip->slope && i < strip->keys * t->q.lanes; i += LANES)
    store(strip->x + i, load(strip->x + i) * load(strip->slope + i));
}

/* The second sweep: dS, dK, dQ. */
static void second_sweep(State *t, const Strip *strip) {
  const Backward *a = t->a;
  const Inputs *in = &a->in;
  const int64_t width = t->plan->key_width, keys = strip->keys;
  float ones[ROWS];
  for (int i = 0; i < ROWS; i++) ones[i] = 1.0f;
  gradients_of_logits(t, strip);
  int64_t at = t->q.batch * in->key.batch + t->q.kv_head * in->key.head + strip->start * in->key.row;
  const float *key = a->query ? read_rows(t->w->key_wide, &in->key, at, keys, in->head_dim, width) : NULL;
  for (int64_t lane = 0; lane < t->q.lanes; lane += PANEL) {
    const int64_t panel = least(PANEL, t->q.lanes - lane), rows = least(PANEL, t->q.rows - lane);
    const float *gradient = strip->x + lane * keys;
    if (a->key)
      product_onto(width, keys, rows, gradient, panel, t->w->query_wide + lane * width, width,
                   t->key + strip->start * width, width, NULL);
    if (a->query)
      product_transposed(width, rows, keys, gradient, panel, key, width, t->w->query_gradient + lane * width, width, ones);
  }
}

static void finish_rows(State *t) {
  const Backward *a = t->a;
  const Inputs *in = &a->in;
  const int64_t row0 = (t->q.batch * in->heads + t->q.head) * in->queries + t->q.start;
  for (int64_t r = 0; r < t->q.rows; r++) {
    if (a->row_attribution) a->row_attribution[row0 + r] = t->through[r];
    if (a->sinks && t->lse[r] != INFINITY) a->sinks[row0 + r] = expf(in->sinks[t->q.head] - t->lse[r]) * t->level[r];
    for (int64_t d = 0; a->query && d < in->head_dim; d++)
      a->query[(row0 + r) * in->head_dim + d] = t->w->query_gradient[r * t->plan->key_width + d] * (float)in->scale;
  }
}

static void query_tile(const Plan *plan, Scratch *w, int64_t head, int64_t tile, float *key, float *value) {
  const Backward *a = plan->args;
  const Inputs *in = &a->in;
  State t = {.plan = plan, .a = a, .w = w, .key = key, .value = value};
  t.q = (Rows){.in = in, .query = w->query, .query_rows = w->query_rows, .key = w->key};
  load_rows(&t.q, head, plan->cut.tiles[tile]);
  load_upstream(&t);
  memset(w->query_gradient, 0, 4 * ROWS * plan->key_width);
  for (int64_t start = 0, stop; start < in->keys; start = stop) {
    stop = least(start + plan->key_tile, plan->split ? (start / in->key_block + 1) * in->key_block : in->keys);
    stop = least(stop, in->keys);
    int64_t from = most(start, t.q.any_low), to = least(stop, t.q.any_high);
    if (from < to && !is_skipped(&t.q, start)) first_sweep(&t, from, to - from);
  }
  const int64_t row0 = head * in->queries + t.q.start;
  for (int64_t r = 0; r < t.q.lanes; r++)
    t.level[r] = (a->of_lse && r < t.q.rows ? a->of_lse[row0 + r] : 0.0f) - t.row_sum[r];
  if (a->block_influence) sum_others(&t);
  else memset(t.others, 0, sizeof t.others);
  for (int64_t i = 0; i < t.strip_count; i++) second_sweep(&t, w->strips + i);
  finish_rows(&t);
}

/* --- units --- */

static Scratch lay_out(const Plan *plan, Layout *layout) {
  const Inputs *in = &plan->args->in;
  int64_t per_block = (in->key_block + plan->key_tile - 1) / plan->key_tile;
  int64_t strips = plan->split ? plan->key_blocks * per_block : in->keys / plan->key_tile + 1;
  Scratch w = {0};
  w.query = take(layout, 4 * ROWS * in->head_dim);
  w.query_rows = take(layout, 4 * FEW * in->head_dim);
  w.key = take(layout, 4 * plan->key_tile * in->head_dim);
  w.query_wide = take(layout, 4 * ROWS * plan->key_width);
  w.of_output = take(layout, 4 * ROWS * in->value_dim);
  w.of_output_wide = take(layout, 4 * ROWS * plan->value_width);
  w.key_wide = take(layout, 4 * plan->key_tile * plan->key_width);
  w.value = take(layout, 4 * plan->key_tile * in->value_dim);
  w.p = take(layout, 4 * ROWS * in->keys);
  w.x = take(layout, 4 * ROWS * in->keys);
  w.slope = take(layout, in->softcap > 0 ? 4 * ROWS * in->keys : 0);
  w.query_gradient = take(layout, 4 * ROWS * plan->key_width);
  w.strips = take(layout, strips * (int64_t)sizeof(Strip));
  return w;
}

static void run_unit(void *argument, char *scratch, int64_t unit) {
  const Plan *plan = argument;
  const Inputs *in = &plan->args->in;
  const int64_t kv_head = unit / plan->cut.chunks, chunk = unit % plan->cut.chunks, group = in->heads / in->kv_heads;
  Layout layout = {scratch, 0};
  Scratch w = lay_out(plan, &layout);
  float *key = plan->key ? plan->key + unit * in->keys * plan->key_width : NULL;
  float *value = plan->value ? plan->value + unit * in->keys * plan->value_width : NULL;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
    for (int64_t tile = plan->cut.chunk_start[chunk]; tile < plan->cut.chunk_start[chunk + 1]; tile++) {
      if (in->poison) memset(scratch, 0xff, (size_t)layout.size);
      query_tile(plan, &w, head, tile, key, value);
    }
}

static void add_partials(void *argument, char *scratch, int64_t kv_head) {
  const Plan *plan = argument;
  const Backward *a = plan->args;
  const Inputs *in = &a->in;
  const int64_t chunks = plan->cut.chunks, first = kv_head * chunks * in->keys;
  (void)scratch;
  if (plan->key)
    reduce(plan->key + first * plan->key_width, 1, chunks, in->keys, plan->key_width, in->head_dim,
           a->key + kv_head * in->keys * in->head_dim);
  if (plan->value)
    reduce(plan->value + first * plan->value_width, 1, chunks, in->keys, plan->value_width, in->value_dim,
           a->value + kv_head * in->keys * in->value_dim);
}

/* Fills every output that is wanted; OK, or NO_MEMORY. */
int lens_backward(const Backward *a) {
  const Inputs *in = &a->in;
  const int64_t kv_heads = in->batch * in->kv_heads, widest = most(in->head_dim, in->value_dim) > 128 ? COLS / 2 : COLS;
  Plan plan = {.args = a};
  plan.key_width = round_up(in->head_dim, LANES);
  plan.value_width = round_up(in->value_dim, LANES);
  plan.query_blocks = (in->queries + in->query_block - 1) / in->query_block;
  plan.key_blocks = (in->keys + in->key_block - 1) / in->key_block;
  plan.extra = a->of_entropy || a->of_block_mass || a->of_received;
  plan.split = in->blocks.data || a->of_block_mass || a->block_attribution || a->block_influence ||
               a->block_logit_gradient || a->block_logit_gradient_abs;
  plan.key_tile = plan.split ? least(widest, in->key_block) : widest;
  int status = cut_queries(in, most(1, 16 / kv_heads), &plan.cut);
  const int64_t units = kv_heads * plan.cut.chunks;
  if (status == OK && a->key) {
    plan.key = calloc((size_t)(units * in->keys * plan.key_width), 4);
    if (!plan.key) status = NO_MEMORY;
  }
  if (status == OK && a->value) {
    plan.value = calloc((size_t)(units * in->keys * plan.value_width), 4);
    if (!plan.value) status = NO_MEMORY;
  }
  if (status == OK) {
    Layout size = {NULL, 0};
    lay_out(&plan, &size);
    Work all = {.in = in, .plan = &plan, .units = units, .scratch = size.size, .run = run_unit};
    status = work_in_parallel(&all);
  }
  if (status == OK && (a->key || a->value)) {
    Work all = {.in = in, .plan = &plan, .units = kv_heads, .run = add_partials};
    status = work_in_parallel(&all);
  }
  free(plan.key);
  free(plan.value);
  free_cut(&plan.cut);
  return status;
}
