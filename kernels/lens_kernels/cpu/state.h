/* What the forward pass knows of a tile of queries while it meets the keys. */
#pragma once
#include "forward.h"

enum {
  TOGETHER = 8, /* of tiles of queries at most */
  GROUPS = 4,
  MARKS = 1024, /* bits for labels */
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
  float *output;            /* [ROWS][value_width]; by the tiles of AMX [value_width][lanes] until all keys are met */
  float *features, *matched; /* [features][ROWS], [pairs][ROWS] */
} Sums;

/* The labels of the rows of a tile: the least, the largest, and bits, each of which may stand for several labels. */
typedef struct {
  int32_t low, high;
  uint64_t bits[MARKS / 64];
} Marks;

typedef struct {
  float *query, *query_rows; /* see Rows */
  float *p, *s;       /* P' of one strip, or of all when column statistics are wanted; logits of a mixed tile */
  float *key, *value; /* copies of a key tile, where it cannot be read in place */
  uint32_t *pairs;    /* P' of a strip as pairs of bfloat16 */
  uint32_t *query_blocks, *key_blocks; /* see Rows and Split */
  float *turned;      /* [ROWS][value_width] */
  Marks *marks;       /* [pairs] */
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
  int brain, amx;               /* bfloat16 by the machine's own instruction, and by its tiles */
  int64_t together;             /* tiles of queries that meet a tile of keys one after the other */
  int columns, blocks, rows;    /* which kinds of statistics are wanted */
  int split;                    /* a key tile lies in one key block */
  float *received, *diagonal;   /* partial sums [batch * heads, chunks, ...] */
  int64_t diagonal_width;
} Plan;

/* The bit of a label. */
INLINE uint32_t mark_of(int32_t label) { return (uint32_t)label * 2654435761u >> 22; }

/* Everything about the tile that is being computed. */
typedef struct {
  const Plan *plan;
  const Forward *a;
  Scratch *w;
  Rows q;
  int64_t strip_count, part_count;
  float alpha[ROWS], lse[ROWS];
} State;
