/* The one matrix product of all kernels: C(i) += sum_k A(k) * b(i, k), where A(k) and C(i) are rows of 16 floats and
 * b(i, k) is a scalar at any stride. */
#ifndef PPSR_PRODUCTS_H
#define PPSR_PRODUCTS_H

#include <stddef.h>

#include "simd.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define FOR_TARGET(name) JOIN(name, TARGET) /* setup.py compiles the kernels once for each TARGET */

/* sum(i) += sum_k A(k) * b(i, k) for `rows` <= BLOCK rows, which stay in registers; `words`: the operands are words,
 * and so many are summed. */
INLINE void accumulate_of(int words, int rows, int64_t depth, const float *a, const float *b, int64_t row_step,
                          int64_t depth_step, vf sum[BLOCK][NV]) {
    for (int64_t k = 0; k < depth; k++) {
        vf x[NV];
        EACH(v, NV) x[v] = load(a + k * LANES + v * VL);
        EACH(i, rows) {
            const float *y = b + i * row_step + k * depth_step;
            if (words)
                EACH(v, NV) sum[i][v] = add_words(sum[i][v], x[v], splat_word(y));
            else
                EACH(v, NV) sum[i][v] += x[v] * *y;
        }
    }
}

/* C(i) = start(i) + sum_k A(k) * b(i, k) for `rows` <= BLOCK rows; start is NULL for zeros. */
INLINE void product_block(int words, int rows, int64_t depth, const float *a, const float *b, int64_t row_step, int64_t depth_step,
                          const float *start, float *c) {
    vf sum[BLOCK][NV];
    EACH(i, rows)
        EACH(v, NV) sum[i][v] = start ? load(start + i * LANES + v * VL) : splat(0);
    accumulate_of(words, rows, depth, a, b, row_step, depth_step, sum);
    EACH(i, rows)
        EACH(v, NV) store(c + i * LANES + v * VL, sum[i][v]);
}

/* The same for any number of rows. */
INLINE void product_of(int words, int64_t rows, int64_t depth, const float *a, const float *b, int64_t row_step,
                       int64_t depth_step, const float *start, float *c) {
    int64_t i = 0;
    for (; i + BLOCK <= rows; i += BLOCK)
        product_block(words, BLOCK, depth, a, b + i * row_step, row_step, depth_step, start ? start + i * LANES : NULL,
                      c + i * LANES);
    /* the rest in powers of two, to keep several accumulators going */
#pragma GCC unroll 4
    for (int step = 8; step; step /= 2)
        if (step < BLOCK && rows - i >= step) {
            product_block(words, step, depth, a, b + i * row_step, row_step, depth_step, start ? start + i * LANES : NULL,
                          c + i * LANES);
            i += step;
        }
}

INLINE void product(int64_t rows, int64_t depth, const float *a, const float *b, int64_t row_step, int64_t depth_step,
                    const float *start, float *c) {
    product_of(0, rows, depth, a, b, row_step, depth_step, start, c);
}

/* `count` vectors of logits -> exponentials relative to the peaks, which are added to the sums. They go to `to`, which
 * may be `logits`; where a vector is a row (NV = 1), if asked for as words. */
INLINE void exponentials_to(int words, int count, const float *logits, const vf *peak, vf *sum, float *to) {
    vf x[IN_STEP];
    EACH(i, count) x[i] = load(logits + i * VL) - peak[i % NV];
    exp2_in_step(count, x);
    if (words)
        EACH(i, count / 2) store(to + i * VL, words_of_rows(x[2 * i], x[2 * i + 1]));
    else
        EACH(i, count) store(to + i * VL, x[i]);
    EACH(i, count - NV) x[i + NV] += x[i]; /* pairs first: a shorter chain through the sums */
    EACH(v, NV) sum[v] += x[count - NV + v];
}

INLINE void exponentials(int count, float *logits, const vf *peak, vf *sum) {
    exponentials_to(0, count, logits, peak, sum, logits);
}

#endif
