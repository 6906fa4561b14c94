/* Memory, threads, instruction sets, denormal numbers.
 *
 * Threads are those of torch: a second OpenMP runtime in the process would spin against torch's. So this file is plain
 * C, and the loader hands in GOMP_parallel, the entry of the runtime that torch has loaded. Tasks are taken from a
 * counter, and whatever is summed over tasks is kept apart per task and added up in their order, so that no result
 * depends on who did what (nor, but for bias gradients with more than 8 threads, on how many there are). */

#include "runtime.h"

#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "training.h"

/* --- instruction sets --------------------------------------------------------------------------------------------- */

extern const struct attention_kernels ppsr_attention_kernels_baseline, ppsr_attention_kernels_avx2, ppsr_attention_kernels_avx512;
extern const struct layer_kernels ppsr_layer_kernels_baseline, ppsr_layer_kernels_avx2, ppsr_layer_kernels_avx512;
extern const struct training_kernels ppsr_training_kernels_baseline, ppsr_training_kernels_avx2, ppsr_training_kernels_avx512;

extern const struct attention_kernels ppsr_attention_kernels_emulated_bf16, ppsr_attention_kernels_avx512_bf16;
extern const struct layer_kernels ppsr_layer_kernels_emulated_bf16, ppsr_layer_kernels_avx512_bf16;

static const struct target {
    const char *name;
    const struct attention_kernels *attention;
    const struct layer_kernels *layers;
    const struct training_kernels *training;
    const char *bf16; /* kernels that multiply bfloat16, or NULL */
    const struct attention_kernels *bf16_attention;
    const struct layer_kernels *bf16_layers;
} targets[] = {
#if defined(__x86_64__)
    {"avx512", &ppsr_attention_kernels_avx512, &ppsr_layer_kernels_avx512, &ppsr_training_kernels_avx512,
#if defined(HAVE_AVX512_BF16)
     "avx512_bf16", &ppsr_attention_kernels_avx512_bf16, &ppsr_layer_kernels_avx512_bf16
#endif
    },
    {"avx2", &ppsr_attention_kernels_avx2, &ppsr_layer_kernels_avx2, &ppsr_training_kernels_avx2},
#endif
    {"baseline", &ppsr_attention_kernels_baseline, &ppsr_layer_kernels_baseline, &ppsr_training_kernels_baseline,
     "emulated_bf16", &ppsr_attention_kernels_emulated_bf16, &ppsr_layer_kernels_emulated_bf16},
};
enum { TARGETS = sizeof(targets) / sizeof(targets[0]) };
static int current = TARGETS - 1;      /* index into targets */
static _Thread_local int bf16_wanted; /* by this thread; those that help it are told */

static int supported(const char *name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(name, "avx512")) return __builtin_cpu_supports("avx512f");
#if defined(HAVE_AVX512_BF16)
    if (!strcmp(name, "avx512_bf16")) return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
#endif
    if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return !strcmp(name, "baseline") || !strcmp(name, "emulated_bf16");
}

/* Takes the named instruction set, or the best one for NULL. Returns 0, or -1 if this processor lacks it. */
int ppsr_set_target(const char *name) {
    for (int i = 0; i < TARGETS; i++)
        if ((name == NULL || !strcmp(name, targets[i].name)) && supported(targets[i].name)) {
            current = i;
            return 0;
        }
    return -1;
}

const char *ppsr_target(void) { return targets[current].name; }

/* Name of instruction set number i of those that this processor has, the best one first, or NULL past the last. */
const char *ppsr_supported_target(int64_t i) {
    for (int t = 0; t < TARGETS; t++)
        if (supported(targets[t].name) && !i--) return targets[t].name;
    return NULL;
}

/* Kernels beside those of the current instruction set that multiply bfloat16, or NULL. */
const char *ppsr_bf16_target(void) {
    const char *name = targets[current].bf16;
    return name && supported(name) ? name : NULL;
}

/* Whether forward passes that this thread starts multiply bfloat16, where there are kernels for that. Returns what was. */
int ppsr_want_bf16(int wanted) {
    const int before = bf16_wanted;
    bf16_wanted = wanted;
    return before;
}

static int use_bf16(void) { return bf16_wanted && ppsr_bf16_target(); }

const struct attention_kernels *ppsr_attention_kernels(void) {
    return use_bf16() ? targets[current].bf16_attention : targets[current].attention;
}

const struct layer_kernels *ppsr_layer_kernels(void) {
    return use_bf16() ? targets[current].bf16_layers : targets[current].layers;
}

const struct training_kernels *ppsr_training_kernels(void) { return targets[current].training; }

void ppsr_exp2(const float *x, float *y, int64_t n) { targets[current].attention->exp2(x, y, n); }

/* --- denormal numbers --------------------------------------------------------------------------------------------- */

/* Tiny probabilities would cost a hundred cycles each. Returns the mode to restore. */
static uint64_t flush_denormals(void) {
#if defined(__SSE2__)
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040); /* flush to zero, denormals are zero */
    return mode;
#elif defined(__aarch64__)
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    __asm__ volatile("msr fpcr, %0" : : "r"(mode | (1u << 24)));
    return mode;
#else
    return 0;
#endif
}

static void restore_denormals(uint64_t mode) {
#if defined(__SSE2__)
    _mm_setcsr((unsigned)mode);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(mode));
#else
    (void)mode;
#endif
}

/* --- memory and threads ------------------------------------------------------------------------------------------- */

void *ppsr_take(int64_t bytes) { return aligned_alloc(64, padded(bytes ? bytes : 1, 64)); }

void ppsr_expect(float *out, int64_t floats) {
#if defined(MADV_HUGEPAGE)
    const int64_t page = sysconf(_SC_PAGESIZE), fresh = 32 << 20;
    const int64_t begin = padded((int64_t)(uintptr_t)out, page), end = (int64_t)(uintptr_t)(out + floats) / page * page;
    if (end - begin > fresh) madvise((void *)(uintptr_t)begin, end - begin, MADV_HUGEPAGE); /* advice: may fail */
#else
    (void)out, (void)floats;
#endif
}

struct loop {
    void (*body)(void *context, int64_t task, int more, void *scratch);
    void *context;
    int64_t tasks, run, scratch_bytes; /* tasks are taken `run` at a time */
    int bf16;
    atomic_llong next;
    atomic_int failed;
};

typedef void (*team_function)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
static team_function run_team; /* GOMP_parallel, or NULL: one thread */

void ppsr_set_team(void *gomp_parallel) { run_team = (team_function)gomp_parallel; }

static void work(void *data) {
    struct loop *loop = data;
    const uint64_t mode = flush_denormals();
    const int before = ppsr_want_bf16(loop->bf16);
    void *scratch = ppsr_take(loop->scratch_bytes);
    if (scratch)
        for (int64_t task; (task = atomic_fetch_add(&loop->next, loop->run)) < loop->tasks;) {
            const int64_t end = smaller(task + loop->run, loop->tasks);
            for (; task < end; task++) loop->body(loop->context, task, task + 1 < end, scratch);
        }
    else
        loop->failed = 1;
    free(scratch);
    ppsr_want_bf16(before);
    restore_denormals(mode);
}

int ppsr_for_each(int64_t tasks, int64_t threads, int64_t scratch_bytes, void *context,
                  void (*body)(void *, int64_t, int, void *)) {
    struct loop loop = {.body = body, .context = context, .tasks = tasks, .scratch_bytes = scratch_bytes,
                        .bf16 = bf16_wanted};
    threads = larger(smaller(threads, tasks), 1);
    loop.run = larger(smaller(tasks / threads / 8, 8), 1); /* long enough to look ahead, short enough to share out */
    if (threads > 1 && run_team)
        run_team(work, &loop, (unsigned)threads, 0);
    else if (tasks)
        work(&loop);
    return loop.failed ? -1 : 0;
}
