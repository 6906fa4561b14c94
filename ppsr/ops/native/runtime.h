/* What all loops share: memory, threads, the instruction set in use. */
#ifndef PPSR_RUNTIME_H
#define PPSR_RUNTIME_H

#include <stdint.h>

#include "kernels.h"

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Aligned to 64 bytes, or NULL; free() gives it back. */
void *ppsr_take(int64_t bytes);

/* Says that `out` will be written soon. glibc takes more than 32 MiB fresh from the system each time, and fresh memory
 * costs a fault per page, more than the arithmetic of a linear layer: large pages make that a fifth. */
void ppsr_expect(float *out, int64_t floats);

/* Kernels for the best instruction set of this processor, or for the one that was asked for. */
const struct attention_kernels *ppsr_attention_kernels(void);
const struct layer_kernels *ppsr_layer_kernels(void);
int ppsr_want_bf16(int wanted);

/* Runs body for every task, on up to `threads` threads, each with `scratch_bytes` of its own, aligned to 64 bytes.
 * `more` says that the same thread has task + 1 next. Returns 0, or -1 if there was not enough memory. */
int ppsr_for_each(int64_t tasks, int64_t threads, int64_t scratch_bytes, void *context,
                  void (*body)(void *context, int64_t task, int more, void *scratch));

#endif
