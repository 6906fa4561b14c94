/* The vectors that the kernels are written in: GCC/Clang vector extensions at the native width of the target.
 *
 * LANES rows of a matrix always travel together, in NV vectors of VL floats. BLOCK is how many rows of a product are
 * summed at a time: BLOCK * NV independent accumulators hide the latency of the fused multiply-add and still fit the
 * registers beside the operands. */
#ifndef PPSR_SIMD_H
#define PPSR_SIMD_H

#include <stdint.h>

#include "kernels.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define VL 16
#define BLOCK 12
#elif defined(__AVX__)
#include <immintrin.h>
#define VL 8
#define BLOCK 6
#elif defined(__SSE2__)
#include <immintrin.h>
#define VL 4
#define BLOCK 3
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#define VL 4
#define BLOCK 6
#else
#define VL 4
#define BLOCK 3
#endif

#define NV (LANES / VL)

typedef float vf __attribute__((vector_size(VL * 4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4), may_alias));

#define IN_STEP 4 /* vectors whose exponentials are worked on in step */

#define INLINE static inline __attribute__((always_inline))
#define NOT_INLINE __attribute__((noinline)) /* what is long and called from several places: the build would take minutes */
/* A loop that is unrolled whole, so that arrays indexed by i become registers. */
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)

typedef float vf_anywhere __attribute__((vector_size(VL * 4), may_alias, aligned(4)));

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE void store(float *p, vf x) { *(vf *)p = x; }
INLINE vf load_anywhere(const float *p) { return *(const vf_anywhere *)p; }
INLINE void store_anywhere(float *p, vf x) { *(vf_anywhere *)p = x; }
INLINE vf splat(float x) { return (vf){0} + x; }

/* Store to memory past the caches, which would first read the lines that are overwritten; p is aligned like a vector.
 * Before another thread reads, stream_fence. */
INLINE void stream(float *p, vf x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX__)
    _mm256_stream_ps(p, (__m256)x);
#elif defined(__SSE2__)
    _mm_stream_ps(p, (__m128)x);
#else
    store(p, x);
#endif
}
INLINE void stream_fence(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* Element i of the result is element number i of those that are listed, counted through a and then b. */
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#if VL == 16
#define LOW_ONES 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH_ONES 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define LOW_PAIRS 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH_PAIRS 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW_FOURS 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH_FOURS 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW_EIGHTS 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH_EIGHTS 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#elif VL == 8
#define LOW_ONES 0, 8, 1, 9, 4, 12, 5, 13
#define HIGH_ONES 2, 10, 3, 11, 6, 14, 7, 15
#define LOW_PAIRS 0, 1, 8, 9, 4, 5, 12, 13
#define HIGH_PAIRS 2, 3, 10, 11, 6, 7, 14, 15
#define LOW_FOURS 0, 1, 2, 3, 8, 9, 10, 11
#define HIGH_FOURS 4, 5, 6, 7, 12, 13, 14, 15
#else
#define LOW_ONES 0, 4, 1, 5
#define HIGH_ONES 2, 6, 3, 7
#define LOW_PAIRS 0, 1, 4, 5
#define HIGH_PAIRS 2, 3, 6, 7
#endif

/* Rows and columns of VL x VL floats change places: 4 x 4 at a time, then blocks of that size. */
INLINE void transpose(vf *row) {
    EACH(i, VL) if (i % 4 == 0) {
        const vf a = SHUFFLE(row[i], row[i + 1], LOW_ONES), b = SHUFFLE(row[i], row[i + 1], HIGH_ONES);
        const vf c = SHUFFLE(row[i + 2], row[i + 3], LOW_ONES), d = SHUFFLE(row[i + 2], row[i + 3], HIGH_ONES);
        row[i] = SHUFFLE(a, c, LOW_PAIRS);
        row[i + 1] = SHUFFLE(a, c, HIGH_PAIRS);
        row[i + 2] = SHUFFLE(b, d, LOW_PAIRS);
        row[i + 3] = SHUFFLE(b, d, HIGH_PAIRS);
    }
#if VL >= 8
    EACH(i, VL) if (!(i & 4)) {
        const vf a = row[i], b = row[i + 4];
        row[i] = SHUFFLE(a, b, LOW_FOURS);
        row[i + 4] = SHUFFLE(a, b, HIGH_FOURS);
    }
#endif
#if VL >= 16
    EACH(i, VL) if (!(i & 8)) {
        const vf a = row[i], b = row[i + 8];
        row[i] = SHUFFLE(a, b, LOW_EIGHTS);
        row[i + 8] = SHUFFLE(a, b, HIGH_EIGHTS);
    }
#endif
}

/* The sum of all elements, in each element. */
INLINE vf total_of(vf x) {
#if VL == 16
    x += SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return x + SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif VL == 8
    x += SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
    return x + SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    x += SHUFFLE(x, x, 2, 3, 0, 1);
    return x + SHUFFLE(x, x, 1, 0, 3, 2);
#endif
}

/* --- bfloat16: only in kernels that are compiled with BFLOAT16 ----------------------------------------------------- */

#ifndef BFLOAT16
#define BFLOAT16 0 /* whether linear layers and attentions multiply what is rounded to bfloat16 */
#endif

/* A word is two neighbours along the depth of a product, rounded to bfloat16 (to nearest, ties to even), the first in
 * the low half, in the bits of a float. An odd depth is filled up with a zero. */
#define WORDS(depth) (BFLOAT16 ? ((depth) + 1) / 2 : (depth))

typedef int32_t word __attribute__((may_alias));

INLINE vf splat_word(const float *p) { return (vf)((vi){0} + *(const word *)p); } /* no arithmetic of floats on it */

#if BFLOAT16 && defined(__AVX512BF16__)

/* Word l of (low[l], high[l]). */
INLINE vf words_of_rows(vf low, vf high) {
    const vi by_pair = (vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x10001 + 0x100000;
    return (vf)_mm512_permutexvar_epi16((__m512i)by_pair, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

/* Words of 2 VL floats that follow each other. */
INLINE vf words_of_neighbours(vf first, vf then) { return (vf)_mm512_cvtne2ps_pbh((__m512)then, (__m512)first); }

/* sum + x y over both halves of the words. */
INLINE vf add_words(vf sum, vf x, vf y) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y); }

#elif BFLOAT16 /* the same without the instructions, for tests */

INLINE vi rounded(vf x) {
    const vi bits = (vi)x, nan = (vi)(x != x);
    return (nan & (bits | 0x400000)) | (~nan & (bits + 0x7fff + ((bits >> 16) & 1)));
}

INLINE vf words_of_rows(vf low, vf high) {
    return (vf)(((rounded(low) >> 16) & 0xffff) | (rounded(high) & ~0xffff));
}

INLINE vf words_of_neighbours(vf first, vf then) {
    vf even = first, odd = first;
    for (int i = 0; i < VL; i++) {
        even[i] = 2 * i < VL ? first[2 * i] : then[2 * i - VL];
        odd[i] = 2 * i < VL ? first[2 * i + 1] : then[2 * i + 1 - VL];
    }
    return words_of_rows(even, odd);
}

INLINE vf add_words(vf sum, vf x, vf y) {
    sum += (vf)((vi)x << 16) * (vf)((vi)y << 16);
    return sum + (vf)((vi)x & ~0xffff) * (vf)((vi)y & ~0xffff);
}

#else

INLINE vf words_of_rows(vf low, vf high) { return low + high; } /* never called */
INLINE vf words_of_neighbours(vf first, vf then) { return first + then; }
INLINE vf add_words(vf sum, vf x, vf y) { return sum + x * y; }

#endif

/* n floats, n even -> n / 2 words; y may be x. */
INLINE void words_of_line(int64_t n, const float *x, float *y) {
    int64_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL)
        store_anywhere(y + i / 2, words_of_neighbours(load_anywhere(x + i), load_anywhere(x + i + VL)));
    if (i == n) return;
    float rest[2 * VL] = {0};
    for (int64_t j = i; j < n; j++) rest[j - i] = x[j];
    const vf words = words_of_neighbours(load_anywhere(rest), load_anywhere(rest + VL));
    for (int64_t j = i; j < n; j += 2) y[j / 2] = words[(j - i) / 2];
}

/* (depth, 16) -> words (WORDS(depth), 16), which may begin where x does or before. */
INLINE void words_of_panel(int64_t depth, const float *x, float *y) {
    for (int64_t k = 0; k < depth; k += 2)
        EACH(v, NV) {
            const float *low = x + k * LANES + v * VL;
            store(y + k / 2 * LANES + v * VL, words_of_rows(load(low), k + 1 < depth ? load(low + LANES) : splat(0)));
        }
}

/* The larger of each pair; where x is NaN the result is NaN or x. */
INLINE vf vmax(vf floor, vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)floor, (__m512)x);
#elif defined(__AVX__)
    return (vf)_mm256_max_ps((__m256)floor, (__m256)x);
#elif defined(__SSE2__)
    return (vf)_mm_max_ps((__m128)floor, (__m128)x);
#elif defined(__ARM_NEON)
    return (vf)vmaxq_f32((float32x4_t)floor, (float32x4_t)x);
#else
    for (int i = 0; i < VL; i++) x[i] = floor[i] > x[i] ? floor[i] : x[i];
    return x;
#endif
}

/* The smaller of each pair; where x is NaN the result is NaN or x. */
INLINE vf vmin(vf ceiling, vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)ceiling, (__m512)x);
#elif defined(__AVX__)
    return (vf)_mm256_min_ps((__m256)ceiling, (__m256)x);
#elif defined(__SSE2__)
    return (vf)_mm_min_ps((__m128)ceiling, (__m128)x);
#elif defined(__ARM_NEON)
    return (vf)vminq_f32((float32x4_t)ceiling, (float32x4_t)x);
#else
    for (int i = 0; i < VL; i++) x[i] = ceiling[i] < x[i] ? ceiling[i] : x[i];
    return x;
#endif
}

/* 2^r on [-1/2, 1/2], highest power first: minimax in units of the last place of the result. Degree 5 is 1.05 off, 1.8
 * with the rounding of its evaluation; without a fused multiply-add that would be 2.1, so degree 6 it is there. */
static const float EXP2[] = {
#if defined(__FMA__) || defined(__aarch64__)
    1.3225695583969355e-3f, 9.671804495155811e-3f, 5.550892651081085e-2f, 0.24022236466407776f, 0.693146824836731f, 1
#else
    1.535335322842002e-4f, 1.3398902956396341e-3f, 9.618437848985195e-3f, 5.5503323674201965e-2f, 0.24022647738456726f,
    0.6931471824645996f,   1
#endif
};
enum { EXP2_DEGREE = sizeof(EXP2) / sizeof(EXP2[0]) - 1 };

/* 2^x for x <= 127, within 2 ulp; exactly 0 for x <= -127, NaN for NaN.
 *
 * Adding 1.5 * 2^23 rounds x to an integer n, held in the low bits of the sum; the 127 added with it makes them the
 * exponent field of 2^n. The last step is a product and not an addition to the exponent, since a NaN has to survive it.
 *
 * It takes `count` vectors in step: one alone is a chain of dependent operations, longer than the scheduler of a
 * processor looks ahead. */
INLINE void exp2_in_step(int count, vf *x) {
    const float magic = 12582912.0f + 127.0f;
    vf shifted[IN_STEP], y[IN_STEP];
    EACH(i, count) x[i] = vmax(splat(-127.0f), x[i]);
    EACH(i, count) shifted[i] = x[i] + magic;
    EACH(i, count) x[i] -= shifted[i] - magic;
    EACH(i, count) y[i] = x[i] * EXP2[0] + EXP2[1];
    EACH(c, EXP2_DEGREE - 1) EACH(i, count) y[i] = y[i] * x[i] + EXP2[c + 2];
    EACH(i, count) x[i] = y[i] * (vf)((vi)shifted[i] << 23);
}

INLINE vf exp2v(vf x) {
    exp2_in_step(1, &x);
    return x;
}

/* log2 of x >= 1, to 2e-7: the bits of a float are nearly its logarithm; three Newton steps on 2^y = x do the rest. */
INLINE vf log2v(vf x) {
    vf y = __builtin_convertvector((vi)x - 0x3f800000, vf) * 0x1p-23f;
    for (int i = 0; i < 3; i++) y += (x * exp2v(-y) - 1.0f) * 1.44269504f;
    return y;
}

/* (Phi(x) - 1/2) / x = P(x^2) / Q(x^2) on [-5.5, 5.5], highest power first, Phi the normal distribution: minimax in Phi,
 * 8e-9 off. */
static const float PHI_P[] = {2.27852102e-8f,  6.33834225e-6f,  1.67789127e-4f,
                              4.67104604e-3f,  3.37579548e-2f,  3.98942262e-1f};
static const float PHI_Q[] = {1.19750916e-6f,  7.32774497e-5f,  1.87870022e-3f,
                              2.85905320e-2f,  2.51284748e-1f,  1.0f};

/* GELU(x) = x Phi(x), within 2.5e-7 max(1, |x|); exactly 0 below -5.5, where it is less than 1e-7. */
INLINE vf gelu(vf x) {
    const vf end = splat(5.5f);
    const vf c = vmin(end, vmax(-end, x)), s = c * c;
    vf p = splat(PHI_P[0]), q = splat(PHI_Q[0]);
    EACH(i, 5) p = p * s + PHI_P[i + 1], q = q * s + PHI_Q[i + 1];
    const vf phi = 0.5f + c * p / q;
    return x * (vf)((vi)phi & ~(vi)(x < -end));
}

#endif
