/* The loops around the kernels: which tokens form a group, who works on it, where the results go.
 *
 * The two operators differ only in that. A window is a list of tokens, and so is a category group; neither is ever
 * copied together as a map. The definitions are the reference.py of each operator.
 *
 * Shifted windows: after the cyclic shift the windows of the last row and column hold tokens from both ends of the map,
 * and the logits across are masked. Read in the original map, that is a grid of plain rectangles with its cuts at
 * 0, shift, shift + ws, ...: tokens of different rectangles never attend to each other, so nothing is masked here.
 * (The definition adds -100 instead: a factor of e^-100, below what a float32 sum can hold.)
 *
 * Threads are those of torch: a second OpenMP runtime in the process would spin against torch's. So this file is plain C,
 * and the loader hands in GOMP_parallel, the entry of the runtime that torch has loaded. Tasks are taken from a counter,
 * and whatever is summed over tasks is kept apart per task and added up in their order, so that no result depends on who
 * did what. */

#include <math.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define LOG2_E 1.44269504088896341

/* --- instruction sets --------------------------------------------------------------------------------------------- */

extern const struct kernels ppsr_kernels_baseline, ppsr_kernels_avx2, ppsr_kernels_avx512;

static const struct {
    const char *name;
    const struct kernels *kernels;
} targets[] = {
#if defined(__x86_64__)
    {"avx512", &ppsr_kernels_avx512},
    {"avx2", &ppsr_kernels_avx2},
#endif
    {"baseline", &ppsr_kernels_baseline},
};
enum { TARGETS = sizeof(targets) / sizeof(targets[0]) };
static int current = TARGETS - 1; /* index into targets */

static int supported(const char *name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(name, "avx512")) return __builtin_cpu_supports("avx512f");
    if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return !strcmp(name, "baseline");
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

void ppsr_exp2(const float *x, float *y, int64_t n) { targets[current].kernels->exp2(x, y, n); }

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

static void *take(int64_t bytes) { return aligned_alloc(64, padded(bytes ? bytes : 1, 64)); }

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* What a thread works with: room for the tokens of a group and for one head of it. */
struct desk {
    int32_t *token;
    float *scratch;
};

struct loop {
    void (*body)(void *context, int64_t task, struct desk desk);
    void *context;
    int64_t tasks, keys, dim; /* groups have at most `keys` tokens */
    atomic_llong next;
    atomic_int failed;
};

typedef void (*team_function)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
static team_function run_team; /* GOMP_parallel, or NULL: one thread */

void ppsr_set_team(void *gomp_parallel) { run_team = (team_function)gomp_parallel; }

static void work(void *data) {
    struct loop *loop = data;
    const uint64_t mode = flush_denormals();
    struct desk desk = {take(loop->keys * sizeof(int32_t)), take(scratch_floats(loop->keys, loop->dim) * sizeof(float))};
    if (desk.token && desk.scratch)
        for (int64_t task; (task = atomic_fetch_add(&loop->next, 1)) < loop->tasks;) loop->body(loop->context, task, desk);
    else
        loop->failed = 1;
    free(desk.token);
    free(desk.scratch);
    restore_denormals(mode);
}

/* Runs body for every task. Returns 0, or -1 if there was not enough memory. */
static int for_each(int64_t tasks, int64_t threads, int64_t keys, int64_t dim, void *context,
                    void (*body)(void *, int64_t, struct desk)) {
    struct loop loop = {.body = body, .context = context, .tasks = tasks, .keys = keys, .dim = dim};
    threads = smaller(threads, tasks);
    if (threads > 1 && run_team)
        run_team(work, &loop, (unsigned)threads, 0);
    else if (tasks)
        work(&loop);
    return loop.failed ? -1 : 0;
}

/* --- window attention --------------------------------------------------------------------------------------------- */

/* Bias of all pairs in a rectangle of height x width tokens (row-major), for 16 queries at a time.
 *
 * The bias depends only on the offset, so query blocks that start in the same column share their rows: for a block whose
 * first query lies at (y, x) and key (ky, kx), the 16 floats are row (slot(x), ky - y + height - 1, kx). All keys of a
 * block are thus contiguous, and the whole is an eighth of the full matrix for 16 x 16 windows. */
struct shape {
    int64_t height, width, slots;
    int64_t *start; /* (blocks) where the rows of a query block begin inside the bias of a head */
    int64_t *slot;  /* (width) slot of a column where blocks begin, or -1 */
    int64_t floats; /* of one head */
    int64_t offset; /* of this shape in the buffer of all shapes; head h at offset + h * floats */
};

enum { SHAPES = 9 };

struct windows {
    int64_t batch, height, width, channels, heads, size, shift;
    /* Pointers that a direction does not use are NULL. */
    const float *qkv, *grad_out;
    float *out, *lse, *grad_qkv;
    int64_t rows, columns; /* of the grid of rectangles */
    struct shape shape[SHAPES];
    int shapes;
    int64_t bias_floats; /* all shapes, all heads */
    float *bias;         /* (bias_floats) */
    float *grad_bias;    /* (chunks, bias_floats) */
    int64_t chunks;      /* of the backward: neighbouring rectangles that share one sum of bias gradients */
};

/* Rectangle number i along a side of n tokens: where it begins, how long it is. */
static int64_t cut(const struct windows *w, int64_t n, int64_t i, int64_t *length) {
    int64_t begin = w->shift ? (i ? w->shift + (i - 1) * w->size : 0) : i * w->size;
    int64_t end = smaller(w->shift && !i ? w->shift : begin + w->size, n);
    *length = end - begin;
    return begin;
}

static const struct shape *find_shape(const struct windows *w, int64_t height, int64_t width) {
    for (int i = 0; i < w->shapes; i++)
        if (w->shape[i].height == height && w->shape[i].width == width) return &w->shape[i];
    return NULL;
}

static int add_shape(struct windows *w, int64_t height, int64_t width) {
    if (find_shape(w, height, width)) return 0;
    struct shape *s = &w->shape[w->shapes++];
    const int64_t blocks = (height * width + LANES - 1) / LANES;
    s->height = height;
    s->width = width;
    s->slots = 0;
    s->slot = take(width * sizeof(int64_t));
    s->start = take(blocks * sizeof(int64_t));
    if (!s->slot || !s->start) return -1;
    for (int64_t x = 0; x < width; x++) s->slot[x] = -1;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t y = b * LANES / width, x = b * LANES % width;
        if (s->slot[x] < 0) s->slot[x] = s->slots++;
        s->start[b] = (s->slot[x] * (2 * height - 1) + height - 1 - y) * width * LANES;
    }
    s->floats = s->slots * (2 * height - 1) * width * LANES;
    s->offset = w->bias_floats;
    w->bias_floats += w->heads * s->floats;
    return 0;
}

static int plan_windows(struct windows *w) {
    if (!w->batch || !w->height || !w->width) return 0;
    w->rows = w->height / w->size + (w->shift > 0);
    w->columns = w->width / w->size + (w->shift > 0);
    int64_t kinds[2][3]; /* the first, the second and the last rectangle of a side have all lengths that there are */
    for (int i = 0; i < 3; i++) {
        cut(w, w->height, i == 2 ? w->rows - 1 : smaller(i, w->rows - 1), &kinds[0][i]);
        cut(w, w->width, i == 2 ? w->columns - 1 : smaller(i, w->columns - 1), &kinds[1][i]);
    }
    for (int y = 0; y < 3; y++)
        for (int x = 0; x < 3; x++)
            if (add_shape(w, kinds[0][y], kinds[1][x])) return -1;
    w->bias = take(w->bias_floats * sizeof(float));
    return w->bias ? 0 : -1;
}

static void free_windows(struct windows *w) {
    for (int i = 0; i < w->shapes; i++) {
        free(w->shape[i].slot);
        free(w->shape[i].start);
    }
    free(w->bias);
    free(w->grad_bias);
}

/* Row of the bias table for lane `lane` of row r of a slot that begins in column x, or -1 if it is none. */
static int64_t table_row(const struct windows *w, const struct shape *s, int64_t x, int64_t r, int64_t kx, int lane) {
    const int64_t dy = (s->height - 1 - r) + (x + lane) / s->width, dx = (x + lane) % s->width - kx;
    return dy < s->height ? (dy + w->size - 1) * (2 * w->size - 1) + dx + w->size - 1 : -1;
}

/* One direction fills the bias from the table, the other adds the gradient of the bias to that of the table. */
static void exchange_bias(const struct windows *w, const float *table, float *bias, double *grad_table) {
    for (int i = 0; i < w->shapes; i++) {
        const struct shape *s = &w->shape[i];
        for (int64_t x = 0; x < s->width; x++)
            for (int64_t r = 0; s->slot[x] >= 0 && r < 2 * s->height - 1; r++)
                for (int64_t kx = 0; kx < s->width; kx++)
                    for (int lane = 0; lane < LANES; lane++) {
                        const int64_t row = table_row(w, s, x, r, kx, lane);
                        float *at = bias + s->offset +
                                    ((s->slot[x] * (2 * s->height - 1) + r) * s->width + kx) * LANES + lane;
                        for (int64_t h = 0; h < w->heads; h++, at += s->floats)
                            if (table)
                                *at = row < 0 ? 0 : table[row * w->heads + h] * (float)LOG2_E;
                            else if (row >= 0)
                                grad_table[row * w->heads + h] += *at;
                    }
    }
}

static void attend_rectangle(const struct windows *w, int64_t number, int64_t chunk, struct desk desk) {
    const int64_t tokens = w->height * w->width, c = w->channels, dim = c / w->heads;
    const int64_t image = number / (w->rows * w->columns), place = number % (w->rows * w->columns);
    int64_t height, width;
    const int64_t top = cut(w, w->height, place / w->columns, &height);
    const int64_t left = cut(w, w->width, place % w->columns, &width);
    const struct shape *s = find_shape(w, height, width);
    for (int64_t y = 0; y < height; y++)
        for (int64_t x = 0; x < width; x++) desk.token[y * width + x] = (int32_t)((top + y) * w->width + left + x);
    for (int64_t h = 0; h < w->heads; h++) {
        const int64_t at = image * tokens * 3 * c + h * dim, to = image * tokens * c + h * dim;
        const int64_t bias = s->offset + h * s->floats;
        struct attention a = {.q = w->qkv + at, .k = w->qkv + at + c, .v = w->qkv + at + 2 * c, .qkv_stride = 3 * c,
                              .token = desk.token, .queries = height * width, .keys = height * width, .dim = dim,
                              .scale = 1 / sqrtf((float)dim), .bias = w->bias + bias, .bias_start = s->start,
                              .out = w->out + to, .out_stride = c, .lse = w->lse + (image * w->heads + h) * tokens,
                              .scratch = desk.scratch};
        if (!w->grad_out) {
            targets[current].kernels->forward(&a);
            continue;
        }
        a.grad_out = w->grad_out + to;
        a.grad_q = w->grad_qkv + at;
        a.grad_k = w->grad_qkv + at + c;
        a.grad_v = w->grad_qkv + at + 2 * c;
        a.grad_bias = w->grad_bias + chunk * w->bias_floats + bias;
        targets[current].kernels->backward(&a);
    }
}

static void window_forward_task(void *context, int64_t task, struct desk desk) {
    attend_rectangle(context, task, 0, desk);
}

static void window_backward_task(void *context, int64_t chunk, struct desk desk) {
    const struct windows *w = context;
    const int64_t all = w->batch * w->rows * w->columns;
    memset(w->grad_bias + chunk * w->bias_floats, 0, w->bias_floats * sizeof(float));
    for (int64_t i = all * chunk / w->chunks; i < all * (chunk + 1) / w->chunks; i++)
        attend_rectangle(w, i, chunk, desk);
}

/* qkv (batch, height, width, 3 channels), table ((2 size - 1)^2, heads) -> out (batch, height, width, channels), lse
 * (batch, heads, height, width). Returns 0, or -1 if there is not enough memory. */
int ppsr_window_forward(const float *qkv, const float *table, float *out, float *lse, int64_t batch, int64_t height,
                        int64_t width, int64_t channels, int64_t heads, int64_t size, int64_t shift, int64_t threads) {
    struct windows w = {.batch = batch, .height = height, .width = width, .channels = channels, .heads = heads,
                        .size = size, .shift = shift, .qkv = qkv, .out = out, .lse = lse};
    int failed = plan_windows(&w);
    if (!failed) {
        exchange_bias(&w, table, w.bias, NULL);
        failed = for_each(batch * w.rows * w.columns, threads, size * size, channels / heads, &w, window_forward_task);
    }
    free_windows(&w);
    return failed;
}

/* ... and grad_out like out -> grad_qkv like qkv, grad_table like table, in double. */
int ppsr_window_backward(const float *grad_out, const float *qkv, const float *out, const float *lse,
                         const float *table, float *grad_qkv, double *grad_table, int64_t batch, int64_t height,
                         int64_t width, int64_t channels, int64_t heads, int64_t size, int64_t shift,
                         int64_t threads) {
    struct windows w = {.batch = batch, .height = height, .width = width, .channels = channels, .heads = heads,
                        .size = size, .shift = shift, .qkv = qkv, .grad_out = grad_out, .out = (float *)out,
                        .lse = (float *)lse, .grad_qkv = grad_qkv};
    memset(grad_table, 0, (2 * size - 1) * (2 * size - 1) * heads * sizeof(double));
    int failed = plan_windows(&w);
    if (!failed) {
        /* at least 8, so that up to 8 threads give the very same sums */
        w.chunks = smaller(larger(threads, 8), batch * w.rows * w.columns);
        w.grad_bias = take(w.chunks * w.bias_floats * sizeof(float));
        failed = w.grad_bias ? 0 : -1;
    }
    if (!failed) {
        exchange_bias(&w, table, w.bias, NULL);
        failed = for_each(w.chunks, threads, size * size, channels / heads, &w, window_backward_task);
        for (int64_t chunk = 1; chunk < w.chunks; chunk++)
            for (int64_t i = 0; i < w.bias_floats; i++) w.grad_bias[i] += w.grad_bias[chunk * w.bias_floats + i];
        if (w.chunks) exchange_bias(&w, NULL, w.grad_bias, grad_table);
    }
    free_windows(&w);
    return failed;
}

/* --- category attention ------------------------------------------------------------------------------------------- */

/* Stable order of n tokens by category, the pure ones last; returns how many are not pure, or -1 without memory.
 * A counting sort on 11 bits at a time: one pass for up to 2048 categories. */
static int64_t sort_tokens(int64_t n, const int64_t *category, const uint8_t *pure, int32_t *order) {
    enum { BITS = 11, BINS = 1 << BITS };
    int64_t active = 0, low = 0, high = 0;
    for (int64_t t = 0; t < n; t++) {
        if (pure && pure[t]) continue;
        if (!active || category[t] < low) low = category[t];
        if (!active || category[t] > high) high = category[t];
        order[active++] = (int32_t)t;
    }
    for (int64_t t = 0, at = active; pure && t < n; t++)
        if (pure[t]) order[at++] = (int32_t)t;
    const uint64_t range = (uint64_t)high - (uint64_t)low;
    int32_t *sorted = range ? take(active * sizeof(int32_t)) : NULL;
    if (range && !sorted) return -1;
    for (int shift = 0; shift < 64 && range >> shift; shift += BITS) {
        int64_t start[BINS + 1] = {0};
#define BIN(t) ((((uint64_t)category[t] - (uint64_t)low) >> shift) & (BINS - 1))
        for (int64_t i = 0; i < active; i++) start[BIN(order[i]) + 1]++;
        for (int i = 0; i < BINS; i++) start[i + 1] += start[i];
        for (int64_t i = 0; i < active; i++) sorted[start[BIN(order[i])]++] = order[i];
#undef BIN
        memcpy(order, sorted, active * sizeof(int32_t));
    }
    free(sorted);
    return active;
}

struct categories {
    int64_t batch, tokens, channels, heads, size, keep;
    float scale;
    const float *qkv, *grad_out; /* the latter in the backward alone */
    float *out, *lse, *grad_qkv;
    const int64_t *category; /* this one and the next in the forward alone */
    const uint8_t *pure;
    int32_t *order, *counts;
    int64_t *first_group; /* (batch + 1): number of the first group of an image */
    float *grad_fill;     /* (batch, heads, size, 2, dim): gradients of the keys that fill up the last group */
    double *grad_scale;   /* (groups, heads) */
};

static int64_t group_size(const struct categories *c, int64_t image) { return smaller(c->counts[image], c->size); }

static int64_t group_count(const struct categories *c, int64_t image) {
    const int64_t g = group_size(c, image);
    return g ? (c->counts[image] + g - 1) / g : 0;
}

/* Order of the tokens of an image, and what its pure tokens get; counts is -1 if there was not enough memory. */
static void sort_task(void *context, int64_t image, struct desk desk) {
    (void)desk;
    const struct categories *c = context;
    const int64_t n = c->tokens, start = image * n, channels = c->channels;
    const uint8_t *pure = c->pure ? c->pure + start : NULL;
    const int64_t active = sort_tokens(n, c->category + start, pure, c->order + start);
    c->counts[image] = (int32_t)active;
    for (int64_t t = 0; pure && t < n; t++) {
        if (!pure[t]) continue;
        float *row = c->out + (start + t) * channels;
        if (c->keep)
            memcpy(row, c->qkv + (start + t) * 3 * channels + 2 * channels, channels * sizeof(float));
        else
            memset(row, 0, channels * sizeof(float));
        for (int64_t h = 0; h < c->heads; h++) c->lse[(image * c->heads + h) * n + t] = 0;
    }
}

static void group_task(void *context, int64_t task, struct desk desk) {
    const struct categories *c = context;
    int64_t image = 0;
    while (c->first_group[image + 1] <= task) image++;
    const int64_t n = c->counts[image], g = group_size(c, image), first = (task - c->first_group[image]) * g;
    const int64_t channels = c->channels, dim = channels / c->heads;
    const int32_t *order = c->order + image * c->tokens;
    for (int64_t i = first; i < first + g; i++) desk.token[i - first] = order[i < n ? i : 2 * n - 1 - i];
    for (int64_t h = 0; h < c->heads; h++) {
        const int64_t at = image * c->tokens * 3 * channels + h * dim, to = image * c->tokens * channels + h * dim;
        struct attention a = {.q = c->qkv + at, .k = c->qkv + at + channels, .v = c->qkv + at + 2 * channels,
                              .qkv_stride = 3 * channels, .token = desk.token, .queries = smaller(g, n - first),
                              .keys = g, .dim = dim, .scale = c->scale, .out = c->out + to, .out_stride = channels,
                              .lse = c->lse + (image * c->heads + h) * c->tokens, .scratch = desk.scratch};
        if (!c->grad_out) {
            targets[current].kernels->forward(&a);
            continue;
        }
        a.grad_out = c->grad_out + to;
        a.grad_q = c->grad_qkv + at;
        a.grad_k = c->grad_qkv + at + channels;
        a.grad_v = c->grad_qkv + at + 2 * channels;
        a.grad_fill = c->grad_fill + (image * c->heads + h) * c->size * 2 * dim;
        a.grad_scale = c->grad_scale + task * c->heads + h;
        targets[current].kernels->backward(&a);
    }
}

/* The groups of all images, both directions. Returns 0, or -1 if there is not enough memory. */
static int attend_groups(struct categories *c, int64_t threads) {
    int64_t most = 0;
    c->first_group = take((c->batch + 1) * sizeof(int64_t));
    if (!c->first_group) return -1;
    c->first_group[0] = 0;
    for (int64_t b = 0; b < c->batch; b++) {
        c->first_group[b + 1] = c->first_group[b] + group_count(c, b);
        most = larger(most, group_size(c, b));
    }
    const int64_t groups = c->first_group[c->batch];
    if (c->grad_out) {
        c->grad_scale = take(groups * c->heads * sizeof(double));
        c->grad_fill = take(c->batch * c->size * 2 * c->channels * sizeof(float));
        if (!c->grad_scale || !c->grad_fill) return -1;
    }
    return for_each(groups, threads, most, c->channels / c->heads, c, group_task);
}

static void free_categories(struct categories *c) {
    free(c->first_group);
    free(c->grad_fill);
    free(c->grad_scale);
}

/* qkv (batch, tokens, 3 channels), category (batch, tokens), pure (batch, tokens) or NULL -> out (batch, tokens,
 * channels), lse (batch, heads, tokens), order (batch, tokens), counts (batch). keep: a pure token gets its own value,
 * else zeros. Returns 0, or -1 if there is not enough memory. */
int ppsr_category_forward(const float *qkv, const int64_t *category, const uint8_t *pure, float scale, float *out,
                          float *lse, int32_t *order, int32_t *counts, int64_t batch, int64_t tokens, int64_t channels,
                          int64_t heads, int64_t size, int64_t keep, int64_t threads) {
    struct categories c = {.batch = batch, .tokens = tokens, .channels = channels, .heads = heads, .size = size,
                           .keep = keep, .scale = scale, .qkv = qkv, .out = out, .lse = lse, .category = category,
                           .pure = pure, .order = order, .counts = counts};
    int failed = for_each(batch, threads, 0, 0, &c, sort_task);
    for (int64_t b = 0; b < batch && !failed; b++)
        if (counts[b] < 0) failed = -1;
    if (!failed) failed = attend_groups(&c, threads);
    free_categories(&c);
    return failed;
}

/* The rows that no group has written, and the second share of those that fill up a group. */
static void finish_gradients(const struct categories *c) {
    const int64_t channels = c->channels, dim = channels / c->heads;
    for (int64_t b = 0; b < c->batch; b++) {
        const int64_t n = c->counts[b], fill = group_count(c, b) * group_size(c, b) - n;
        for (int64_t i = n; i < c->tokens; i++) { /* pure */
            const int64_t t = b * c->tokens + c->order[b * c->tokens + i];
            memset(c->grad_qkv + t * 3 * channels, 0, 3 * channels * sizeof(float));
            if (c->keep)
                memcpy(c->grad_qkv + t * 3 * channels + 2 * channels, c->grad_out + t * channels,
                       channels * sizeof(float));
        }
        for (int64_t i = 0; i < fill; i++)
            for (int64_t h = 0; h < c->heads; h++) {
                const float *grad = c->grad_fill + ((b * c->heads + h) * c->size + i) * 2 * dim;
                const int64_t t = b * c->tokens + c->order[b * c->tokens + n - 1 - i];
                float *row = c->grad_qkv + t * 3 * channels + h * dim;
                for (int64_t d = 0; d < dim; d++) {
                    row[channels + d] += grad[d];
                    row[2 * channels + d] += grad[dim + d];
                }
            }
    }
}

/* ... and grad_out like out -> grad_qkv like qkv, grad_scale (1). */
int ppsr_category_backward(const float *grad_out, const float *qkv, const float *out, const float *lse,
                           const int32_t *order, const int32_t *counts, float scale, float *grad_qkv,
                           double *grad_scale, int64_t batch, int64_t tokens, int64_t channels, int64_t heads,
                           int64_t size, int64_t keep, int64_t threads) {
    struct categories c = {.batch = batch, .tokens = tokens, .channels = channels, .heads = heads,
                           .size = smaller(size, tokens), .keep = keep, .scale = scale, .qkv = qkv,
                           .grad_out = grad_out, .out = (float *)out, .lse = (float *)lse, .grad_qkv = grad_qkv,
                           .order = (int32_t *)order, .counts = (int32_t *)counts};
    const int failed = attend_groups(&c, threads);
    *grad_scale = 0;
    if (!failed) {
        for (int64_t i = 0; i < c.first_group[batch] * heads; i++) *grad_scale += c.grad_scale[i];
        finish_gradients(&c);
    }
    free_categories(&c);
    return failed;
}
