/* Category attention: the order of the tokens, the groups that are cut from it, what pure tokens get. The definition is
 * category_attention/reference.py. */

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "groups.h"

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
        for (int64_t h = 0; m->lse && h < m->heads; h++) m->lse[(image * m->heads + h) * n + t] = 0;
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
    struct desk desk = ppsr_set_up(&c->maps, scratch, more);
    const int64_t fill_step = c->size * 2 * (c->maps.channels / c->maps.heads);
    list_group(c, task, &desk.group);
    if (more) list_group(c, task + 1, &desk.next);
    struct extras extras = {.scale = c->scale, .fill_step = fill_step};
    if (c->grad_fill) extras.grad_fill = c->grad_fill + desk.group.image * c->maps.heads * fill_step;
    if (c->grad_scale) extras.grad_scale = c->grad_scale + task * c->maps.heads;
    ppsr_attend(&c->maps, &desk, &extras);
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
    return ppsr_for_each_group(groups, threads, &c->maps, c, group_task);
}

static void free_categories(struct categories *c) {
    free(c->first_group);
    free(c->grad_fill);
    free(c->grad_scale);
}

/* qkv (batch, tokens, 3 channels), category (batch, tokens), pure (batch, tokens) or NULL -> out (batch, tokens,
 * channels), lse (batch, heads, tokens), order (batch, tokens), counts (batch). keep: a pure token gets its own value,
 * else zeros; fill: write that; lse may be NULL. Returns 0, or -1 if there is not enough
 * memory. */
int ppsr_category_forward(const float *qkv, const int64_t *category, const uint8_t *pure, float scale, float *out,
                          float *lse, int32_t *order, int32_t *counts, int64_t batch, int64_t tokens, int64_t channels,
                          int64_t heads, int64_t size, int64_t keep, int64_t fill, int64_t threads) {
    struct categories c = {.maps = {batch, tokens, channels, heads, .qkv = qkv, .out = out, .lse = lse},
                           .size = size, .keep = keep, .scale = scale, .category = category, .pure = pure,
                           .order = order, .counts = counts};
    ppsr_expect(out, batch * tokens * channels);
    int failed = ppsr_for_each(batch, threads, 0, &c, sort_task);
    for (int64_t b = 0; b < batch && !failed; b++)
        if (counts[b] < 0) failed = -1;
    if (!failed && pure && fill) failed = ppsr_for_each(batch * SHARES, threads, 0, &c, pure_task);
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
