/* Forward pass: softmax(Q K') V and the statistics of P, without the N x N matrix.
 *
 * A tile of up to 64 queries meets tiles of up to 128 keys. Logits are kept transposed, S' = K Q' as
 * [key][query], so that one SIMD lane is one query: every row statistic is a vertical vector
 * operation, K is read row by row as it lies in memory, and P' is already the packed operand that
 * P V needs. Rows are exact by the online softmax; what needs the final log-sum-exp (block and
 * column statistics) is kept relative to the pivot of its key tile and multiplied by
 * exp(pivot - lse) when the row is finished, so Q K' is computed once.
 *
 * The tiles of AMX need keys and values in an order of their own (blocks.h): several tiles of
 * queries then meet a tile of keys one after the other, so that it is put so once for all of them.
 *
 * Memory per thread is O(keys): sums per (query, key block), and, only for column statistics, a strip
 * of P' with 64 queries. Partial columns are kept per unit of work and added in order.
 *
 * Key groups keep one running state (maximum, sums, output) per group, each with its own pivot, so
 * a group that holds 1e-60 of the mass is still exact; the row is their merge.
 */
#include "finish.h"

int64_t lens_forward_size(void) { return sizeof(Forward); }

static void begin_tile(State *t, int64_t head, Tile tile) {
  const Plan *plan = t->plan;
  const Forward *a = t->a;
  const Scratch *w = t->w;
  t->q = (Rows){.in = &a->in, .query = w->query, .query_rows = w->query_rows, .key = w->key, .brain = plan->brain,
                .query_blocks = plan->amx ? w->query_blocks : NULL};
  load_rows(&t->q, head, tile);
  for (int64_t g = 0; g < plan->groups; g++) {
    Sums *sums = t->w->sums + g;
    for (int r = 0; r < ROWS; r++) {
      sums->max[r] = -INFINITY;
      sums->sum[r] = sums->log_part[r] = sums->squares[r] = sums->distance[r] = 0.0f;
    }
    memset(sums->output, 0, 4 * ROWS * plan->value_width);
    memset(sums->features, 0, 4 * ROWS * a->features);
    memset(sums->matched, 0, 4 * ROWS * a->pairs);
  }
  mark_labels(t);
}

/* Keys [start, stop) for each of the tiles of queries. */
static void meet_keys(State *tiles, int64_t count, int64_t start, int64_t stop) {
#if HAS_AMX
  Split split = {0};
#endif
  for (State *t = tiles; t < tiles + count; t++) {
    int64_t from = most(start, t->q.any_low), to = least(stop, t->q.any_high);
    if (from >= to || is_skipped(&t->q, start)) continue;
#if HAS_AMX
    if (t->plan->amx) {
      if (!split.keys.data) split = split_keys(t, start, stop - start);
      t->q.split = &split;
      from = start + (from - start) / (2 * SIDE) * (2 * SIDE);
    }
#endif
    key_tile(t, from, to - from);
  }
}

/* Up to `together` tiles of queries from a number on; each is computed as it would be alone. */
static void query_tiles(const Plan *plan, Scratch *w, int64_t head, int64_t first, int64_t count, float *received, float *diagonal,
                        int64_t *seen_rows) {
  const Inputs *in = &plan->args->in;
  State tiles[TOGETHER];
  for (int64_t i = 0; i < count; i++) {
    tiles[i] = (State){.plan = plan, .a = plan->args, .w = w + i};
    begin_tile(tiles + i, head, plan->cut.tiles[first + i]);
  }
  for (int64_t start = 0, stop; start < in->keys; start = stop) {
    stop = least(start + plan->key_tile, plan->split ? (start / in->key_block + 1) * in->key_block : in->keys);
    stop = least(stop, in->keys);
    meet_keys(tiles, count, start, stop);
  }
  for (State *t = tiles; t < tiles + count; t++) {
#if HAS_AMX
    if (plan->amx) turn_outputs(t);
#endif
    if (t->a->groups) finish_groups(t);
    finish_rows(t);
    if (plan->blocks) finish_blocks(t, seen_rows);
    if (plan->columns) finish_columns(t, received, diagonal);
  }
}

/* --- units --- */

/* For each tile of queries its own, but for what none needs longer than it meets a tile of keys. */
static void lay_out(const Plan *plan, Layout *layout, Scratch *all) {
  const Forward *a = plan->args;
  const Inputs *in = &a->in;
  const int64_t per_block = (in->key_block + plan->key_tile - 1) / plan->key_tile, tile = round_up(plan->key_tile, 2 * SIDE);
  const int64_t tiles = plan->split ? plan->key_blocks * per_block : in->keys / plan->key_tile + 1;
  const int64_t strips = plan->blocks || plan->columns ? tiles * plan->groups + 1 : 1;
  const int64_t parts = plan->blocks && !plan->split ? plan->key_blocks * plan->groups + 1 : strips;
  Scratch w = {0};
  w.block_row = take(layout, a->top_k ? 4 * plan->key_blocks : 0); /* first: it outlives the tile */
  w.key = take(layout, 4 * plan->key_tile * in->head_dim);
  w.value = take(layout, 4 * tile * plan->value_width);
  w.p = take(layout, plan->columns ? 0 : 4 * ROWS * tile);
  w.s = take(layout, a->groups ? 4 * ROWS * tile : 0);
  w.pairs = take(layout, 2 * ROWS * tile * plan->brain);
  w.key_blocks = take(layout, 2 * tile * plan->amx * (in->head_dim + plan->value_width));
  w.turned = take(layout, 4 * ROWS * plan->amx * plan->value_width);
  for (int64_t i = 0; i < plan->together; i++) {
    w.query = take(layout, 4 * ROWS * in->head_dim);
    w.query_rows = take(layout, 4 * FEW * in->head_dim);
    w.query_blocks = take(layout, 2 * ROWS * plan->amx * in->head_dim);
    if (plan->columns) w.p = take(layout, 4 * ROWS * (in->keys * plan->groups + SIDE));
    w.marks = take(layout, a->pairs * (int64_t)sizeof(Marks));
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
    all[i] = w;
  }
}

/* Looks at this unit's share of the queries, and of the keys and values of its head if it is the first that reads them. */
static int is_finite_share(const Plan *plan, int64_t head, int64_t chunk) {
  const Inputs *in = &plan->args->in;
  const int64_t batch = head / in->heads, share = in->heads / in->kv_heads, own = head % in->heads;
  if (!is_finite_part(&in->query, batch, own, in->queries, in->head_dim, chunk, plan->cut.chunks)) return 0;
  if (own % share) return 1;
  return is_finite_part(&in->key, batch, own / share, in->keys, in->head_dim, chunk, plan->cut.chunks) &&
         is_finite_part(&in->value, batch, own / share, in->keys, in->value_dim, chunk, plan->cut.chunks);
}

static void run_unit(void *argument, char *scratch, int64_t unit) {
  const Plan *plan = argument;
  const Inputs *in = &plan->args->in;
  const int64_t head = unit / plan->cut.chunks, chunk = unit % plan->cut.chunks;
  Layout layout = {scratch, 0};
  Scratch w[TOGETHER];
  lay_out(plan, &layout, w);
  float *received = plan->received ? plan->received + unit * in->keys : NULL;
  float *diagonal = plan->diagonal ? plan->diagonal + unit * plan->diagonal_width + SLACK : NULL;
  int64_t seen_rows = 0;
  if (!is_finite_share(plan, head, chunk)) __atomic_store_n(plan->args->infinite, 1, __ATOMIC_RELAXED);
#if HAS_AMX
  Tiles before;
  if (plan->amx) begin_tiles(&before);
#endif
  const int64_t begin = plan->cut.chunk_start[chunk], count = plan->cut.chunk_start[chunk + 1] - begin;
  const int64_t times = (count + plan->together - 1) / plan->together;
  for (int64_t i = 0; i < times; i++) {
    const int64_t first = begin + count * i / times, end = begin + count * (i + 1) / times;
    if (in->poison) memset(w->key, 0xff, (size_t)(scratch + layout.size - (char *)w->key));
    query_tiles(plan, w, head, first, end - first, received, diagonal, &seen_rows);
  }
#if HAS_AMX
  if (plan->amx) end_tiles(&before);
#endif
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
#if HAS_AMX
  plan.amx = plan.brain && in->head_dim % (2 * SIDE) == 0 && may_use_amx();
#endif
  plan.brain = plan.amx || (plan.brain && PREFERS_PAIRS);
  plan.rows = a->entropy || a->concentration || a->distance;
  plan.split = in->blocks.data || (plan.blocks && in->key_block > widest);
  plan.key_tile = widest;
  if (plan.split) plan.key_tile = least(widest, in->key_block);
  else if (plan.blocks) plan.key_tile = widest / in->key_block * in->key_block;
  plan.diagonal_width = a->distances + 2 * SLACK;
  plan.together = !plan.amx ? 1 : plan.columns ? TOGETHER / 4 : TOGETHER; /* columns keep P' of each whole */
  const int64_t enough = plan.amx ? least(in->queries / (2 * ROWS), 32 * in->threads / heads) : in->queries;
  int status = cut_queries(in, most(1, plan.columns ? 256 / heads : enough), &plan.cut);
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
    Scratch unused[TOGETHER];
    lay_out(&plan, &size, unused);
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
