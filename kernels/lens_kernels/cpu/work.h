/* How the work is cut and shared out: tiles, units of work, threads, scratch memory. */
#pragma once

#include <pthread.h>

#include "rows.h"

enum { ALIGN = 64 };

static inline void *allocate(int64_t bytes) {
  void *p = NULL;
  return posix_memalign(&p, ALIGN, (size_t)most(bytes, ALIGN)) ? NULL : p;
}

/* Scratch memory handed out piece by piece; with base == NULL only its size is found. */
typedef struct {
  char *base;
  int64_t size;
} Layout;

static inline void *take(Layout *layout, int64_t bytes) {
  void *p = layout->base ? layout->base + layout->size : NULL;
  layout->size += round_up(bytes, ALIGN) + ALIGN;
  return p;
}

/* --- units --- */

/* Units are independent of each other and of the number of threads: results are bitwise the same for any number. */
typedef struct {
  const Inputs *in;
  void *plan;
  int64_t units, scratch;                             /* scratch: bytes per thread */
  void (*run)(void *plan, char *scratch, int64_t unit);
  int64_t next; /* atomic: the next unit */
} Work;

static inline void work(void *argument) {
  Work *all = argument;
  if (__atomic_load_n(&all->next, __ATOMIC_RELAXED) >= all->units) return;
  char *scratch = allocate(all->scratch);
  if (!scratch) return; /* the other threads do the work */
  int64_t unit;
  while ((unit = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED)) < all->units) all->run(all->plan, scratch, unit);
  free(scratch);
}

static inline void *work_thread(void *all) {
  work(all);
  return NULL;
}

/* Every thread takes units until none is left. torch's own OpenMP threads are used where the caller
 * found them: others would share the cores with these, which spin for milliseconds after each operation. */
static inline int work_in_parallel(Work *all) {
  const Inputs *in = all->in;
  if (in->threads > 1 && in->openmp_parallel) {
    in->openmp_parallel(work, all, (unsigned)in->threads, 0);
  } else {
    int64_t helpers = least(in->threads, all->units) - 1, started = 0;
    pthread_t *thread = helpers > 0 ? malloc((size_t)helpers * sizeof *thread) : NULL;
    for (; thread && started < helpers; started++)
      if (pthread_create(&thread[started], NULL, work_thread, all)) break; /* fewer threads, same result */
    work(all);
    for (int64_t i = 0; i < started; i++) pthread_join(thread[i], NULL);
    free(thread);
  }
  return all->next < all->units ? NO_MEMORY : OK;
}

/* --- tiles --- */

/* The query tiles of a head, and chunks of them. A tile ends where a query block ends, a chunk consists of whole
 * query blocks. */
typedef struct {
  Tile *tiles;
  int64_t tile_count, chunks, *chunk_start;
} Cut;

/* Cuts into about `chunks` chunks of equal work, as far as the intervals of the first batch row tell. */
static inline int cut_queries(const Inputs *in, int64_t chunks, Cut *cut) {
  const int64_t query_blocks = (in->queries + in->query_block - 1) / in->query_block;
  const int64_t limit = in->queries / least(ROWS, in->query_block) + query_blocks + 1;
  const int64_t blocks_per_tile = in->blocks.data ? 1 : most(1, ROWS / in->query_block);
  cut->tiles = allocate(limit * (int64_t)sizeof(Tile));
  cut->chunk_start = allocate((limit + 1) * 8);
  if (!cut->tiles || !cut->chunk_start) return NO_MEMORY;
  int64_t pairs = 0, done = 0;
  for (int64_t i = 0; i < in->queries; i++) pairs += in->high[i] - in->low[i] + 1;
  for (int64_t start = 0, stop; start < in->queries; start = stop) {
    int64_t block = start / in->query_block;
    stop = in->query_block <= ROWS ? (block + blocks_per_tile) * in->query_block
                                   : least(start + ROWS, (block + 1) * in->query_block);
    stop = least(stop, in->queries);
    if (start % in->query_block == 0 && done * chunks >= cut->chunks * pairs) cut->chunk_start[cut->chunks++] = cut->tile_count;
    cut->tiles[cut->tile_count++] = (Tile){start, stop - start};
    for (int64_t i = start; i < stop; i++) done += in->high[i] - in->low[i] + 1;
  }
  cut->chunk_start[cut->chunks] = cut->tile_count;
  return OK;
}

static inline void free_cut(Cut *cut) {
  free(cut->tiles);
  free(cut->chunk_start);
}

/* Adds partial sums [heads, chunks, rows, width] into out [heads, rows, columns], in the order of the chunks. */
static inline void reduce(const float *partial, int64_t heads, int64_t chunks, int64_t rows, int64_t width,
                          int64_t columns, float *out) {
  for (int64_t head = 0; head < heads; head++)
    for (int64_t chunk = 0; chunk < chunks; chunk++)
      for (int64_t row = 0; row < rows; row++) {
        const float *from = partial + ((head * chunks + chunk) * rows + row) * width;
        float *to = out + (head * rows + row) * columns;
        for (int64_t i = 0; i < columns; i++) to[i] = (chunk ? to[i] : 0.0f) + from[i];
      }
}
