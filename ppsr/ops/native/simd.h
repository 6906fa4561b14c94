/* The vectors that the kernels are written in: GCC/Clang vector extensions at the native width of the target.
 *
 * LANES rows of a matrix always travel together, in NV vectors of VL floats. BLOCK is how many rows of a product are
 * summed at a time: BLOCK * NV independent accumulators hide the latency of the fused multiply-add and still fit the
 * registers beside the operands. */
#ifndef PPSR_SIMD_H
#define PPSR_SIMD_H

#include <stdint.h>

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

#define LANES 16
#define NV (LANES / VL)

typedef float vf __attribute__((vector_size(VL * 4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE void store(float *p, vf x) { *(vf *)p = x; }
INLINE vf splat(float x) { return (vf){0} + x; }

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

/* 2^x for x <= 127, within 2 ulp; exactly 0 for x <= -127, NaN for NaN.
 *
 * Adding 1.5 * 2^23 rounds x to an integer n, held in the low bits of the sum; the 127 added with it makes them the
 * exponent field of 2^n. 2^(x - n) is a polynomial of degree 6 on [-1/2, 1/2] (minimax, relative error 2e-9). The last
 * step is a product and not an addition to the exponent, since a NaN has to survive it. */
INLINE vf exp2v(vf x) {
    const float magic = 12582912.0f + 127.0f;
    x = vmax(splat(-127.0f), x);
    vf shifted = x + magic;
    vf r = x - (shifted - magic);
    vf power = (vf)((vi)shifted << 23);
    vf y = r * 1.535335322842002e-4f + 1.3398902956396341e-3f;
    y = y * r + 9.618437848985195e-3f;
    y = y * r + 5.5503323674201965e-2f;
    y = y * r + 0.24022647738456726f;
    y = y * r + 0.6931471824645996f;
    y = y * r + 1.0f;
    return y * power;
}

#endif
