/* The interface between the kernels (kernels.c, compiled once per instruction set) and the loops around them. */
#ifndef PPSR_KERNELS_H
#define PPSR_KERNELS_H

#include <stdint.h>

#define LANES 16 /* queries that are worked on together */
#define TILE 96  /* keys that the backward works on together: two tiles of 96 x 16 floats stay in the L1 cache */

/* Attention of one head among the tokens of one group (a window, a piece of one, or a category group). */
struct attention {
    const float *q, *k, *v; /* row of token t at q + t * qkv_stride, ... */
    int64_t qkv_stride;
    const int32_t *token; /* (keys) the members; the first `queries` of them are also the queries */
    int64_t queries, keys, dim;
    float scale;           /* of the logits */
    const float *bias;     /* in units of log 2, or NULL; key j of query block b has 16 floats at bias + bias_start[b] + 16 j */
    const int64_t *bias_start;
    float *out; /* row of token t at out + t * out_stride; the backward reads it */
    int64_t out_stride;
    float *lse; /* log-sum-exp of the logits, at lse[t] */
    float *scratch; /* scratch_floats(keys, dim), aligned to 64 bytes */
    /* the backward alone */
    const float *grad_out;           /* laid out like out */
    float *grad_q, *grad_k, *grad_v; /* laid out like q, k, v: rows of the queries are written */
    float *grad_fill;                /* (keys - queries, 2, dim): gradients of the other keys and values, or NULL */
    float *grad_bias;                /* laid out like bias, in units of 1: added to; or NULL */
    double *grad_scale;              /* set; or NULL */
};

struct kernels {
    void (*forward)(const struct attention *);
    void (*backward)(const struct attention *);
    void (*exp2)(const float *x, float *y, int64_t n); /* for tests; n a multiple of LANES, aligned to 64 bytes */
};

static inline int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* Room for the larger of the two directions. */
static inline int64_t scratch_floats(int64_t keys, int64_t dim) {
    int64_t packed = 2 * padded(keys * dim, LANES);               /* keys, values */
    int64_t forward = (keys + 2 * dim) * LANES;                   /* logits; queries, outputs */
    int64_t rows = padded(dim, LANES) * LANES;                    /* 16 rows of a head */
    int64_t grads = 2 * padded(dim, LANES) * keys;                /* of keys, values */
    int64_t backward = 2 * TILE * LANES + 3 * dim * LANES + 2 * rows + grads;
    return packed + (forward > backward ? forward : backward);
}

#endif
