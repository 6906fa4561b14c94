/* What training.c asks of training_kernels.c, which is compiled once per instruction set. */
#ifndef PPSR_TRAINING_H
#define PPSR_TRAINING_H

#include <stdint.h>

#include "kernels.h"

/* Gradients of linear layers y = GELU(norm(x) W + b) on the same tokens, side by side: `outs` outputs in all. Rows of
 * `wide_in` and `wide_out` floats hold `in` and `outs` of them, filled up with zeros to multiples of 16. */
struct linear_gradient {
    const float *x; /* (tokens, in) */
    int64_t in, wide_in;
    float eps; /* of a LayerNorm in front, whose weights belong into W and b, or -1: none */
    int64_t parts, width[2], outs, wide_out;
    const float *grad[2];       /* (tokens, width), of the loss with respect to y */
    const float *weight;        /* (outs, wide_in) */
    const float *by_in, *bias;  /* (in, wide_out), (wide_out): the same weights and b, to compute what the GELU was given;
                                 * NULL without a GELU */
    float *grad_x;              /* (tokens, in) */
};

/* y = u + GELU(z), z the depthwise convolution of u with zeros around it, one image. */
struct depthwise_gradient {
    const float *u; /* (height, width, channels) */
    int64_t height, width, channels, wide; /* channels filled up to a multiple of 16 */
    int64_t kernel;
    const float *weight, *bias; /* (kernel, kernel, wide), (wide) */
    float *out;         /* forward: like u */
    float *slope;       /* derivative of GELU at z, like u: the forward writes it, the backward reads it */
    const float *grad;  /* backward: like u, of the loss with respect to y */
    float *grad_u;
};

/* Attention between tokens and dictionary, one image: out = P v, P the softmax over the entries of q k / |q|. And the
 * refinement: softmax over the tokens of P, normalised per entry, times x. Rows of `wide_…` floats are filled up with
 * zeros to multiples of 16. */
struct dictionary_gradient {
    int64_t tokens, rank, entries, channels, wide_rank, wide_entries, wide_channels;
    const float *q;                       /* (tokens, rank) */
    const float *k, *k_by_rank;           /* (entries, wide_rank), (rank, wide_entries) in units of log 2 */
    const float *v, *v_by_channel;        /* (entries, wide_channels), (channels, wide_entries) */
    float *out;                           /* (tokens, channels) */
    int64_t *category;                    /* (tokens) */
    float *matrix;                        /* P: (tokens, entries), which the forward of the attention writes */
    const float *grad, *grad_matrix;      /* like out, like P or NULL */
    float *grad_q;
    /* the refinement; `grad` is that of the result, beside `grad_by_channel` laid out like v and v_by_channel */
    const float *x; /* (tokens, channels) */
    const float *grad_by_channel;
    const float *pivot, *slope, *peak; /* (wide_entries): a token weighs 2^(slope (P - pivot) - peak) … */
    const float *share, *along;        /* … times share; the sum of weight times its gradient */
    const float *mean, *factor;        /* P normalised is (P - pivot - mean) factor */
    const float *slant, *scale;        /* second pass: gradient of P = scale (that of the weighing - normalised P slant) */
    float *grad_x, *grad_p;
};

/* Per entry, of d = P - pivot. */
struct dictionary_sums {
    double sum, squares;
    float least, most;
};

struct training_kernels {
    /* Tokens begin … end - 1; adds to `sums` (outs, wide_in), then (wide_out): gradients of W and b. */
    void (*linear)(const struct linear_gradient *, int64_t begin, int64_t end, float *scratch, float *sums);
    /* Rows begin … end - 1. */
    void (*depthwise_forward)(const struct depthwise_gradient *, int64_t begin, int64_t end, float *scratch);
    /* The same; sets `sums` (kernel, kernel, wide), then (wide): gradients of weight and bias. */
    void (*depthwise_backward)(const struct depthwise_gradient *, int64_t begin, int64_t end, float *scratch,
                               float *sums);
    /* Tokens begin … end - 1, and scratch of dictionary_gradient_floats. The attention: */
    void (*attend)(const struct dictionary_gradient *, int64_t begin, int64_t end, float *scratch);
    /* Adds to `sums` (entries, wide_channels), then (entries, wide_rank): gradients of v and of k. */
    void (*attend_backward)(const struct dictionary_gradient *, int64_t begin, int64_t end, float *scratch, float *sums);
    /* The refinement: adds to the sums of d (entries), then to `sums` (entries, wide_channels), weight times x, and
     * (wide_entries), weights alone. */
    void (*moments)(const struct dictionary_gradient *, int64_t begin, int64_t end, struct dictionary_sums *);
    void (*refine)(const struct dictionary_gradient *, int64_t begin, int64_t end, float *scratch, float *sums);
    /* Sets grad_x and, in grad_p, the gradient of what the weighing is of; adds to `sums` (wide_entries) that times the
     * normalised P. The second pass makes it the gradient of P. */
    void (*refine_backward)(const struct dictionary_gradient *, int64_t begin, int64_t end, float *scratch, float *sums);
    void (*normalise_backward)(const struct dictionary_gradient *, int64_t begin, int64_t end);
};

const struct training_kernels *ppsr_training_kernels(void);

/* Tokens that are worked on together: many enough that the sums of the weights' gradients, which are read and written
 * for each stretch, cost little; few enough for the L2 cache. */
#define STRETCH 144
#define COLUMNS 7 /* neighbours in a row that the convolution works on together: 7 sums and 7 weights fit 16 registers */

/* Room for the tokens as they are multiplied, their gradients, those of the outputs, and a factor each. */
static inline int64_t linear_gradient_floats(const struct linear_gradient *l) {
    return STRETCH * (2 * l->wide_in + l->wide_out + 1);
}

/* Room for two maps of so many rows, with what is around them, of 16 channels (VL, at most). */
static inline int64_t depthwise_gradient_floats(const struct depthwise_gradient *d, int64_t rows) {
    return 2 * (rows + d->kernel - 1) * (padded(d->width, COLUMNS) + d->kernel - 1) * LANES;
}

/* Room for two stretches of rows of each kind, and a factor for each token. */
static inline int64_t dictionary_gradient_floats(const struct dictionary_gradient *d) {
    return STRETCH * (2 * (d->wide_rank + d->wide_entries + d->wide_channels) + 1);
}

#endif
