/* Groups of tokens that attend to each other: what windows and categories share. */
#ifndef PPSR_GROUPS_H
#define PPSR_GROUPS_H

#include "runtime.h"

/* The members of a group: `keys` tokens of an image, the first `queries` of them also queries. */
struct group {
    int64_t image, queries, keys, asking; /* asking: of windows */
    int32_t *token, *place; /* place: which members are the queries, where not all ask */
    int64_t height, width;  /* of a rectangle where not all ask, else 0 */
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
    float *out, *lse, *grad_qkv; /* ..., (batch, heads, tokens), like qkv; no lse: it is not wanted */
    const uint8_t *pure;         /* (batch, tokens), or NULL: of windows */
    int64_t most;                /* tokens of the largest group */
};

/* What differs between the operators: see struct attention. Of head h is what lies h * step after the pointer. */
struct extras {
    float scale;
    const float *offsets; /* of a head; the heads follow each other at offsets_step */
    int64_t offsets_step, size;
    const float *bias;
    float *grad_bias, *grad_fill;
    const int64_t *bias_start;
    int64_t bias_step, fill_step;
    double *grad_scale; /* step 1 */
};

/* Runs body for every group as ppsr_for_each does, with scratch for a desk. Returns 0, or -1 without enough memory. */
int ppsr_for_each_group(int64_t groups, int64_t threads, const struct maps *m, void *context,
                        void (*body)(void *context, int64_t task, int more, void *scratch));

/* The desk in a thread's scratch; its groups are to be listed. */
struct desk ppsr_set_up(const struct maps *m, void *scratch, int more);

/* All heads of the desk's group, forward, or backward if there is a grad_out. */
void ppsr_attend(const struct maps *m, const struct desk *desk, const struct extras *extras);

#endif
