/* The heads of a group of tokens, one after the other, while the rows of the next group are on their way.
 *
 * A window is a list of tokens, and so is a category group; neither is ever copied together as a map. */

#include "groups.h"

#include <stddef.h>

int ppsr_for_each_group(int64_t groups, int64_t threads, const struct maps *m, void *context,
                        void (*body)(void *, int64_t, int, void *)) {
    const int64_t floats = 4 * padded(m->most, LANES) + scratch_floats(m->most, m->channels / m->heads);
    return ppsr_for_each(groups, threads, floats * sizeof(float), context, body);
}

struct desk ppsr_set_up(const struct maps *m, void *scratch, int more) {
    const int64_t room = padded(m->most, LANES);
    int32_t *list = scratch;
    return (struct desk){{.token = list, .place = list + room}, {.token = list + 2 * room, .place = list + 3 * room},
                         (float *)(list + 4 * room), more};
}

/* Part h of all heads of what the next group will read and write: rows that lie anywhere in the map. */
static void prefetch(const struct maps *m, const struct group *next, int64_t h) {
    const int64_t c = m->channels, start = next->image * m->tokens;
    if (!next->queries) return;
    for (int64_t i = next->keys * h / m->heads; i < next->keys * (h + 1) / m->heads; i++) {
        const int64_t t = start + next->token[i];
        const int asks = m->grad_out || !m->pure || !m->pure[t];
        prefetch_floats(m->qkv + 3 * t * c + (asks ? 0 : c), (asks ? 3 : 2) * c);
        if (asks) prefetch_floats(m->out + t * c, c);
        if (!m->grad_out) continue;
        prefetch_floats(m->grad_out + t * c, c);
        prefetch_floats(m->grad_qkv + 3 * t * c, 3 * c);
    }
    for (int64_t i = 0; m->lse && i < next->queries; i++)
        __builtin_prefetch(m->lse + (next->image * m->heads + h) * m->tokens +
                           next->token[next->height ? next->place[i] : i], 0, 2);
}

void ppsr_attend(const struct maps *m, const struct desk *desk, const struct extras *extras) {
    const struct group *group = &desk->group;
    const int64_t c = m->channels, dim = c / m->heads;
    for (int64_t h = 0; h < m->heads; h++) {
        if (desk->more) prefetch(m, &desk->next, h);
        const int64_t at = group->image * m->tokens * 3 * c + h * dim, to = group->image * m->tokens * c + h * dim;
        struct attention a = {.q = m->qkv + at, .k = m->qkv + at + c, .v = m->qkv + at + 2 * c, .qkv_stride = 3 * c,
                              .token = group->token, .queries = group->queries, .keys = group->keys, .dim = dim,
                              .scale = extras->scale, .bias_start = extras->bias_start, .out = m->out + to,
                              .out_stride = c, .scratch = desk->scratch};
        if (m->lse) a.lse = m->lse + (group->image * m->heads + h) * m->tokens;
        if (extras->bias) a.bias = extras->bias + h * extras->bias_step;
        if (!m->grad_out && group->height) {
            a.place = group->place;
            a.offsets = extras->offsets + h * extras->offsets_step;
            a.height = group->height;
            a.width = group->width;
            a.size = extras->size;
        }
        if (m->grad_out && m->pure) a.pure = m->pure + group->image * m->tokens;
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
