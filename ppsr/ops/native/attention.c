/* The loops around the kernels of attention: which tokens form a group, who works on it, where the results go.
 *
 * The two operators differ only in that. A window is a list of tokens, and so is a category group; neither is ever
 * copied together as a map. The definitions are the reference.py of each operator.
 *
 * Shifted windows: after the cyclic shift the windows of the last row and column hold tokens from both ends of the map,
 * and the logits across are masked. Read in the original map, that is a grid of plain rectangles with its cuts at
 * 0, shift, shift + ws, ...: tokens of different rectangles never attend to each other, so nothing is masked here.
 * (The definition adds -100 instead: a factor of e^-100, below what a float32 sum can hold.)
 */

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

#define LOG2_E 1.44269504088896341

/* --- the heads of a group ----------------------------------------------------------------------------------------- */

/* The members of a group: `keys` tokens of an image, the first `queries` of them also queries. */
struct group {
    int64_t image, queries, keys;
    int32_t *token;
};

/* What a thread works with. */
struct desk {
    struct group group, next; /* each with room for the largest group */
    float *scratch;           /* for one head of it */
    int more;                 /* the same thread has the next task, too */
};

/* The tensors of either operator; those that a direction does not use are NULL. */
struct maps {
    int64_t batch, tokens, channels, heads;
    const float *qkv, *grad_out; /* (batch, tokens, 3 channels), (batch, tokens, channels) */
    float *out, *lse, *grad_qkv; /* ..., (batch, heads, tokens), like qkv */
    int64_t most;                /* tokens of the largest group */
};

/* What differs between the operators: see struct attention. Of head h is what lies h * step after the pointer. */
struct extras {
    float scale;
    const float *bias;
    float *grad_bias, *grad_fill;
    const int64_t *bias_start;
    int64_t bias_step, fill_step;
    double *grad_scale; /* step 1 */
};

static int for_each_group(int64_t groups, int64_t threads, const struct maps *m, void *context,
                          void (*body)(void *, int64_t, int, void *)) {
    const int64_t floats = 2 * padded(m->most, LANES) + scratch_floats(m->most, m->channels / m->heads);
    return ppsr_for_each(groups, threads, floats * sizeof(float), context, body);
}

static struct desk set_up(const struct maps *m, void *scratch, int more) {
    int32_t *token = scratch, *next = token + padded(m->most, LANES);
    return (struct desk){{.token = token}, {.token = next}, (float *)(next + padded(m->most, LANES)), more};
}

static void prefetch_rows(const float *x, int64_t floats, const int32_t *token, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
        for (int64_t f = 0; f < floats; f += 16) __builtin_prefetch(x + token[i] * floats + f, 0, 2);
}

/* Part h of all heads of what the next group will read and write: rows that lie anywhere in the map. */
static void prefetch(const struct maps *m, const struct group *next, int64_t h) {
    const int64_t c = m->channels, start = next->image * m->tokens;
    const int64_t begin = next->keys * h / m->heads, end = next->keys * (h + 1) / m->heads;
    prefetch_rows(m->qkv + start * 3 * c, 3 * c, next->token, begin, end);
    prefetch_rows(m->out + start * c, c, next->token, begin, end);
    prefetch_rows(m->lse + (next->image * m->heads + h) * m->tokens, 1, next->token, 0, next->queries);
    if (!m->grad_out) return;
    prefetch_rows(m->grad_out + start * c, c, next->token, begin, end);
    prefetch_rows(m->grad_qkv + start * 3 * c, 3 * c, next->token, begin, end);
}

static void attend(const struct maps *m, const struct desk *desk, const struct extras *extras) {
    const struct group *group = &desk->group;
    const int64_t c = m->channels, dim = c / m->heads;
    for (int64_t h = 0; h < m->heads; h++) {
        if (desk->more) prefetch(m, &desk->next, h);
        const int64_t at = group->image * m->tokens * 3 * c + h * dim, to = group->image * m->tokens * c + h * dim;
        struct attention a = {.q = m->qkv + at, .k = m->qkv + at + c, .v = m->qkv + at + 2 * c, .qkv_stride = 3 * c,
                              .token = group->token, .queries = group->queries, .keys = group->keys, .dim = dim,
                              .scale = extras->scale, .bias_start = extras->bias_start, .out = m->out + to,
                              .out_stride = c, .lse = m->lse + (group->image * m->heads + h) * m->tokens,
                              .scratch = desk->scratch};
        if (extras->bias) a.bias = extras->bias + h * extras->bias_step;
        if (!m->grad_out) {
            ppsr_attention_kernels()->forward(&a);
            continue;
        }
        a.grad_out = m->grad_out + to;
        a.grad_q = m->grad_qkv + at;
        a.grad_k = m->grad_qkv + at + c;
        a.grad_v = m->grad_qkv + at + 2 * c;
        if (extras->grad_bias) a.grad_bias = extras->grad_bias + h * extras->bias_step;
        if (extras->grad_fill) a.grad_fill = extras->grad_fill + h * extras->fill_step;
        if (extras->grad_scale) a.grad_scale = extras->grad_scale + h;
        ppsr_attention_kernels()->backward(&a);
    }
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
    struct maps maps;
    int64_t height, width, size, shift;
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
    s->slot = ppsr_take(width * sizeof(int64_t));
    s->start = ppsr_take(blocks * sizeof(int64_t));
    if (!s->slot || !s->start) return -1;
    for (int64_t x = 0; x < width; x++) s->slot[x] = -1;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t y = b * LANES / width, x = b * LANES % width;
        if (s->slot[x] < 0) s->slot[x] = s->slots++;
        s->start[b] = (s->slot[x] * (2 * height - 1) + height - 1 - y) * width * LANES;
    }
    s->floats = s->slots * (2 * height - 1) * width * LANES;
    s->offset = w->bias_floats;
    w->bias_floats += w->maps.heads * s->floats;
    return 0;
}

static int plan_windows(struct windows *w) {
    if (!w->maps.batch || !w->maps.tokens) return 0;
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
    w->bias = ppsr_take(w->bias_floats * sizeof(float));
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
        const int64_t heads = w->maps.heads;
        for (int64_t x = 0; x < s->width; x++)
            for (int64_t r = 0; s->slot[x] >= 0 && r < 2 * s->height - 1; r++)
                for (int64_t kx = 0; kx < s->width; kx++)
                    for (int lane = 0; lane < LANES; lane++) {
                        const int64_t row = table_row(w, s, x, r, kx, lane);
                        float *at = bias + s->offset +
                                    ((s->slot[x] * (2 * s->height - 1) + r) * s->width + kx) * LANES + lane;
                        for (int64_t h = 0; h < heads; h++, at += s->floats)
                            if (table)
                                *at = row < 0 ? 0 : table[row * heads + h] * (float)LOG2_E;
                            else if (row >= 0)
                                grad_table[row * heads + h] += *at;
                    }
    }
}

static int64_t rectangles(const struct windows *w) { return w->maps.batch * w->rows * w->columns; }

/* Lists the tokens of a rectangle and returns its shape. */
static const struct shape *list_rectangle(const struct windows *w, int64_t number, struct group *group) {
    const int64_t place = number % (w->rows * w->columns);
    int64_t height, width;
    const int64_t top = cut(w, w->height, place / w->columns, &height);
    const int64_t left = cut(w, w->width, place % w->columns, &width);
    group->image = number / (w->rows * w->columns);
    group->queries = group->keys = height * width;
    for (int64_t y = 0; y < height; y++)
        for (int64_t x = 0; x < width; x++) group->token[y * width + x] = (int32_t)((top + y) * w->width + left + x);
    return find_shape(w, height, width);
}

static void attend_rectangle(const struct windows *w, int64_t number, float *grad_bias, struct desk *desk) {
    const struct shape *s = list_rectangle(w, number, &desk->group);
    if (desk->more) list_rectangle(w, number + 1, &desk->next);
    struct extras extras = {.scale = 1 / sqrtf((float)(w->maps.channels / w->maps.heads)),
                            .bias = w->bias + s->offset, .bias_start = s->start, .bias_step = s->floats,
                            .grad_bias = grad_bias ? grad_bias + s->offset : NULL};
    attend(&w->maps, desk, &extras);
}

static void window_forward_task(void *context, int64_t task, int more, void *scratch) {
    const struct windows *w = context;
    struct desk desk = set_up(&w->maps, scratch, more);
    attend_rectangle(w, task, NULL, &desk);
}

static void window_backward_task(void *context, int64_t chunk, int more, void *scratch) {
    const struct windows *w = context;
    struct desk desk = set_up(&w->maps, scratch, more);
    const int64_t all = rectangles(w), end = all * (chunk + 1) / w->chunks;
    float *grad_bias = w->grad_bias + chunk * w->bias_floats;
    memset(grad_bias, 0, w->bias_floats * sizeof(float));
    for (int64_t i = all * chunk / w->chunks; i < end; i++) {
        desk.more = i + 1 < end;
        attend_rectangle(w, i, grad_bias, &desk);
    }
}

/* qkv (batch, height, width, 3 channels), table ((2 size - 1)^2, heads) -> out (batch, height, width, channels), lse
 * (batch, heads, height, width). Returns 0, or -1 if there is not enough memory. */
int ppsr_window_forward(const float *qkv, const float *table, float *out, float *lse, int64_t batch, int64_t height,
                        int64_t width, int64_t channels, int64_t heads, int64_t size, int64_t shift, int64_t threads) {
    struct windows w = {.maps = {batch, height * width, channels, heads, .qkv = qkv, .out = out, .lse = lse,
                                 .most = size * size},
                        .height = height, .width = width, .size = size, .shift = shift};
    ppsr_expect(out, batch * height * width * channels);
    int failed = plan_windows(&w);
    if (!failed) {
        exchange_bias(&w, table, w.bias, NULL);
        failed = for_each_group(rectangles(&w), threads, &w.maps, &w, window_forward_task);
    }
    free_windows(&w);
    return failed;
}

/* ... and grad_out like out -> grad_qkv like qkv, grad_table like table, in double. */
int ppsr_window_backward(const float *grad_out, const float *qkv, const float *out, const float *lse,
                         const float *table, float *grad_qkv, double *grad_table, int64_t batch, int64_t height,
                         int64_t width, int64_t channels, int64_t heads, int64_t size, int64_t shift,
                         int64_t threads) {
    struct windows w = {.maps = {batch, height * width, channels, heads, .qkv = qkv, .grad_out = grad_out,
                                 .out = (float *)out, .lse = (float *)lse, .grad_qkv = grad_qkv, .most = size * size},
                        .height = height, .width = width, .size = size, .shift = shift};
    ppsr_expect(grad_qkv, batch * height * width * 3 * channels);
    memset(grad_table, 0, (2 * size - 1) * (2 * size - 1) * heads * sizeof(double));
    int failed = plan_windows(&w);
    if (!failed) {
        /* at least 8, so that up to 8 threads give the very same sums */
        w.chunks = smaller(larger(threads, 8), rectangles(&w));
        w.grad_bias = ppsr_take(w.chunks * w.bias_floats * sizeof(float));
        failed = w.grad_bias ? 0 : -1;
    }
    if (!failed) {
        exchange_bias(&w, table, w.bias, NULL);
        failed = for_each_group(w.chunks, threads, &w.maps, &w, window_backward_task);
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
    int32_t *sorted = range ? ppsr_take(active * sizeof(int32_t)) : NULL;
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
    struct maps maps;
    int64_t size, keep;
    float scale;
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

/* Order of the tokens of an image; counts is -1 if there was not enough memory. */
static void sort_task(void *context, int64_t image, int more, void *scratch) {
    (void)more, (void)scratch;
    const struct categories *c = context;
    const int64_t n = c->maps.tokens, start = image * n;
    const uint8_t *pure = c->pure ? c->pure + start : NULL;
    c->counts[image] = (int32_t)sort_tokens(n, c->category + start, pure, c->order + start);
}

/* What the pure tokens of an image get, a share of them at a time. */
enum { SHARES = 16 };

static void pure_task(void *context, int64_t task, int more, void *scratch) {
    (void)more, (void)scratch;
    const struct categories *c = context;
    const struct maps *m = &c->maps;
    const int64_t image = task / SHARES, share = task % SHARES, n = m->tokens, active = c->counts[image];
    const int64_t channels = m->channels, start = image * n, end = active + (n - active) * (share + 1) / SHARES;
    for (int64_t i = active + (n - active) * share / SHARES; i < end; i++) {
        const int64_t t = c->order[start + i];
        float *row = m->out + (start + t) * channels;
        if (c->keep)
            memcpy(row, m->qkv + (start + t) * 3 * channels + 2 * channels, channels * sizeof(float));
        else
            memset(row, 0, channels * sizeof(float));
        for (int64_t h = 0; h < m->heads; h++) m->lse[(image * m->heads + h) * n + t] = 0;
    }
}

/* Lists the tokens of a group, those that fill it up at the end. */
static void list_group(const struct categories *c, int64_t number, struct group *group) {
    int64_t image = 0;
    while (c->first_group[image + 1] <= number) image++;
    const int64_t n = c->counts[image], g = group_size(c, image), first = (number - c->first_group[image]) * g;
    const int32_t *order = c->order + image * c->maps.tokens;
    for (int64_t i = first; i < first + g; i++) group->token[i - first] = order[i < n ? i : 2 * n - 1 - i];
    group->image = image;
    group->queries = smaller(g, n - first);
    group->keys = g;
}

static void group_task(void *context, int64_t task, int more, void *scratch) {
    const struct categories *c = context;
    struct desk desk = set_up(&c->maps, scratch, more);
    const int64_t fill_step = c->size * 2 * (c->maps.channels / c->maps.heads);
    list_group(c, task, &desk.group);
    if (more) list_group(c, task + 1, &desk.next);
    struct extras extras = {.scale = c->scale, .fill_step = fill_step};
    if (c->grad_fill) extras.grad_fill = c->grad_fill + desk.group.image * c->maps.heads * fill_step;
    if (c->grad_scale) extras.grad_scale = c->grad_scale + task * c->maps.heads;
    attend(&c->maps, &desk, &extras);
}

/* The groups of all images, both directions. Returns 0, or -1 if there is not enough memory. */
static int attend_groups(struct categories *c, int64_t threads) {
    c->first_group = ppsr_take((c->maps.batch + 1) * sizeof(int64_t));
    if (!c->first_group) return -1;
    c->first_group[0] = 0;
    for (int64_t b = 0; b < c->maps.batch; b++) {
        c->first_group[b + 1] = c->first_group[b] + group_count(c, b);
        c->maps.most = larger(c->maps.most, group_size(c, b));
    }
    const int64_t groups = c->first_group[c->maps.batch];
    if (c->maps.grad_out) {
        c->grad_scale = ppsr_take(groups * c->maps.heads * sizeof(double));
        c->grad_fill = ppsr_take(c->maps.batch * c->size * 2 * c->maps.channels * sizeof(float));
        if (!c->grad_scale || !c->grad_fill) return -1;
    }
    return for_each_group(groups, threads, &c->maps, c, group_task);
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
    struct categories c = {.maps = {batch, tokens, channels, heads, .qkv = qkv, .out = out, .lse = lse},
                           .size = size, .keep = keep, .scale = scale, .category = category, .pure = pure,
                           .order = order, .counts = counts};
    ppsr_expect(out, batch * tokens * channels);
    int failed = ppsr_for_each(batch, threads, 0, &c, sort_task);
    for (int64_t b = 0; b < batch && !failed; b++)
        if (counts[b] < 0) failed = -1;
    if (!failed && pure) failed = ppsr_for_each(batch * SHARES, threads, 0, &c, pure_task);
    if (!failed) failed = attend_groups(&c, threads);
    free_categories(&c);
    return failed;
}

/* The rows that no group has written, and the second share of those that fill up a group. */
static void finish_gradients(const struct categories *c) {
    const int64_t channels = c->maps.channels, dim = channels / c->maps.heads;
    for (int64_t b = 0; b < c->maps.batch; b++) {
        const int64_t n = c->counts[b], fill = group_count(c, b) * group_size(c, b) - n;
        for (int64_t i = n; i < c->maps.tokens; i++) { /* pure */
            const int64_t t = b * c->maps.tokens + c->order[b * c->maps.tokens + i];
            memset(c->maps.grad_qkv + t * 3 * channels, 0, 3 * channels * sizeof(float));
            if (c->keep)
                memcpy(c->maps.grad_qkv + t * 3 * channels + 2 * channels, c->maps.grad_out + t * channels,
                       channels * sizeof(float));
        }
        for (int64_t i = 0; i < fill; i++)
            for (int64_t h = 0; h < c->maps.heads; h++) {
                const float *grad = c->grad_fill + ((b * c->maps.heads + h) * c->size + i) * 2 * dim;
                const int64_t t = b * c->maps.tokens + c->order[b * c->maps.tokens + n - 1 - i];
                float *row = c->maps.grad_qkv + t * 3 * channels + h * dim;
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
    struct categories c = {.maps = {batch, tokens, channels, heads, .qkv = qkv, .grad_out = grad_out,
                                    .out = (float *)out, .lse = (float *)lse, .grad_qkv = grad_qkv},
                           .size = smaller(size, tokens), .keep = keep, .scale = scale, .order = (int32_t *)order,
                           .counts = (int32_t *)counts};
    ppsr_expect(grad_qkv, batch * tokens * 3 * channels);
    const int failed = attend_groups(&c, threads);
    *grad_scale = 0;
    if (!failed) {
        for (int64_t i = 0; i < c.first_group[batch] * heads; i++) *grad_scale += c.grad_scale[i];
        finish_gradients(&c);
    }
    free_categories(&c);
    return failed;
}
