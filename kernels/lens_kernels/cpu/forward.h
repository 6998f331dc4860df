/* What the two forward passes share: the caller's outputs, and the largest of a row of blocks. */
#pragma once

#include "work.h"

typedef struct {
  Inputs in;
  /* Outputs are float32 and contiguous but for the first; NULL: not wanted. */
  float *output; /* [batch, queries, heads, value_dim], as models go on with it */
  float *lse, *max_logit, *entropy, *concentration, *distance; /* [batch, heads, queries] */
  float *block_mass, *block_max, *block_max_logit, *block_weighted; /* [batch, heads, query_blocks, key_blocks] */
  const float *key_weights; /* [batch, heads, keys], for block_weighted */
  int64_t top_k;
  int64_t *top_keys; /* [batch, heads, query_blocks, top_k] */
  float *top_mass;
  float *received; /* [batch, heads, keys] */
  float *diagonal; /* [batch, heads, distances], entry t: distance t + first_distance */
  int64_t first_distance, distances;
  int64_t features;
  const float *features_of_keys; /* [features, batch, kv_heads, keys]: sum_j P_ij f_j */
  float *feature_means;          /* [features, batch, heads, queries] */
  int64_t pairs;
  const int32_t *query_labels, *key_labels; /* [pairs, batch, queries], [pairs, batch, keys] */
  float *match_mass;                        /* [batch, heads, queries, pairs] */
  int64_t groups;
  const int32_t *group_of_key; /* [batch, keys] */
  float *group_output;         /* [groups, batch, heads, queries, value_dim] */
  float *group_lse, *group_max_logit, *group_entropy, *group_concentration, *group_distance; /* [groups, batch, heads, queries] */
  float *mean_value_norm;      /* [batch, heads, queries]; by lens_decode alone */
  int64_t few;                 /* few queries: lens_decode does it; no groups, no blocks */
  int64_t *infinite;           /* becomes 1 where a query, key or value is not finite; with few, where a product q.k is not */
} Forward;

int lens_decode(const Forward *a);

/* The output of a row of [batch, heads, queries]. */
static inline float *output_of(const Forward *a, int64_t row) {
  const Inputs *in = &a->in;
  int64_t query = row % in->queries, head = row / in->queries % in->heads, batch = row / in->queries / in->heads;
  return a->output + ((batch * in->queries + query) * in->heads + head) * in->value_dim;
}

/* The k largest of a row of block masses, strongest first, ties by lower index. */
static inline void strongest(const float *mass, int64_t blocks, int64_t k, int64_t *keys, float *top) {
  int64_t found = 0;
  for (int64_t i = 0; i < blocks; i++) {
    if (found == k && !(mass[i] > top[k - 1])) continue;
    int64_t at = found < k ? found++ : k - 1;
    for (; at > 0 && mass[i] > top[at - 1]; at--) top[at] = top[at - 1], keys[at] = keys[at - 1];
    top[at] = mass[i], keys[at] = i;
  }
}
