/* The interface between the kernels (*_kernels.c, compiled once per instruction set) and the loops around them. */
#ifndef PPSR_KERNELS_H
#define PPSR_KERNELS_H

#include <stdint.h>

#define LOG2_E 1.44269504088896341

#define LANES 16 /* queries, tokens or outputs that are worked on together */
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
    /* where not all members ask (forward alone): query i is member place[i] of a rectangle of height x width tokens; its
     * bias for the keys of a row lies side by side, see windows.c; or NULL */
    const int32_t *place;
    const float *offsets;
    int64_t height, width, size;
    const uint8_t *pure; /* whether token t asks nothing (backward alone): its row gets zeros; or NULL */
    float *out; /* row of token t at out + t * out_stride; the backward reads it */
    int64_t out_stride;
    float *lse; /* log-sum-exp of the logits, at lse[t]; the forward may have none */
    float *scratch; /* scratch_floats(keys, dim), aligned to 64 bytes */
    /* the backward alone */
    const float *grad_out;           /* laid out like out */
    float *grad_q, *grad_k, *grad_v; /* laid out like q, k, v: rows of the queries are written */
    float *grad_fill;                /* (keys - queries, 2, dim): gradients of the other keys and values, or NULL */
    float *grad_bias;                /* laid out like bias, in units of 1: added to; or NULL */
    double *grad_scale;              /* set; or NULL */
};

#define CHUNK 48 /* tokens that the linear kernel works on together */

/* Linear layers on the same tokens, and what stands beside them: out = GELU(norm(x) W + b) + add[0] + add[1], or, side
 * by side in a row, that and a row of a table, by token. */
struct linear {
    const float *x; /* (tokens, in) */
    int64_t in;
    float eps; /* of a LayerNorm without weights in front (they belong into W and b), or -1: none */
    int gelu;  /* whether there is one */
    int64_t parts;
    const struct part {
        /* (panels, in, 16), (panels, 16): 16 outputs side by side, filled up with zeros; weights went through lay_out */
        const float *weight, *bias;
        int64_t width;              /* outputs */
        const float *add[2];        /* like out, or NULL */
        float *out;                 /* (tokens, stride) */
        int64_t stride;             /* the width, and what else stands in the row of a token in out */
        const uint8_t *only;        /* (tokens), the tokens that are worked on, or NULL: all */
        int stream;                 /* whether to write to memory past the caches: rows begin at multiples of 64 bytes */
    } *part;
    const float *rows; /* (…, columns), what fills up the rows of the first part, or NULL */
    const int64_t *row; /* (tokens), which one */
    int64_t columns;
};

/* Rows of pure tokens: the input normalised, or its mean over 5 x 5, as far as there is a map, or both side by side,
 * through a linear layer (channels or 2 channels -> channels) + add[0] + add[1]; one image. */
struct stand_in {
    const float *x; /* (height, width, channels) */
    int64_t height, width, channels;
    float eps;             /* of the LayerNorm, whose weights are in those of the layer */
    int own, around;       /* what the layer sees: the token, the mean */
    const float *weight, *bias; /* laid out as in struct part */
    const float *add[2]; /* like out, or NULL */
    const uint8_t *pure; /* (height, width) */
    float *out;          /* like x; only rows of pure tokens are written */
};

/* out = u + GELU(depthwise convolution of u + bias), zeros around the map; one image. */
struct depthwise {
    const float *u, *weight, *bias; /* (height, width, channels), (kernel, kernel, channels), (channels) */
    int64_t height, width, channels, kernel;
    float *out;
    int stream; /* as in struct part */
};

/* Similarity of tokens and dictionary: softmax over the entries of q k / |q|; one image. */
struct dictionary {
    const float *q, *k; /* (tokens, rank), (entries, rank): k in units of log 2 */
    int64_t tokens, rank, entries;
    int64_t channels;
    const float *v; /* attention: (panels of 16 channels, entries, 16) */
    float *out;     /* (tokens, channels) */
    int stream;     /* as in struct part */
    int64_t *category;
    const float *x;     /* refinement: (tokens, channels) */
    const float *pivot; /* (entries) the similarity of the first token, which others are measured from: d = sim - pivot.
                         * Lanes without a token count as d = 0, which is therefore between the least and the most */
    const float *slope, *peak; /* (entries) weight of a token: 2^(slope * d - peak), peak the most of slope * d */
};

/* Sums over some tokens, per entry, of d and d * d; the least and the most of d. */
struct moments {
    double sum, squares;
    float least, most;
};

struct attention_kernels {
    void (*forward)(const struct attention *);
    void (*backward)(const struct attention *);
    void (*exp2)(const float *x, float *y, int64_t n); /* for tests; n a multiple of LANES, aligned to 64 bytes */
};

/* On the tokens begin ... end - 1, or on a row of a map. */
struct layer_kernels {
    /* Weights (panels, in, 16) -> as `linear` and `stand_in` read them, in place. */
    void (*lay_out)(int64_t panels, int64_t in, float *weight);
    /* scratch: linear_floats */
    void (*linear)(const struct linear *, int64_t begin, int64_t end, float *scratch);
    void (*depthwise)(const struct depthwise *, int64_t row);
    /* Rows begin ... end - 1 of the map; scratch: stand_in_floats. */
    void (*stand_in)(const struct stand_in *, int64_t begin, int64_t end, float *scratch);
    /* scratch: dictionary_floats */
    void (*attend)(const struct dictionary *, int64_t begin, int64_t end, float *scratch);
    /* Adds to the moments (entries). */
    void (*moments)(const struct dictionary *, int64_t begin, int64_t end, float *scratch, struct moments *);
    /* Adds to `sums` (panels of 16 channels, entries, 16), weight * x, and to `weights` (entries). */
    void (*refine)(const struct dictionary *, int64_t begin, int64_t end, float *scratch, float *sums, float *weights);
};

/* Floats that lie side by side and will be read or written soon. */
static inline void prefetch_floats(const float *x, int64_t floats) {
    for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(x + i, 0, 2);
}

static inline int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* Room for the larger of the two directions. */
static inline int64_t scratch_floats(int64_t keys, int64_t dim) {
    int64_t packed = 2 * padded(keys * dim, LANES) + LANES;       /* keys, values */
    int64_t forward = (keys + 2 * dim) * LANES;                   /* logits; queries, outputs */
    int64_t room = (keys + 1) * (dim + 1) + LANES;                /* for the first two before they become words */
    forward = forward > room ? forward : room;
    int64_t rows = padded(dim, LANES) * LANES;                    /* 16 rows of a head */
    int64_t grads = 2 * padded(dim, LANES) * keys;                /* of keys, values */
    int64_t backward = 2 * TILE * LANES + 3 * dim * LANES + 2 * rows + grads;
    return packed + (forward > backward ? forward : backward);
}

enum { PARTS = 3 }; /* of a linear loop, at most */

/* Room for a chunk normalised, and for those of each part whose turn comes when they are a chunk. */
static inline int64_t linear_floats(int64_t in) { return (1 + PARTS) * CHUNK * in; }

/* Room for five rows of a map and their sum; tokens with their means. */
static inline int64_t stand_in_floats(int64_t width, int64_t channels) {
    return 6 * width * channels + 2 * CHUNK * channels;
}

/* Room for the similarities of 16 tokens and four sums like them, the queries, 16 rows of a panel. */
static inline int64_t dictionary_floats(int64_t rank, int64_t entries) { return (5 * entries + rank + LANES) * LANES; }

#endif
