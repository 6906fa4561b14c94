/* Attention of one head among the tokens of one group, forward and backward, float32.
 *
 * Why it is built this way: head dims are small (12 in ATD-light), so a product that keeps a head in the lanes wastes
 * them. Instead 16 queries sit in the lanes, keys and values are broadcast from memory, and every one of the seven
 * products is the same loop (products.h) with other strides. No matrix is ever transposed, and logits and probabilities (keys x 16) stay
 * in the L1 cache.
 *
 * Logits are kept in units of log 2 (scale and bias arrive multiplied by log2 e), so that the exponential is exp2. */

#include "kernels.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "products.h"

/* Copies rows of a head side by side. */
INLINE void pack(int64_t n, int64_t dim, const float *x, int64_t stride, const int32_t *token, float *packed) {
    for (int64_t j = 0; j < n; j++) memcpy(packed + j * dim, x + token[j] * stride, dim * sizeof(float));
}

/* The same as the products take them. K is summed over the dims: (n, WORDS(dim)). V is summed over rows: (WORDS(n), dim),
 * with room for a vector behind it. `room`: (n + 1, dim + 1), and for a vector. */
INLINE void pack_keys(int64_t n, int64_t dim, const float *x, int64_t stride, const int32_t *token, float *room,
                      float *packed) {
    if (!BFLOAT16) {
        pack(n, dim, x, stride, token, packed);
        return;
    }
    const int64_t even = 2 * WORDS(dim);
    for (int64_t j = 0; j < n; j++) {
        memcpy(room + j * even, x + token[j] * stride, dim * sizeof(float));
        if (dim < even) room[j * even + dim] = 0;
    }
    words_of_line(n * even, room, packed);
}

INLINE void pack_values(int64_t n, int64_t dim, const float *x, int64_t stride, const int32_t *token, float *room,
                        float *packed) {
    pack(n, dim, x, stride, token, BFLOAT16 ? room : packed);
    if (!BFLOAT16) return;
    if (n % 2) memset(room + n * dim, 0, dim * sizeof(float));
    for (int64_t j = 0; j < n; j += 2, room += 2 * dim, packed += dim)
        for (int64_t i = 0; i < dim; i += VL) /* what is written behind the row is the next one's place */
            store_anywhere(packed + i, words_of_rows(load_anywhere(room + i), load_anywhere(room + dim + i)));
}

/* Up to 16 rows of a head -> (dim, 16), times scale; lanes without a row hold zeros. */
INLINE void load_lanes(int64_t n, int64_t dim, const float *x, int64_t stride, const int32_t *token, float scale,
                       float *lanes) {
    if (n < LANES) memset(lanes, 0, dim * LANES * sizeof(float));
    for (int64_t l = 0; l < n; l++)
        for (int64_t i = 0; i < dim; i++) lanes[i * LANES + l] = x[token[l] * stride + i] * scale;
}

/* The same of queries, behind which keys and values lie: there is something to read past the end of a head. */
INLINE void load_queries(int64_t n, int64_t dim, const float *x, int64_t stride, const int32_t *token, float scale,
                         float *lanes) {
    if (2 * dim < VL) {
        load_lanes(n, dim, x, stride, token, scale, lanes);
        return;
    }
    for (int64_t c = 0; c < dim; c += VL)
        EACH(v, NV) {
            vf row[VL];
            EACH(i, VL) {
                row[i] = splat(0);
                if (v * VL + i < n) row[i] = load_anywhere(x + token[v * VL + i] * stride + c) * scale;
            }
            transpose(row);
            EACH(i, VL) if (c + i < dim) store(lanes + (c + i) * LANES + v * VL, row[i]);
        }
}

/* (dim, 16), times a factor for each lane -> up to 16 rows of a head. */
INLINE void store_lanes(int64_t n, int64_t dim, const float *lanes, const vf *factor, float *x, int64_t stride,
                        const int32_t *token) {
    float rows[VL * VL] __attribute__((aligned(64)));
    for (int64_t c = 0; c < dim; c += VL) {
        const int64_t width = dim - c < VL ? dim - c : VL;
        EACH(v, NV) {
            vf row[VL];
            EACH(i, VL) {
                row[i] = splat(0);
                if (i < width) row[i] = load(lanes + (c + i) * LANES + v * VL) * factor[v];
            }
            transpose(row);
            EACH(i, VL) store(rows + i * VL, row[i]);
            for (int64_t l = v * VL; l < n && l < (v + 1) * VL; l++)
                memcpy(x + token[l] * stride + c, rows + l % VL * VL, width * sizeof(float));
        }
    }
}

/* Up to 16 rows of a head -> (dim / 16, 16 rows, 16 channels), filled up with zeros. */
INLINE void load_rows(int64_t n, int64_t dim, const float *x, int64_t stride, const int32_t *token, float *rows) {
    memset(rows, 0, padded(dim, LANES) * LANES * sizeof(float));
    for (int64_t l = 0; l < n; l++)
        for (int64_t i = 0; i < dim; i++)
            rows[((i / LANES) * LANES + l) * LANES + i % LANES] = x[token[l] * stride + i];
}

/* Bias of 16 queries that lie anywhere in a rectangle, for all its keys -> (keys, 16). For one row of keys the biases of
 * a query lie side by side, ascending with the column of the key: they are read by query and transposed. */
INLINE void gather_bias(const struct attention *a, int64_t first, int64_t n, float *bias) {
    const int64_t side = 2 * a->size - 1;
    const float *start[LANES];
    for (int64_t l = 0; l < LANES; l++) {
        const int64_t place = a->place[first + (l < n ? l : 0)];
        start[l] = a->offsets + (place / a->width + a->size - 1) * side + a->size - 1 - place % a->width;
    }
    for (int64_t y = 0; y < a->height; y++, bias += a->width * LANES)
        for (int64_t x = 0; x < a->width; x += VL)
            EACH(v, NV) {
                vf row[VL];
                EACH(i, VL) row[i] = load_anywhere(start[v * VL + i] - y * side + x);
                transpose(row);
                if (x + VL <= a->width)
                    EACH(i, VL) store(bias + (x + i) * LANES + v * VL, row[i]);
                else
                    EACH(i, VL) if (x + i < a->width) store(bias + (x + i) * LANES + v * VL, row[i]);
            }
}

INLINE void forward_of(const struct attention *a, const int64_t dim) {
    const int64_t keys = a->keys, depth = WORDS(dim);
    float *k = a->scratch, *v = k + padded(keys * dim, LANES), *logits = v + padded(keys * dim, LANES) + LANES;
    float *q = logits + keys * LANES, *out = q + dim * LANES;
    pack_keys(keys, dim, a->k, a->qkv_stride, a->token, logits, k);
    pack_values(keys, dim, a->v, a->qkv_stride, a->token, logits, v);
    for (int64_t first = 0; first < a->queries; first += LANES) {
        const int64_t n = a->queries - first < LANES ? a->queries - first : LANES;
        const int32_t *place = a->place ? a->place + first : NULL;
        int32_t token[LANES];
        for (int64_t l = 0; l < n; l++) token[l] = a->token[place ? place[l] : first + l];
        load_queries(n, dim, a->q, a->qkv_stride, token, a->scale * (float)LOG2_E, q);
        if (BFLOAT16) words_of_panel(dim, q, q);
        const int64_t block = place ? place[0] / LANES : first / LANES; /* that they are, if they are neighbours */
        if (place && (place[0] % LANES || place[n - 1] - place[0] != n - 1)) {
            gather_bias(a, first, n, logits);
            product_of(BFLOAT16, keys, depth, q, k, depth, 1, logits, logits);
        } else if (a->bias)
            product_of(BFLOAT16, keys, depth, q, k, depth, 1, a->bias + a->bias_start[block], logits);
        else
            product_of(BFLOAT16, keys, depth, q, k, depth, 1, NULL, logits);

        vf peak[IN_STEP], sum[NV]; /* several peaks of a lane, so that one need not wait for the other */
        EACH(i, IN_STEP) peak[i] = splat(-INFINITY);
        EACH(v, NV) sum[v] = splat(0);
        int64_t j = 0;
        for (; j + IN_STEP / NV <= keys; j += IN_STEP / NV)
            EACH(i, IN_STEP) peak[i] = vmax(load(logits + j * LANES + i * VL), peak[i]);
        for (; j < keys; j++) EACH(v, NV) peak[v] = vmax(load(logits + j * LANES + v * VL), peak[v]);
        EACH(i, IN_STEP - NV) peak[i % NV] = vmax(peak[i + NV], peak[i % NV]);
        j = 0;
        if (BFLOAT16 && NV == 1)
            for (; j + IN_STEP <= keys; j += IN_STEP)
                exponentials_to(1, IN_STEP, logits + j * LANES, peak, sum, logits + j / 2 * LANES);
        const int64_t rest = j;
        for (; j + IN_STEP / NV <= keys; j += IN_STEP / NV) exponentials(IN_STEP, logits + j * LANES, peak, sum);
        for (; j < keys; j++) exponentials(NV, logits + j * LANES, peak, sum);
        if (BFLOAT16) words_of_panel(keys - rest, logits + rest * LANES, logits + rest / 2 * LANES);
        product_of(BFLOAT16, dim, WORDS(keys), logits, v, 1, dim, NULL, out);

        if (a->lse) {
            float lse[LANES] __attribute__((aligned(64)));
            EACH(v, NV) store(lse + v * VL, (peak[v] + log2v(sum[v])) * (float)(1 / LOG2_E));
            for (int64_t l = 0; l < n; l++) a->lse[token[l]] = lse[l];
        }
        EACH(v, NV) sum[v] = 1.0f / sum[v];
        store_lanes(n, dim, out, sum, a->out, a->out_stride, token);
    }
}

/* `count` vectors of logits p -> probabilities, of their gradients ds -> gradients of the logits, added to the sums. */
INLINE void slopes(int count, float *p, float *ds, const float *lse, const float *delta, float *sums) {
    vf x[IN_STEP];
    /* never above 0: logits so large that rounding moves them past their log-sum-exp must not overflow */
    EACH(i, count) x[i] = vmin(splat(0), load(p + i * VL) - load(lse + i % NV * VL));
    exp2_in_step(count, x);
    EACH(i, count) store(p + i * VL, x[i]);
    EACH(i, count) x[i] *= load(ds + i * VL) - load(delta + i % NV * VL);
    EACH(i, count) store(ds + i * VL, x[i]);
    if (sums) EACH(i, count) store(sums + i * VL, load(sums + i * VL) + x[i]);
}

INLINE void backward_of(const struct attention *a, const int64_t dim) {
    const int64_t keys = a->keys, panels = padded(dim, LANES) / LANES, panel = keys * LANES;
    const int64_t rows = panels * LANES * LANES;
    float *k = a->scratch, *v = k + padded(keys * dim, LANES), *p = v + padded(keys * dim, LANES);
    float *ds = p + TILE * LANES; /* gradient of the logits */
    float *q = ds + TILE * LANES, *dout = q + dim * LANES, *dq = dout + dim * LANES; /* (dim, 16 queries) */
    float *q_rows = dq + dim * LANES, *dout_rows = q_rows + rows;                    /* (panels, 16 queries, 16) */
    float *dk = dout_rows + rows, *dv = dk + panels * panel;                         /* (panels, keys, 16) */
    double grad_scale = 0;
    pack(keys, dim, a->k, a->qkv_stride, a->token, k);
    pack(keys, dim, a->v, a->qkv_stride, a->token, v);
    memset(dk, 0, 2 * panels * panel * sizeof(float));
    for (int64_t first = 0; first < a->queries; first += LANES) {
        const int64_t n = a->queries - first < LANES ? a->queries - first : LANES;
        const int32_t *token = a->token + first;
        load_lanes(n, dim, a->q, a->qkv_stride, token, a->scale * (float)LOG2_E, q);
        load_lanes(n, dim, a->grad_out, a->out_stride, token, 1, dout);
        load_rows(n, dim, a->q, a->qkv_stride, token, q_rows);
        load_rows(n, dim, a->grad_out, a->out_stride, token, dout_rows);
        int64_t asking = n;
        for (int64_t l = 0; a->pure && l < n; l++)
            if (a->pure[token[l]]) { /* as if there were no such query */
                asking--;
                for (int64_t i = 0; i < dim; i++) {
                    q[i * LANES + l] = dout[i * LANES + l] = 0;
                    q_rows[((i / LANES) * LANES + l) * LANES + i % LANES] = 0;
                    dout_rows[((i / LANES) * LANES + l) * LANES + i % LANES] = 0;
                    a->grad_q[token[l] * a->qkv_stride + i] = 0;
                }
            }
        if (!asking) continue;
        memset(dq, 0, dim * LANES * sizeof(float));
        float lse[LANES] __attribute__((aligned(64))), delta[LANES] __attribute__((aligned(64)));
        for (int l = 0; l < LANES; l++) {
            /* probability 0 where there is no query */
            lse[l] = l < n && !(a->pure && a->pure[token[l]]) ? a->lse[token[l]] * (float)LOG2_E : 1e30f;
            delta[l] = 0;
        }
        for (int64_t l = 0; l < n; l++)
            for (int64_t i = 0; i < dim && !(a->pure && a->pure[token[l]]); i++)
                delta[l] += a->grad_out[token[l] * a->out_stride + i] * a->out[token[l] * a->out_stride + i];

        const float *bias = a->bias ? a->bias + a->bias_start[first / LANES] : NULL;
        float *grad_bias = a->grad_bias ? a->grad_bias + a->bias_start[first / LANES] : NULL;
        for (int64_t j = 0; j < keys; j += TILE) {
            const int64_t m = keys - j < TILE ? keys - j : TILE;
            if (bias)
                product(m, dim, q, k + j * dim, dim, 1, bias + j * LANES, p);
            else
                product(m, dim, q, k + j * dim, dim, 1, NULL, p);
            product(m, dim, dout, v + j * dim, dim, 1, NULL, ds);
            float *sums = grad_bias ? grad_bias + j * LANES : NULL;
            int64_t i = 0;
            for (; i + IN_STEP / NV <= m; i += IN_STEP / NV)
                slopes(IN_STEP, p + i * LANES, ds + i * LANES, lse, delta, sums ? sums + i * LANES : NULL);
            for (; i < m; i++) slopes(NV, p + i * LANES, ds + i * LANES, lse, delta, sums ? sums + i * LANES : NULL);
            product(dim, m, ds, k + j * dim, 1, dim, dq, dq);
            for (int64_t c = 0; c < panels; c++) {
                float *dk_tile = dk + c * panel + j * LANES, *dv_tile = dv + c * panel + j * LANES;
                product(m, LANES, q_rows + c * LANES * LANES, ds, LANES, 1, dk_tile, dk_tile);
                product(m, LANES, dout_rows + c * LANES * LANES, p, LANES, 1, dv_tile, dv_tile);
            }
        }
        for (int64_t l = 0; l < n; l++) {
            if (a->pure && a->pure[token[l]]) continue;
            float *row = a->grad_q + token[l] * a->qkv_stride, dot = 0;
            for (int64_t i = 0; i < dim; i++) {
                dot += dq[i * LANES + l] * a->q[token[l] * a->qkv_stride + i];
                row[i] = dq[i * LANES + l] * a->scale;
            }
            grad_scale += dot;
        }
    }
    for (int64_t j = 0; j < keys; j++) {
        const int own = j < a->queries;
        float *to_k = own ? a->grad_k + a->token[j] * a->qkv_stride : a->grad_fill + (j - a->queries) * 2 * dim;
        float *to_v = own ? a->grad_v + a->token[j] * a->qkv_stride : to_k + dim;
        for (int64_t i = 0; i < dim; i++) {
            const int64_t at = (i / LANES) * panel + j * LANES + i % LANES;
            to_k[i] = dk[at] * a->scale;
            to_v[i] = dv[at];
        }
    }
    if (a->grad_scale) *a->grad_scale = grad_scale;
}

/* The head dims of ATD-light and of its second version get code of their own, where they are constants: no loops over
 * them, no address arithmetic. */
static void forward(const struct attention *a) {
    if (a->dim == 12)
        forward_of(a, 12);
    else if (a->dim == 16)
        forward_of(a, 16);
    else
        forward_of(a, a->dim);
}

static void backward(const struct attention *a) {
    if (a->dim == 12)
        backward_of(a, 12);
    else if (a->dim == 16)
        backward_of(a, 16);
    else
        backward_of(a, a->dim);
}

static void exp2_array(const float *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) store(y + i, exp2v(load(x + i)));
}

const struct attention_kernels FOR_TARGET(ppsr_attention_kernels_) = {forward, backward, exp2_array};
