/* Window attention: which tokens form a window, and the bias of all pairs. The definition is
 * window_attention/reference.py.
 *
 * Shifted windows: after the cyclic shift the windows of the last row and column hold tokens from both ends of the map,
 * and the logits across are masked. Read in the original map, that is a grid of plain rectangles with its cuts at
 * 0, shift, shift + ws, ...: tokens of different rectangles never attend to each other, so nothing is masked here.
 * (The definition adds -100 instead: a factor of e^-100, below what a float32 sum can hold.) */

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "groups.h"

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
    int64_t height, width, size, shift, fill;
    int64_t rows, columns; /* of the grid of rectangles */
    struct shape shape[SHAPES];
    int shapes;
    int64_t bias_floats; /* all shapes, all heads */
    float *bias;         /* (bias_floats) */
    float *offsets;      /* (heads, offset_floats), where some tokens are pure: the table, see plan_offsets */
    int64_t offset_floats;
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

/* The bias table in units of log 2, head by head, columns in reverse: the biases of a query for the keys of a row, from
 * left to right, are then neighbours. Behind it is room to read vectors past the end. */
static int plan_offsets(struct windows *w, const float *table) {
    const int64_t side = 2 * w->size - 1, heads = w->maps.heads;
    if (!w->maps.pure) return 0;
    w->offset_floats = side * side + LANES;
    w->offsets = ppsr_take(heads * w->offset_floats * sizeof(float));
    if (!w->offsets) return -1;
    memset(w->offsets, 0, heads * w->offset_floats * sizeof(float));
    for (int64_t i = 0; i < side * side; i++)
        for (int64_t h = 0; h < heads; h++)
            w->offsets[h * w->offset_floats + i / side * side + side - 1 - i % side] =
                table[i * heads + h] * (float)LOG2_E;
    return 0;
}

static void free_windows(struct windows *w) {
    for (int i = 0; i < w->shapes; i++) {
        free(w->shape[i].slot);
        free(w->shape[i].start);
    }
    free(w->bias);
    free(w->offsets);
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

/* Lists who asks in a rectangle, in blocks of 16. A block of neighbours costs the same however many of them ask, one that
 * is put together from anywhere costs 1/4 more, for its bias: so what is nearly full stays as it is, and who asks in the
 * other blocks is put side by side if that takes less. */
static void list_queries(const struct windows *w, struct group *group) {
    const uint8_t *pure = w->maps.pure + group->image * w->maps.tokens;
    int64_t blocks = 0, few = 0; /* that hold one who asks but are not nearly full; who asks there */
    group->asking = group->queries = 0;
    for (int pass = 0; pass < 2; pass++) { /* what is nearly full, then the others */
        const int together = 5 * ((few + LANES - 1) / LANES) < 4 * blocks;
        for (int64_t first = 0; first < group->keys; first += LANES) {
            const int64_t end = smaller(first + LANES, group->keys);
            int64_t asking = 0;
            for (int64_t i = first; i < end; i++) asking += !pure[group->token[i]];
            const int nearly = end - first == LANES && 5 * asking >= 4 * LANES;
            if (!pass) {
                group->asking += asking;
                if (asking && !nearly) few += asking, blocks++;
            }
            if (!asking || nearly == pass) continue;
            for (int64_t i = first; i < end; i++)
                if (nearly || !together || !pure[group->token[i]]) group->place[group->queries++] = (int32_t)i;
        }
    }
}

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
    group->asking = group->keys;
    group->height = group->width = 0;
    if (w->maps.pure && !w->maps.grad_out) {
        group->height = height, group->width = width;
        list_queries(w, group);
    }
    return find_shape(w, height, width);
}

/* The rows of those that do not ask. */
static void clear_pure(const struct maps *m, const struct group *group) {
    const int64_t start = group->image * m->tokens;
    for (int64_t i = 0; i < group->keys; i++) {
        const int64_t t = group->token[i];
        if (!m->pure[start + t]) continue;
        memset(m->out + (start + t) * m->channels, 0, m->channels * sizeof(float));
        for (int64_t h = 0; m->lse && h < m->heads; h++) m->lse[(group->image * m->heads + h) * m->tokens + t] = 0;
    }
}

static void attend_rectangle(const struct windows *w, int64_t number, float *grad_bias, struct desk *desk) {
    const struct shape *s = list_rectangle(w, number, &desk->group);
    if (desk->more) list_rectangle(w, number + 1, &desk->next);
    struct extras extras = {.scale = 1 / sqrtf((float)(w->maps.channels / w->maps.heads)),
                            .offsets = w->offsets, .offsets_step = w->offset_floats, .size = w->size,
                            .bias = w->bias + s->offset, .bias_start = s->start, .bias_step = s->floats,
                            .grad_bias = grad_bias ? grad_bias + s->offset : NULL};
    if (desk->group.queries) ppsr_attend(&w->maps, desk, &extras);
    if (w->fill && desk->group.asking < desk->group.keys) clear_pure(&w->maps, &desk->group);
}

static void window_forward_task(void *context, int64_t task, int more, void *scratch) {
    const struct windows *w = context;
    struct desk desk = ppsr_set_up(&w->maps, scratch, more);
    attend_rectangle(w, task, NULL, &desk);
}

static void window_backward_task(void *context, int64_t chunk, int more, void *scratch) {
    const struct windows *w = context;
    struct desk desk = ppsr_set_up(&w->maps, scratch, more);
    const int64_t all = rectangles(w), end = all * (chunk + 1) / w->chunks;
    float *grad_bias = w->grad_bias + chunk * w->bias_floats;
    memset(grad_bias, 0, w->bias_floats * sizeof(float));
    for (int64_t i = all * chunk / w->chunks; i < end; i++) {
        desk.more = i + 1 < end;
        attend_rectangle(w, i, grad_bias, &desk);
    }
}

/* qkv (batch, height, width, 3 channels), table ((2 size - 1)^2, heads), pure (batch, height, width) or NULL -> out
 * (batch, height, width, channels), lse (batch, heads, height, width) or NULL; fill: with zeros where a token is pure.
 * Returns 0, or -1 if there is not enough memory. */
int ppsr_window_forward(const float *qkv, const float *table, const uint8_t *pure, float *out, float *lse,
                        int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t heads, int64_t size,
                        int64_t shift, int64_t fill, int64_t threads) {
    struct windows w = {.maps = {batch, height * width, channels, heads, .qkv = qkv, .out = out, .lse = lse, .pure = pure,
                                 .most = size * size},
                        .height = height, .width = width, .size = size, .shift = shift, .fill = fill};
    ppsr_expect(out, batch * height * width * channels);
    int failed = plan_windows(&w) || plan_offsets(&w, table) ? -1 : 0;
    if (!failed) {
        exchange_bias(&w, table, w.bias, NULL);
        failed = ppsr_for_each_group(rectangles(&w), threads, &w.maps, &w, window_forward_task);
    }
    free_windows(&w);
    return failed;
}

/* ... and grad_out like out -> grad_qkv like qkv, grad_table like table, in double. */
int ppsr_window_backward(const float *grad_out, const float *qkv, const float *out, const float *lse,
                         const float *table, const uint8_t *pure, float *grad_qkv, double *grad_table, int64_t batch, int64_t height,
                         int64_t width, int64_t channels, int64_t heads, int64_t size, int64_t shift,
                         int64_t threads) {
    struct windows w = {.maps = {batch, height * width, channels, heads, .qkv = qkv, .grad_out = grad_out,
                                 .out = (float *)out, .lse = (float *)lse, .grad_qkv = grad_qkv, .pure = pure,
                                 .most = size * size},
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
        failed = ppsr_for_each_group(w.chunks, threads, &w.maps, &w, window_backward_task);
        for (int64_t chunk = 1; chunk < w.chunks; chunk++)
            for (int64_t i = 0; i < w.bias_floats; i++) w.grad_bias[i] += w.grad_bias[chunk * w.bias_floats + i];
        if (w.chunks) exchange_bias(&w, NULL, w.grad_bias, grad_table);
    }
    free_windows(&w);
    return failed;
}
