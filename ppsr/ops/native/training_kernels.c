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

/* sum(i) += sum_k A(k) * b(i, k), like accumulate() but with rows A(k) at any distance that keeps them aligned. */
INLINE void tile(int rows, int64_t depth, const float *a, int64_t a_step, const float *b, int64_t row_step,
                 int64_t depth_step, vf sum[BLOCK][NV]) {
    for (int64_t k = 0; k < depth; k++) {
        vf x[NV];
        EACH(v, NV) x[v] = load(a + k * a_step + v * VL);
        EACH(i, rows) {
            const float y = b[i * row_step + k * depth_step];
            EACH(v, NV) sum[i][v] += x[v] * y;
        }
    }
}

/* C(i) = start(i), or C(i) itself, + sum_k A(k) * b(i, k) for 16 columns and any number of rows, which are `c_step`
 * apart; start is the same for all of them. */
INLINE void tile_block(int rows, int64_t depth, const float *a, int64_t a_step, const float *b, int64_t row_step,
                       int64_t depth_step, const float *start, float *c, int64_t c_step) {
    vf sum[BLOCK][NV];
    EACH(i, rows)
        EACH(v, NV) sum[i][v] = load((start ? start : c + i * c_step) + v * VL);
    tile(rows, depth, a, a_step, b, row_step, depth_step, sum);
    EACH(i, rows)
        EACH(v, NV) store(c + i * c_step + v * VL, sum[i][v]);
}

INLINE void tiles(int64_t rows, int64_t depth, const float *a, int64_t a_step, const float *b, int64_t row_step,
                  int64_t depth_step, const float *start, float *c, int64_t c_step) {
    int64_t i = 0;
    for (; i + BLOCK <= rows; i += BLOCK)
        tile_block(BLOCK, depth, a, a_step, b + i * row_step, row_step, depth_step, start, c + i * c_step, c_step);
#pragma GCC unroll 4
    for (int step = 8; step; step /= 2) /* the rest in powers of two, to keep several accumulators going */
        if (step < BLOCK)
            for (; rows - i >= step; i += step)
                tile_block(step, depth, a, a_step, b + i * row_step, row_step, depth_step, start, c + i * c_step, c_step);
}

/* Sum over the vectors of a row. */
INLINE float across(vf x) {
    float sum = 0;
    for (int v = 0; v < VL; v++) sum += x[v];
    return sum;
}

/* `n` rows of x, normalised where there is a norm -> rows of `wide` floats, and what they were multiplied by. */
INLINE void take_rows(const struct linear_gradient *l, int64_t n, const float *x, float *rows, float *factor) {
    const int64_t in = l->in, wide = l->wide_in;
    const float share = 1 / (float)in;
    for (int64_t t = 0; t < n; t++, x += in, rows += wide) {
        memcpy(rows, x, in * sizeof(float));
        for (int64_t i = in; i < wide; i++) rows[i] = 0;
        if (l->eps < 0) continue;
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

/* Gradients of the outputs of a chunk, side by side and before the GELU. */
INLINE void take_gradients(const struct linear_gradient *l, int64_t first, int64_t n, const float *x, float *dz) {
    const int64_t wide = l->wide_out;
    if (l->by_in) {
        for (int64_t o = 0; o < wide; o += LANES)
            tiles(n, l->in, l->by_in + o, wide, x, l->wide_in, 1, l->bias + o, dz + o, wide);
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
}

static void linear(const struct linear_gradient *l, int64_t begin, int64_t end, float *scratch, float *sums) {
    const int64_t in = l->in, wide_in = l->wide_in, wide_out = l->wide_out;
    float *x = scratch, *dx = x + CHUNK * wide_in, *dz = dx + CHUNK * wide_in, *factor = dz + CHUNK * wide_out;
    float *bias = sums + l->outs * wide_in;
    const float zeros[LANES] __attribute__((aligned(64))) = {0};
    for (int64_t first = begin; first < end; first += CHUNK) {
        const int64_t n = end - first < CHUNK ? end - first : CHUNK;
        take_rows(l, n, l->x + first * in, x, factor);
        take_gradients(l, first, n, x, dz);
        for (int64_t o = 0; o < wide_out; o += VL) {
            vf sum = load(bias + o);
            for (int64_t t = 0; t < n; t++) sum += load(dz + t * wide_out + o);
            store(bias + o, sum);
        }
        for (int64_t i = 0; i < wide_in; i += LANES) {
            tiles(l->outs, n, x + i, wide_in, dz, 1, wide_out, NULL, sums + i, wide_in);
            tiles(n, l->outs, l->weight + i, wide_in, dz, wide_out, 1, zeros, dx + i, wide_in);
        }
        for (int64_t t = 0; t < n; t++) {
            float *d = dx + t * wide_in;
            const float *y = x + t * wide_in;
            if (l->eps >= 0) { /* what changes the mean or the length of a row is lost in the norm */
                vf total = splat(0), along = splat(0);
                for (int64_t i = 0; i < wide_in; i += VL) total += load(d + i), along += load(d + i) * load(y + i);
                const float mean = across(total) / (float)in, slope = across(along) / (float)in;
                for (int64_t i = 0; i < wide_in; i += VL)
                    store(d + i, (load(d + i) - mean - load(y + i) * slope) * factor[t]);
            }
            memcpy(l->grad_x + (first + t) * in, d, in * sizeof(float));
        }
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

const struct training_kernels FOR_TARGET(ppsr_training_kernels_) = {linear, depthwise_forward, depthwise_backward};
