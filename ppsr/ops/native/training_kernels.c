/* Gradients of what stands between the attentions, float32: linear layers with LayerNorm and GELU, and the depthwise
 * convolution. Few tokens, or a strip of a map, are worked on from the first step to the last while they are in the
 * cache; what would be cheap to compute again (the normalised tokens, what a GELU was given) is not kept in memory. */

#include "training.h"

#include <math.h>
#include <string.h>

#include "products.h"

/* The derivative of GELU, Phi(x) + x phi(x), and GELU itself where it is wanted. */
INLINE vf gelu_slope(vf x, vf *value) {
    const vf end = splat(5.5f), c = vmin(end, vmax(-end, x)), s = c * c;
    vf p = splat(PHI_P[0]), q = splat(PHI_Q[0]);
    EACH(i, 5) p = p * s + PHI_P[i + 1], q = q * s + PHI_Q[i + 1];
    const vf phi = (vf)((vi)(0.5f + c * p / q) & ~(vi)(x < -end));
    if (value) *value = x * phi;
    return phi + x * (0.398942280f * exp2v(x * x * (float)(-0.5 * LOG2_E)));
}

/* --- linear layers ------------------------------------------------------------------------------------------------ */

/* Rows and columns of a product that stay in registers: `panels` of 16 columns. */
INLINE void tile(int rows, int panels, int64_t depth, const float *a, int64_t a_step, const float *b, int64_t row_step,
                 int64_t depth_step, const float *start, float *c, int64_t c_step) {
    const int vectors = panels * NV;
    vf sum[BLOCK][3 * NV];
    EACH(i, rows)
        EACH(v, vectors) sum[i][v] = load((start ? start : c + i * c_step) + v * VL);
    for (int64_t k = 0; k < depth; k++) {
        vf x[3 * NV];
        EACH(v, vectors) x[v] = load(a + k * a_step + v * VL);
        EACH(i, rows) {
            const float y = b[i * row_step + k * depth_step];
            EACH(v, vectors) sum[i][v] += x[v] * y;
        }
    }
    EACH(i, rows)
        EACH(v, vectors) store(c + i * c_step + v * VL, sum[i][v]);
}

INLINE void tiles(int block, int panels, int64_t rows, int64_t depth, const float *a, int64_t a_step, const float *b,
                  int64_t row_step, int64_t depth_step, const float *start, float *c, int64_t c_step) {
    int64_t i = 0;
    for (; i + block <= rows; i += block)
        tile(block, panels, depth, a, a_step, b + i * row_step, row_step, depth_step, start, c + i * c_step, c_step);
#pragma GCC unroll 4
    for (int step = 8; step; step /= 2) /* the rest in powers of two, to keep several accumulators going */
        if (step < block)
            for (; rows - i >= step; i += step)
                tile(step, panels, depth, a, a_step, b + i * row_step, row_step, depth_step, start, c + i * c_step, c_step);
}

/* C(i) = start, or C(i) itself for NULL, + sum_k A(k) * b(i, k): rows A(k) and C(i) of `wide` floats, aligned, a multiple
 * of 16 and as far apart; b at any distances. */
INLINE void product_rows(int64_t rows, int64_t depth, const float *a, int64_t wide, const float *b, int64_t row_step,
                         int64_t depth_step, const float *start, float *c) {
    int64_t i = 0;
#if VL == 16 /* with 32 registers what is loaded once is used in more products */
    for (int64_t left = wide / LANES; left > 1; left = (wide - i) / LANES) {
        const float *from = start ? start + i : NULL;
        if (left == 3 || left > 4) {
            tiles(8, 3, rows, depth, a + i, wide, b, row_step, depth_step, from, c + i, wide);
            i += 3 * LANES;
        } else {
            tiles(BLOCK, 2, rows, depth, a + i, wide, b, row_step, depth_step, from, c + i, wide);
            i += 2 * LANES;
        }
    }
#endif
    for (; i < wide; i += LANES)
        tiles(BLOCK, 1, rows, depth, a + i, wide, b, row_step, depth_step, start ? start + i : NULL, c + i, wide);
}

/* Sum over the elements of a vector, and the largest. */
INLINE float across(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    for (int v = 0; v < VL; v++) sum += x[v];
    return sum;
#endif
}

INLINE float largest(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int v = 1; v < VL; v++) most = x[v] > most ? x[v] : most;
    return most;
#endif
}

INLINE void set_zero(float *x, int64_t floats) { memset(x, 0, floats * sizeof(float)); }

/* Rows of `n` floats -> rows of `wide` floats, zeros behind them; and back. */
INLINE void widen(int64_t rows, int64_t n, int64_t wide, const float *from, float *to) {
    for (int64_t t = 0; t < rows; t++, from += n, to += wide) {
        memcpy(to, from, n * sizeof(float));
        for (int64_t i = n; i < wide; i++) to[i] = 0;
    }
}

INLINE void narrow(int64_t rows, int64_t n, int64_t wide, const float *from, float *to) {
    for (int64_t t = 0; t < rows; t++, from += wide, to += n) memcpy(to, from, n * sizeof(float));
}

/* widen(), or the rows where they are if they can be used as they are. */
INLINE const float *as_rows(int64_t rows, int64_t n, int64_t wide, const float *from, float *to) {
    if (n == wide && (uintptr_t)from % (LANES * sizeof(float)) == 0) return from;
    widen(rows, n, wide, from, to);
    return to;
}

/* `n` rows of x, normalised -> rows of `wide` floats, and what they were multiplied by. */
INLINE void normalise_rows(const struct linear_gradient *l, int64_t n, const float *x, float *rows, float *factor) {
    const int64_t in = l->in, wide = l->wide_in;
    const float share = 1 / (float)in;
    for (int64_t t = 0; t < n; t++, x += in, rows += wide) {
        widen(1, in, wide, x, rows);
        vf total = splat(0), squares = splat(0);
        for (int64_t i = 0; i < wide; i += VL) total += load(rows + i);
        const float mean = across(total) * share;
        for (int64_t i = 0; i < wide; i += VL) store(rows + i, load(rows + i) - mean);
        for (int64_t i = in; i < wide; i++) rows[i] = 0;
        for (int64_t i = 0; i < wide; i += VL) squares += load(rows + i) * load(rows + i);
        factor[t] = 1 / sqrtf(across(squares) * share + l->eps);
        for (int64_t i = 0; i < wide; i += VL) store(rows + i, load(rows + i) * factor[t]);
    }
}

/* Gradients of the outputs of a stretch, side by side and before the GELU. */
INLINE const float *take_gradients(const struct linear_gradient *l, int64_t first, int64_t n, const float *x, float *dz) {
    const int64_t wide = l->wide_out;
    if (l->parts == 1 && !l->by_in) return as_rows(n, l->outs, wide, l->grad[0] + first * l->outs, dz);
    if (l->by_in) {
        product_rows(n, l->in, l->by_in, wide, x, l->wide_in, 1, l->bias, dz);
        for (int64_t i = 0; i < n * wide; i += VL) store(dz + i, gelu_slope(load(dz + i), NULL));
    }
    for (int64_t t = 0; t < n; t++) {
        float *row = dz + t * wide;
        for (int64_t p = 0; p < l->parts; row += l->width[p++]) {
            const float *grad = l->grad[p] + (first + t) * l->width[p];
            if (l->by_in)
                for (int64_t o = 0; o < l->width[p]; o++) row[o] *= grad[o];
            else
                memcpy(row, grad, l->width[p] * sizeof(float));
        }
        for (; row < dz + (t + 1) * wide; row++) *row = 0;
    }
    return dz;
}

static void linear(const struct linear_gradient *l, int64_t begin, int64_t end, float *scratch, float *sums) {
    const int64_t in = l->in, wide_in = l->wide_in, wide_out = l->wide_out;
    float *rows = scratch, *dx = rows + STRETCH * wide_in, *outputs = dx + STRETCH * wide_in;
    float *factor = outputs + STRETCH * wide_out, *bias = sums + l->outs * wide_in;
    for (int64_t first = begin; first < end; first += STRETCH) {
        const int64_t n = end - first < STRETCH ? end - first : STRETCH;
        const float *x = rows;
        if (l->eps >= 0)
            normalise_rows(l, n, l->x + first * in, rows, factor);
        else
            x = as_rows(n, in, wide_in, l->x + first * in, rows);
        const float *dz = take_gradients(l, first, n, x, outputs);
        for (int64_t o = 0; o < wide_out; o += VL) {
            vf sum = load(bias + o);
            for (int64_t t = 0; t < n; t++) sum += load(dz + t * wide_out + o);
            store(bias + o, sum);
        }
        product_rows(l->outs, n, x, wide_in, dz, 1, wide_out, NULL, sums);
        set_zero(dx, n * wide_in);
        product_rows(n, l->outs, l->weight, wide_in, dz, wide_out, 1, NULL, dx);
        if (l->eps >= 0) /* what changes the mean or the length of a row is lost in the norm */
            for (int64_t t = 0; t < n; t++) {
                float *d = dx + t * wide_in;
                vf total = splat(0), along = splat(0);
                for (int64_t i = 0; i < wide_in; i += VL) total += load(d + i), along += load(d + i) * load(x + t * wide_in + i);
                const float mean = across(total) / (float)in, slope = across(along) / (float)in;
                for (int64_t i = 0; i < wide_in; i += VL)
                    store(d + i, (load(d + i) - mean - load(x + t * wide_in + i) * slope) * factor[t]);
            }
        narrow(n, in, wide_in, dx, l->grad_x + first * in);
    }
}

/* --- depthwise convolution ---------------------------------------------------------------------------------------- */

/* The VL channels from a place on, of which `n` exist. */
INLINE vf load_some(const float *p, int64_t n) {
    if (n >= VL) return load_anywhere(p);
    vf x = splat(0);
    for (int64_t i = 0; i < n; i++) x[i] = p[i];
    return x;
}

INLINE void store_some(float *p, vf x, int64_t n) {
    if (n >= VL)
        store_anywhere(p, x);
    else
        for (int64_t i = 0; i < n; i++) p[i] = x[i];
}

/* Length of a row with what is around it, in vectors; columns beyond the map are worked on, too, and are zeros. */
INLINE int64_t row_length(const struct depthwise_gradient *d) { return padded(d->width, COLUMNS) + d->kernel - 1; }

/* VL channels from c on of the rows begin … end - 1 of a map and of those around them -> side by side, zeros around the
 * map; each times its factor, if there are any. */
INLINE void cut_out(const struct depthwise_gradient *d, const float *map, const float *factor, int64_t begin,
                    int64_t end, int64_t c, vf *to) {
    const int64_t half = d->kernel / 2, length = row_length(d), n = d->channels - c;
    for (int64_t y = begin - half; y < end + half; y++, to += length) {
        const int outside = y < 0 || y >= d->height;
        const int64_t stop = outside ? half : half + d->width;
        for (int64_t x = 0; x < half; x++) to[x] = splat(0);
        for (int64_t x = half; x < stop; x++) {
            const int64_t at = (y * d->width + x - half) * d->channels + c;
            to[x] = load_some(map + at, n);
            if (factor) to[x] *= load_some(factor + at, n);
        }
        for (int64_t x = stop; x < length; x++) to[x] = splat(0);
    }
}

/* Sums of COLUMNS neighbours over their neighbourhood, which begins at `map`; weights `step` apart. */
INLINE void convolve(int64_t kernel, const vf *map, int64_t length, const float *weight, int64_t step,
                     vf sum[COLUMNS]) {
    for (int64_t ky = 0; ky < kernel; ky++, map += length, weight += kernel * step) {
        if (kernel <= COLUMNS) {
            vf w[COLUMNS];
            EACH(k, kernel) w[k] = load(weight + k * step);
            EACH(j, COLUMNS + kernel - 1)
                EACH(i, COLUMNS)
                    if (j >= i && j - i < kernel) sum[i] += map[j] * w[j - i];
        } else {
            for (int64_t k = 0; k < kernel; k++)
                EACH(i, COLUMNS) sum[i] += map[i + k] * load(weight + k * step);
        }
    }
}

/* Sums over rows and columns of gradient times neighbour, for each place of the kernel. */
INLINE void correlate(int64_t kernel, const vf *map, const vf *grad, int64_t rows, int64_t length, float *sums,
                      int64_t step) {
    const int64_t half = kernel / 2;
    grad += half * length + half; /* the first that is not around the map */
    for (int64_t ky = 0; ky < kernel; ky++)
        if (kernel <= COLUMNS) {
            vf sum[COLUMNS];
            EACH(k, kernel) sum[k] = splat(0);
            for (int64_t y = 0; y < rows; y++)
                for (int64_t x = 0; x < length - kernel + 1; x += COLUMNS) {
                    const vf *near = map + (y + ky) * length + x;
                    vf g[COLUMNS];
                    EACH(i, COLUMNS) g[i] = grad[y * length + x + i];
                    EACH(j, COLUMNS + kernel - 1)
                        EACH(i, COLUMNS)
                            if (j >= i && j - i < kernel) sum[j - i] += near[j] * g[i];
                }
            EACH(k, kernel) store(sums + (ky * kernel + k) * step, sum[k]);
        } else {
            for (int64_t k = 0; k < kernel; k++) {
                vf sum = splat(0);
                for (int64_t y = 0; y < rows; y++)
                    for (int64_t x = 0; x < length - kernel + 1; x++)
                        sum += map[(y + ky) * length + x + k] * grad[y * length + x];
                store(sums + (ky * kernel + k) * step, sum);
            }
        }
}

INLINE void forward_strip(const struct depthwise_gradient *d, int64_t kernel, int64_t begin, int64_t end, vf *map) {
    const int64_t half = kernel / 2, length = row_length(d);
    for (int64_t c = 0; c < d->channels; c += VL) {
        const int64_t n = d->channels - c;
        cut_out(d, d->u, NULL, begin, end, c, map);
        for (int64_t y = begin; y < end; y++)
            for (int64_t x = 0; x < d->width; x += COLUMNS) {
                const vf *near = map + (y - begin) * length + x;
                vf sum[COLUMNS];
                EACH(i, COLUMNS) sum[i] = load(d->bias + c);
                convolve(kernel, near, length, d->weight + c, d->wide, sum);
                for (int64_t i = 0; i < COLUMNS && x + i < d->width; i++) {
                    const int64_t at = (y * d->width + x + i) * d->channels + c;
                    vf value;
                    const vf slope = gelu_slope(sum[i], &value);
                    store_some(d->out + at, near[half * length + half + i] + value, n);
                    store_some(d->slope + at, slope, n);
                }
            }
    }
}

INLINE void backward_strip(const struct depthwise_gradient *d, int64_t kernel, int64_t begin, int64_t end, vf *map,
                           float *sums) {
    const int64_t half = kernel / 2, length = row_length(d), taps = kernel * kernel;
    vf *grad = map + (end - begin + kernel - 1) * length;
    for (int64_t c = 0; c < d->channels; c += VL) {
        const int64_t n = d->channels - c;
        cut_out(d, d->u, NULL, begin, end, c, map);
        cut_out(d, d->grad, d->slope, begin, end, c, grad);
        correlate(kernel, map, grad, end - begin, length, sums + c, d->wide);
        vf total = splat(0);
        for (int64_t y = 0; y < end - begin; y++)
            for (int64_t x = 0; x < d->width; x++) total += grad[(half + y) * length + half + x];
        store(sums + taps * d->wide + c, total);
        for (int64_t y = begin; y < end; y++)
            for (int64_t x = 0; x < d->width; x += COLUMNS) {
                vf sum[COLUMNS];
                EACH(i, COLUMNS) sum[i] = splat(0);
                convolve(kernel, grad + (y - begin) * length + x, length, d->weight + c, d->wide, sum);
                for (int64_t i = 0; i < COLUMNS && x + i < d->width; i++) {
                    const int64_t at = (y * d->width + x + i) * d->channels + c;
                    store_some(d->grad_u + at, load_some(d->grad + at, n) + sum[i], n);
                }
            }
    }
}

static void depthwise_forward(const struct depthwise_gradient *d, int64_t begin, int64_t end, float *scratch) {
    if (d->kernel == 7)
        forward_strip(d, 7, begin, end, (vf *)scratch);
    else if (d->kernel == 5)
        forward_strip(d, 5, begin, end, (vf *)scratch);
    else if (d->kernel == 3)
        forward_strip(d, 3, begin, end, (vf *)scratch);
    else /* of any size, one place after the other */
        forward_strip(d, d->kernel, begin, end, (vf *)scratch);
}

static void depthwise_backward(const struct depthwise_gradient *d, int64_t begin, int64_t end, float *scratch,
                               float *sums) {
    if (d->kernel == 7)
        backward_strip(d, 7, begin, end, (vf *)scratch, sums);
    else if (d->kernel == 5)
        backward_strip(d, 5, begin, end, (vf *)scratch, sums);
    else if (d->kernel == 3)
        backward_strip(d, 3, begin, end, (vf *)scratch, sums);
    else
        backward_strip(d, d->kernel, begin, end, (vf *)scratch, sums);
}

/* --- tokens and dictionary ---------------------------------------------------------------------------------------- */

/* C = A B, or C += A B, with B (depth, wide), C (rows, wide), A (rows, a_wide). */
INLINE void rows_times(int64_t rows, int64_t depth, const float *a, int64_t a_wide, const float *b, int64_t wide,
                       int adds, float *c) {
    if (!adds) set_zero(c, rows * wide);
    product_rows(rows, depth, b, wide, a, a_wide, 1, NULL, c);
}

/* C += A' B with A (depth, a_wide), of which `rows` columns count, B (depth, wide), C (rows, wide). */
INLINE void add_outer(int64_t rows, int64_t depth, const float *a, int64_t a_wide, const float *b, int64_t wide,
                      float *c) {
    product_rows(rows, depth, b, wide, a, 1, a_wide, NULL, c);
}

static const float SHORTEST = 1e-12f; /* of torch.nn.functional.normalize */

/* Queries of length 1, and what they were multiplied by; negative where they are too short for that. */
INLINE void take_queries(const struct dictionary_gradient *d, int64_t first, int64_t n, float *q, float *factor) {
    widen(n, d->rank, d->wide_rank, d->q + first * d->rank, q);
    for (int64_t t = 0; t < n; t++, q += d->wide_rank) {
        vf squares = splat(0);
        for (int64_t i = 0; i < d->wide_rank; i += VL) squares += load(q + i) * load(q + i);
        const float length = sqrtf(across(squares));
        const float f = 1 / (length < SHORTEST ? SHORTEST : length);
        for (int64_t i = 0; i < d->wide_rank; i += VL) store(q + i, load(q + i) * f);
        factor[t] = length < SHORTEST ? -f : f;
    }
}

static const float COUNT[LANES] __attribute__((aligned(64))) = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* The first element of a row that is `peak`. */
INLINE int64_t place_of(const float *row, int64_t wide, float peak) {
    vf first = splat(-INFINITY); /* less the place */
    for (int64_t m = 0; m < wide; m += VL) {
        const vi hit = load(row + m) == peak;
        const vf place = -(load(COUNT + m % LANES) + (float)(m / LANES * LANES));
        first = vmax(first, (vf)(((vi)place & hit) | ((vi)splat(-INFINITY) & ~hit)));
    }
    const float place = -largest(first);
    return place < (float)wide ? (int64_t)place : 0; /* none: NaN */
}

static void attend(const struct dictionary_gradient *d, int64_t begin, int64_t end, float *scratch) {
    const int64_t wide = d->wide_entries, entries = d->entries;
    float *q = scratch, *p = q + STRETCH * d->wide_rank, *out = p + STRETCH * wide;
    float *factor = out + STRETCH * d->wide_channels;
    for (int64_t first = begin; first < end; first += STRETCH) {
        const int64_t n = end - first < STRETCH ? end - first : STRETCH;
        take_queries(d, first, n, q, factor);
        rows_times(n, d->rank, q, d->wide_rank, d->k_by_rank, wide, 0, p);
        for (int64_t t = 0; t < n; t++) {
            float *row = p + t * wide;
            for (int64_t m = entries; m < wide; m++) row[m] = -INFINITY;
            vf peaks = load(row), total = splat(0);
            for (int64_t m = VL; m < wide; m += VL) peaks = vmax(peaks, load(row + m));
            const float peak = largest(peaks);
            d->category[first + t] = place_of(row, wide, peak);
            for (int64_t m = 0; m < wide; m += VL) {
                const vf x = exp2v(load(row + m) - peak);
                store(row + m, x);
                total += x;
            }
            const float share = 1 / across(total);
            for (int64_t m = 0; m < wide; m += VL) store(row + m, load(row + m) * share);
        }
        narrow(n, entries, wide, p, d->matrix + first * entries);
        rows_times(n, entries, p, wide, d->v, d->wide_channels, 0, out);
        narrow(n, d->channels, d->wide_channels, out, d->out + first * d->channels);
    }
}

static void attend_backward(const struct dictionary_gradient *d, int64_t begin, int64_t end, float *scratch,
                            float *sums) {
    const int64_t wide = d->wide_entries, entries = d->entries, wide_rank = d->wide_rank;
    float *q = scratch, *dq = q + STRETCH * wide_rank, *rows = dq + STRETCH * wide_rank, *dp = rows + STRETCH * wide;
    float *grads = dp + STRETCH * wide, *factor = grads + STRETCH * d->wide_channels;
    float *to_k = sums + entries * d->wide_channels;
    for (int64_t first = begin; first < end; first += STRETCH) {
        const int64_t n = end - first < STRETCH ? end - first : STRETCH;
        take_queries(d, first, n, q, factor);
        const float *p = as_rows(n, entries, wide, d->matrix + first * entries, rows);
        const float *grad = as_rows(n, d->channels, d->wide_channels, d->grad + first * d->channels, grads);
        if (d->grad_matrix) widen(n, entries, wide, d->grad_matrix + first * entries, dp);
        rows_times(n, d->channels, grad, d->wide_channels, d->v_by_channel, wide, d->grad_matrix != NULL, dp);
        add_outer(entries, n, p, wide, grad, d->wide_channels, sums);
        for (int64_t t = 0; t < n; t++) { /* before the softmax */
            const float *row = p + t * wide;
            float *drow = dp + t * wide;
            vf along = splat(0);
            for (int64_t m = 0; m < wide; m += VL) along += load(row + m) * load(drow + m);
            const float sum = across(along);
            for (int64_t m = 0; m < wide; m += VL) store(drow + m, load(row + m) * (load(drow + m) - sum));
        }
        add_outer(entries, n, dp, wide, q, wide_rank, to_k);
        rows_times(n, entries, dp, wide, d->k, wide_rank, 0, dq);
        for (int64_t t = 0; t < n; t++) { /* before the normalisation: what changes the length is lost */
            const float *row = q + t * wide_rank;
            float *drow = dq + t * wide_rank, f = factor[t];
            vf along = splat(0);
            for (int64_t i = 0; i < wide_rank; i += VL) along += load(row + i) * load(drow + i);
            const float lost = f < 0 ? 0 : across(along);
            f = f < 0 ? -f : f;
            for (int64_t i = 0; i < wide_rank; i += VL) store(drow + i, (load(drow + i) - load(row + i) * lost) * f);
        }
        narrow(n, d->rank, wide_rank, dq, d->grad_q + first * d->rank);
    }
}

static void moments(const struct dictionary_gradient *d, int64_t begin, int64_t end, struct dictionary_sums *sums) {
    const int64_t entries = d->entries;
    for (int64_t m = 0; m < entries; m += VL) {
        const int64_t count = entries - m;
        const vf pivot = load(d->pivot + m);
        for (int64_t first = begin; first < end; first += STRETCH) {
            const int64_t last = end - first < STRETCH ? end : first + STRETCH;
            vf sum = splat(0), squares = splat(0), least = splat(INFINITY), most = splat(-INFINITY);
            for (int64_t t = first; t < last; t++) {
                const vf x = load_some(d->matrix + t * entries + m, count) - pivot;
                sum += x, squares += x * x, least = vmin(least, x), most = vmax(most, x);
            }
            for (int64_t v = 0; v < VL && v < count; v++) {
                struct dictionary_sums *s = sums + m + v;
                s->sum += sum[v], s->squares += squares[v];
                s->least = least[v] < s->least ? least[v] : s->least;
                s->most = most[v] > s->most ? most[v] : s->most;
            }
        }
    }
}

/* What tokens weigh in each entry, up to the share. */
INLINE void weigh(const struct dictionary_gradient *d, int64_t first, int64_t n, float *p) {
    const int64_t wide = d->wide_entries;
    widen(n, d->entries, wide, d->matrix + first * d->entries, p);
    for (int64_t m = 0; m < wide; m += VL) {
        const vf pivot = load(d->pivot + m), slope = load(d->slope + m), peak = load(d->peak + m);
        for (int64_t t = 0; t < n; t++)
            store(p + t * wide + m, exp2v((load(p + t * wide + m) - pivot) * slope - peak));
    }
}

static void refine(const struct dictionary_gradient *d, int64_t begin, int64_t end, float *scratch, float *sums) {
    const int64_t wide = d->wide_entries;
    float *p = scratch, *rows = p + STRETCH * wide, *weights = sums + d->entries * d->wide_channels;
    for (int64_t first = begin; first < end; first += STRETCH) {
        const int64_t n = end - first < STRETCH ? end - first : STRETCH;
        weigh(d, first, n, p);
        for (int64_t m = 0; m < wide; m += VL) {
            vf sum = load(weights + m);
            for (int64_t t = 0; t < n; t++) sum += load(p + t * wide + m);
            store(weights + m, sum);
        }
        const float *x = as_rows(n, d->channels, d->wide_channels, d->x + first * d->channels, rows);
        add_outer(d->entries, n, p, wide, x, d->wide_channels, sums);
    }
}

static void refine_backward(const struct dictionary_gradient *d, int64_t begin, int64_t end, float *scratch,
                            float *sums) {
    const int64_t wide = d->wide_entries, entries = d->entries;
    float *p = scratch, *dp = p + STRETCH * wide, *rows = dp + STRETCH * wide, *dx = rows + STRETCH * d->wide_channels;
    for (int64_t first = begin; first < end; first += STRETCH) {
        const int64_t n = end - first < STRETCH ? end - first : STRETCH;
        weigh(d, first, n, p);
        const float *x = as_rows(n, d->channels, d->wide_channels, d->x + first * d->channels, rows);
        rows_times(n, d->channels, x, d->wide_channels, d->grad_by_channel, wide, 0, dp);
        for (int64_t m = 0; m < wide; m += VL) {
            const vf share = load(d->share + m), along = load(d->along + m);
            const vf factor = load(d->factor + m), middle = load(d->pivot + m) + load(d->mean + m);
            vf sum = load(sums + m);
            for (int64_t t = 0; t < n; t++) {
                const vf weight = load(p + t * wide + m) * share;
                const vf grad = weight * (load(dp + t * wide + m) - along);
                const vf normal = load_some(d->matrix + (first + t) * entries + m, entries - m) - middle;
                sum += grad * (normal * factor);
                store(p + t * wide + m, weight);
                store(dp + t * wide + m, grad);
            }
            store(sums + m, sum);
        }
        rows_times(n, entries, p, wide, d->grad, d->wide_channels, 0, dx);
        narrow(n, d->channels, d->wide_channels, dx, d->grad_x + first * d->channels);
        narrow(n, entries, wide, dp, d->grad_p + first * entries);
    }
}

static void normalise_backward(const struct dictionary_gradient *d, int64_t begin, int64_t end) {
    const int64_t entries = d->entries;
    for (int64_t t = begin; t < end; t++)
        for (int64_t m = 0; m < entries; m += VL) {
            const int64_t at = t * entries + m, n = entries - m;
            const vf middle = load(d->pivot + m) + load(d->mean + m);
            const vf normal = (load_some(d->matrix + at, n) - middle) * load(d->factor + m);
            const vf grad = load_some(d->grad_p + at, n);
            store_some(d->grad_p + at, (grad - normal * load(d->slant + m)) * load(d->scale + m), n);
        }
}

const struct training_kernels FOR_TARGET(ppsr_training_kernels_) = {
    linear, depthwise_forward, depthwise_backward, attend, attend_backward, moments, refine, refine_backward,
    normalise_backward};
