/* The loops around the kernels of training: layout of the weights, who works on which tokens or rows, how the gradients
 * of parameters are put together. The tasks depend on the sizes alone, and their sums are added up in order: the same
 * gradients with any number of threads. The definitions are the PyTorch code in ppsr/ops/linear.py and depthwise.py. */

#include "training.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

enum {
    RUN = 4 * STRETCH, /* tokens of a task, at least */
    MOST_TASKS = 64,  /* of linear layers: each has a copy of the gradients of the weights */
    STRIP = 16,       /* rows of a task of the convolution: their neighbours above and below are read with them */
};

/* total[i] = sum over tasks of sums (tasks, count); in place of those of the first task. */
static void add_up(float *sums, int64_t tasks, int64_t count) {
    for (int64_t i = 0; i < count && tasks > 1; i += LANES) {
        double total[LANES] = {0};
        for (int64_t t = 0; t < tasks; t++)
            for (int64_t l = 0; l < LANES; l++) total[l] += sums[t * count + i + l];
        for (int64_t l = 0; l < LANES; l++) sums[i + l] = (float)total[l];
    }
}

/* --- linear layers ------------------------------------------------------------------------------------------------ */

struct linear_loop {
    struct linear_gradient linear;
    int64_t tokens, run; /* tokens of a task */
    float *sums;         /* (tasks, count) */
    int64_t count;
};

static void linear_task(void *context, int64_t task, int more, void *scratch) {
    (void)more;
    const struct linear_loop *loop = context;
    float *sums = loop->sums + task * loop->count;
    memset(sums, 0, loop->count * sizeof(float));
    ppsr_training_kernels()->linear(&loop->linear, task * loop->run, smaller((task + 1) * loop->run, loop->tokens),
                                    scratch, sums);
}

/* Of y = GELU(norm(x) weight' + bias), and of a second layer on the same tokens or NULL; norm_weight and norm_bias NULL
 * for no norm. x (tokens, in), weight (width, in), bias (width), grad (tokens, width) -> gradients of all of them. */
int ppsr_linear_backward(const float *grad, const float *grad2, const float *x, const float *norm_weight,
                         const float *norm_bias, const float *weight, const float *bias, const float *weight2,
                         const float *bias2, float *grad_x, float *grad_norm_weight, float *grad_norm_bias,
                         float *grad_weight, float *grad_bias, float *grad_weight2, float *grad_bias2, float eps,
                         int64_t tokens, int64_t in, int64_t width, int64_t width2, int64_t has_gelu, int64_t threads) {
    const int64_t outs = width + width2, wide_in = padded(in, LANES), wide_out = padded(outs, LANES);
    const int64_t run = larger(RUN, padded((tokens + MOST_TASKS - 1) / MOST_TASKS, STRETCH));
    const int64_t tasks = (tokens + run - 1) / run, count = outs * wide_in + wide_out;
    float *packed = ppsr_take((outs * wide_in + (in + 1) * wide_out) * sizeof(float));
    float *sums = ppsr_take(tasks * count * sizeof(float));
    int failed = packed && sums ? 0 : -1;
    if (!failed) {
        float *by_in = packed + outs * wide_in, *biases = by_in + in * wide_out;
        memset(packed, 0, (outs * wide_in + (in + 1) * wide_out) * sizeof(float));
        for (int64_t o = 0; o < outs; o++) {
            const float *row = o < width ? weight + o * in : weight2 + (o - width) * in;
            double sum = o < width ? bias[o] : bias2[o - width];
            for (int64_t i = 0; i < in; i++) {
                const float w = norm_weight ? row[i] * norm_weight[i] : row[i];
                packed[o * wide_in + i] = by_in[i * wide_out + o] = w;
                if (norm_bias) sum += (double)row[i] * norm_bias[i];
            }
            biases[o] = (float)sum;
        }
        struct linear_loop loop = {
            {x, in, wide_in, norm_weight ? eps : -1, weight2 ? 2 : 1, {width, width2}, outs, wide_out, {grad, grad2},
             packed, has_gelu ? by_in : NULL, biases, grad_x},
            tokens, run, sums, count};
        failed = ppsr_for_each(tasks, threads, linear_gradient_floats(&loop.linear) * sizeof(float), &loop, linear_task);
    }
    if (!failed) {
        add_up(sums, tasks, count);
        if (norm_weight) {
            memset(grad_norm_weight, 0, in * sizeof(float));
            memset(grad_norm_bias, 0, in * sizeof(float));
        }
        for (int64_t o = 0; o < outs; o++) { /* what the weights of the norm have to do with it */
            const float *from = sums + o * wide_in, db = sums[outs * wide_in + o];
            const float *row = o < width ? weight + o * in : weight2 + (o - width) * in;
            float *to = o < width ? grad_weight + o * in : grad_weight2 + (o - width) * in;
            *(o < width ? grad_bias + o : grad_bias2 + o - width) = db;
            for (int64_t i = 0; i < in; i++) {
                to[i] = norm_weight ? from[i] * norm_weight[i] + db * norm_bias[i] : from[i];
                if (norm_weight) grad_norm_weight[i] += from[i] * row[i], grad_norm_bias[i] += db * row[i];
            }
        }
    }
    free(packed);
    free(sums);
    return failed;
}

/* --- depthwise convolution ---------------------------------------------------------------------------------------- */

struct depthwise_loop {
    struct depthwise_gradient image; /* the first; the others follow it in memory */
    int64_t tasks;                   /* of an image */
    float *sums;                     /* (images, tasks, count), or NULL: forward */
    int64_t count;
};

static void depthwise_task(void *context, int64_t task, int more, void *scratch) {
    (void)more;
    const struct depthwise_loop *loop = context;
    struct depthwise_gradient d = loop->image;
    const int64_t skip = task / loop->tasks * d.height * d.width * d.channels;
    const int64_t begin = task % loop->tasks * STRIP, end = smaller(begin + STRIP, d.height);
    d.u += skip;
    d.slope += skip;
    if (loop->sums) {
        d.grad += skip;
        d.grad_u += skip;
        ppsr_training_kernels()->depthwise_backward(&d, begin, end, scratch, loop->sums + task * loop->count);
    } else {
        d.out += skip;
        ppsr_training_kernels()->depthwise_forward(&d, begin, end, scratch);
    }
}

static int for_each_strip(struct depthwise_loop *loop, int64_t batch, int64_t threads) {
    const int64_t floats = depthwise_gradient_floats(&loop->image, smaller(STRIP, loop->image.height));
    return ppsr_for_each(batch * loop->tasks, threads, floats * sizeof(float), loop, depthwise_task);
}

/* u (batch, height, width, channels), weight (channels, kernel, kernel), bias (channels), kernel odd -> out = u + GELU(z)
 * and slope, the derivative of GELU at z, like u. */
int ppsr_depthwise_training(const float *u, const float *weight, const float *bias, float *out, float *slope,
                            int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t kernel,
                            int64_t threads) {
    const int64_t taps = kernel * kernel, wide = padded(channels, LANES);
    float *by_tap = ppsr_take((taps + 1) * wide * sizeof(float)); /* and the bias */
    if (!by_tap) return -1;
    memset(by_tap, 0, (taps + 1) * wide * sizeof(float));
    for (int64_t c = 0; c < channels; c++) {
        for (int64_t t = 0; t < taps; t++) by_tap[t * wide + c] = weight[c * taps + t];
        by_tap[taps * wide + c] = bias[c];
    }
    struct depthwise_loop loop = {{.u = u, .height = height, .width = width, .channels = channels, .wide = wide,
                                   .kernel = kernel, .weight = by_tap, .bias = by_tap + taps * wide, .out = out,
                                   .slope = slope},
                                  (height + STRIP - 1) / STRIP, NULL, 0};
    const int failed = for_each_strip(&loop, batch, threads);
    free(by_tap);
    return failed;
}

/* The same, slope from the forward, grad like u -> gradients of u, weight and bias. */
int ppsr_depthwise_backward(const float *grad, const float *u, const float *slope, const float *weight, float *grad_u,
                            float *grad_weight, float *grad_bias, int64_t batch, int64_t height, int64_t width,
                            int64_t channels, int64_t kernel, int64_t threads) {
    const int64_t taps = kernel * kernel, wide = padded(channels, LANES), count = (taps + 1) * wide;
    const int64_t tasks = (height + STRIP - 1) / STRIP;
    float *by_tap = ppsr_take(taps * wide * sizeof(float)), *sums = ppsr_take(batch * tasks * count * sizeof(float));
    int failed = by_tap && sums ? 0 : -1;
    if (!failed) {
        memset(by_tap, 0, taps * wide * sizeof(float));
        for (int64_t c = 0; c < channels; c++) /* the way back: left and right, above and below change places */
            for (int64_t t = 0; t < taps; t++) by_tap[t * wide + c] = weight[c * taps + taps - 1 - t];
        struct depthwise_loop loop = {{.u = u, .height = height, .width = width, .channels = channels, .wide = wide,
                                       .kernel = kernel, .weight = by_tap, .slope = (float *)slope, .grad = grad,
                                       .grad_u = grad_u},
                                      tasks, sums, count};
        failed = for_each_strip(&loop, batch, threads);
    }
    if (!failed) {
        add_up(sums, batch * tasks, count);
        for (int64_t c = 0; c < channels; c++) {
            for (int64_t t = 0; t < taps; t++) grad_weight[c * taps + t] = sums[t * wide + c];
            grad_bias[c] = sums[taps * wide + c];
        }
    }
    free(by_tap);
    free(sums);
    return failed;
}

/* --- tokens and dictionary ---------------------------------------------------------------------------------------- */

enum pass { ATTEND, ATTEND_BACKWARD, MOMENTS, REFINE, REFINE_BACKWARD, NORMALISE_BACKWARD };

struct dictionary_loop {
    enum pass pass;
    int64_t batch, tasks, run; /* images, tasks of an image, tokens of a task */
    struct dictionary_gradient *image;
    float *laid_out; /* (batch, room): matrices that belong to an image, rows filled up with zeros */
    int64_t room;
    float *sums; /* (batch, tasks, count) */
    int64_t count;
    struct dictionary_sums *moments; /* (batch, tasks, entries) */
};

static void dictionary_task(void *context, int64_t task, int more, void *scratch) {
    (void)more;
    const struct dictionary_loop *loop = context;
    const struct training_kernels *kernels = ppsr_training_kernels();
    const struct dictionary_gradient *d = loop->image + task / loop->tasks;
    const int64_t begin = task % loop->tasks * loop->run, end = smaller(begin + loop->run, d->tokens);
    float *sums = loop->sums + task * loop->count;
    if (loop->pass == MOMENTS) {
        struct dictionary_sums *moments = loop->moments + task * d->entries;
        for (int64_t m = 0; m < d->entries; m++) moments[m] = (struct dictionary_sums){0, 0, INFINITY, -INFINITY};
        kernels->moments(d, begin, end, moments);
        return;
    }
    if (loop->count) memset(sums, 0, loop->count * sizeof(float));
    switch (loop->pass) {
    case ATTEND: kernels->attend(d, begin, end, scratch); break;
    case ATTEND_BACKWARD: kernels->attend_backward(d, begin, end, scratch, sums); break;
    case REFINE: kernels->refine(d, begin, end, scratch, sums); break;
    case REFINE_BACKWARD: kernels->refine_backward(d, begin, end, scratch, sums); break;
    default: kernels->normalise_backward(d, begin, end);
    }
}

/* Room for `count` sums of each task, and `room` floats for each image; 0, or -1 for too little memory. */
static int prepare(struct dictionary_loop *loop, struct dictionary_gradient first, int64_t batch, int64_t count,
                   int64_t room) {
    const int64_t run = larger(RUN, padded((first.tokens + MOST_TASKS - 1) / MOST_TASKS, STRETCH));
    const int64_t tasks = (first.tokens + run - 1) / run;
    first.wide_rank = padded(first.rank, LANES);
    first.wide_entries = padded(first.entries, LANES);
    first.wide_channels = padded(first.channels, LANES);
    *loop = (struct dictionary_loop){.batch = batch, .tasks = tasks, .run = run, .count = count, .room = room};
    loop->image = malloc(batch * sizeof(struct dictionary_gradient));
    loop->laid_out = ppsr_take(batch * room * sizeof(float));
    loop->sums = ppsr_take(batch * tasks * count * sizeof(float));
    loop->moments = ppsr_take(batch * tasks * first.entries * sizeof(struct dictionary_sums));
    if (!loop->image || !loop->laid_out || !loop->sums || !loop->moments) return -1;
    memset(loop->laid_out, 0, batch * room * sizeof(float));
    for (int64_t b = 0; b < batch; b++) {
        struct dictionary_gradient d = first;
        const int64_t rank = b * d.tokens * d.rank, entries = b * d.tokens * d.entries, channels = b * d.tokens * d.channels;
        if (d.q) d.q += rank;
        if (d.grad_q) d.grad_q += rank;
        if (d.matrix) d.matrix += entries;
        if (d.grad_matrix) d.grad_matrix += entries;
        if (d.grad_p) d.grad_p += entries;
        if (d.out) d.out += channels;
        if (d.grad) d.grad += channels;
        if (d.x) d.x += channels;
        if (d.grad_x) d.grad_x += channels;
        if (d.category) d.category += b * d.tokens;
        loop->image[b] = d;
    }
    return 0;
}

static int run_pass(struct dictionary_loop *loop, enum pass pass, int64_t threads) {
    loop->pass = pass;
    return ppsr_for_each(loop->batch * loop->tasks, threads,
                         dictionary_gradient_floats(loop->image) * sizeof(float), loop, dictionary_task);
}

static void put_away(struct dictionary_loop *loop) {
    free(loop->image);
    free(loop->laid_out);
    free(loop->sums);
    free(loop->moments);
}

/* Matrix (rows, n) -> (rows, wide) at `to`, and transposed (n, wide_rows) at `across`, times a factor; either NULL. */
static void lay_out(const float *from, int64_t rows, int64_t n, float *to, int64_t wide, float *across,
                    int64_t wide_rows, float factor) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < n; j++) {
            if (to) to[i * wide + j] = from[i * n + j];
            if (across) across[j * wide_rows + i] = from[i * n + j] * factor;
        }
}

/* Keys and values of every image, laid out as the kernels take them. */
static void take_dictionary(struct dictionary_loop *loop, const float *k, const float *v) {
    for (int64_t b = 0; b < loop->batch; b++) {
        struct dictionary_gradient *d = loop->image + b;
        float *keys = loop->laid_out + b * loop->room, *by_rank = keys + d->entries * d->wide_rank;
        float *values = by_rank + d->rank * d->wide_entries, *by_channel = values + d->entries * d->wide_channels;
        lay_out(k + b * d->entries * d->rank, d->entries, d->rank, keys, d->wide_rank, by_rank, d->wide_entries,
                (float)LOG2_E);
        lay_out(v + b * d->entries * d->channels, d->entries, d->channels, values, d->wide_channels, by_channel,
                d->wide_entries, 1);
        d->k = keys, d->k_by_rank = by_rank, d->v = values, d->v_by_channel = by_channel;
    }
}

static int64_t dictionary_room(int64_t rank, int64_t entries, int64_t channels) {
    return entries * (padded(rank, LANES) + padded(channels, LANES)) + (rank + channels) * padded(entries, LANES);
}

/* q (batch, tokens, rank), k (batch, entries, rank), v (batch, entries, channels) -> out (batch, tokens, channels),
 * category (batch, tokens), matrix (batch, tokens, entries). */
int ppsr_dictionary_training(const float *q, const float *k, const float *v, float *out, int64_t *category,
                             float *matrix, int64_t batch, int64_t tokens, int64_t rank, int64_t entries,
                             int64_t channels, int64_t threads) {
    struct dictionary_loop loop;
    int failed = prepare(&loop,
                         (struct dictionary_gradient){.q = q, .tokens = tokens, .rank = rank, .entries = entries,
                                                      .channels = channels, .out = out, .category = category,
                                                      .matrix = matrix},
                         batch, 0, dictionary_room(rank, entries, channels));
    if (!failed) {
        take_dictionary(&loop, k, v);
        failed = run_pass(&loop, ATTEND, threads);
    }
    put_away(&loop);
    return failed;
}

/* grad like out, grad_matrix like matrix or NULL -> gradients of q, k and v. */
int ppsr_dictionary_backward(const float *grad, const float *grad_matrix, const float *q, const float *k,
                             const float *v, const float *matrix, float *grad_q, float *grad_k, float *grad_v,
                             int64_t batch, int64_t tokens, int64_t rank, int64_t entries, int64_t channels,
                             int64_t threads) {
    const int64_t of_v = entries * padded(channels, LANES), of_k = entries * padded(rank, LANES);
    struct dictionary_loop loop;
    int failed = prepare(&loop,
                         (struct dictionary_gradient){.q = q, .tokens = tokens, .rank = rank, .entries = entries,
                                                      .channels = channels, .matrix = (float *)matrix, .grad = grad,
                                                      .grad_matrix = grad_matrix, .grad_q = grad_q},
                         batch, of_v + of_k, dictionary_room(rank, entries, channels));
    if (!failed) {
        take_dictionary(&loop, k, v);
        failed = run_pass(&loop, ATTEND_BACKWARD, threads);
    }
    for (int64_t b = 0; b < batch && !failed; b++) {
        float *sums = loop.sums + b * loop.tasks * loop.count;
        add_up(sums, loop.tasks, loop.count);
        for (int64_t m = 0; m < entries; m++) {
            memcpy(grad_v + (b * entries + m) * channels, sums + m * padded(channels, LANES), channels * sizeof(float));
            memcpy(grad_k + (b * entries + m) * rank, sums + of_v + m * padded(rank, LANES), rank * sizeof(float));
        }
    }
    put_away(&loop);
    return failed;
}

enum { PIVOT, SLOPE, PEAK, SHARE, MEAN, FACTOR, STATISTICS }; /* rows of what the refinement keeps for its backward */

static void take_statistics(struct dictionary_gradient *d, const float *rows) {
    const int64_t wide = d->wide_entries;
    d->pivot = rows + PIVOT * wide, d->slope = rows + SLOPE * wide, d->peak = rows + PEAK * wide;
    d->share = rows + SHARE * wide, d->mean = rows + MEAN * wide, d->factor = rows + FACTOR * wide;
}

/* matrix (batch, tokens, entries), x (batch, tokens, channels), weight (entries) of the normalisation -> out (batch,
 * entries, channels), statistics (batch, STATISTICS, entries filled up to a multiple of 16), which begin at a multiple of
 * 64 bytes. */
int ppsr_refinement_training(const float *matrix, const float *x, const float *weight, float *out, float *statistics,
                             float eps, int64_t batch, int64_t tokens, int64_t entries, int64_t channels,
                             int64_t threads) {
    const int64_t wide = padded(entries, LANES), wide_channels = padded(channels, LANES), of_x = entries * wide_channels;
    struct dictionary_loop loop;
    int failed = prepare(&loop,
                         (struct dictionary_gradient){.tokens = tokens, .entries = entries, .channels = channels,
                                                      .rank = 1, .matrix = (float *)matrix, .x = x},
                         batch, of_x + wide, 0);
    memset(statistics, 0, batch * STATISTICS * wide * sizeof(float));
    for (int64_t b = 0; b < batch && !failed; b++) {
        memcpy(statistics + b * STATISTICS * wide, matrix + b * tokens * entries, entries * sizeof(float));
        take_statistics(loop.image + b, statistics + b * STATISTICS * wide);
    }
    if (!failed) failed = run_pass(&loop, MOMENTS, threads);
    for (int64_t i = 0; i < batch * entries && !failed; i++) {
        const int64_t b = i / entries, m = i % entries;
        float *rows = statistics + b * STATISTICS * wide + m;
        struct dictionary_sums all = loop.moments[b * loop.tasks * entries + m];
        for (int64_t t = 1; t < loop.tasks; t++) {
            const struct dictionary_sums *part = loop.moments + (b * loop.tasks + t) * entries + m;
            all.sum += part->sum, all.squares += part->squares;
            all.least = fminf(all.least, part->least), all.most = fmaxf(all.most, part->most);
        }
        const double mean = all.sum / (double)tokens, variance = all.squares / (double)tokens - mean * mean;
        const float factor = (float)(1 / sqrt((variance > 0 ? variance : variance * 0) + eps));
        const float slope = (float)(factor * weight[m] * LOG2_E);
        rows[MEAN * wide] = (float)mean;
        rows[FACTOR * wide] = factor;
        rows[SLOPE * wide] = slope;
        rows[PEAK * wide] = slope * (slope > 0 ? all.most : all.least);
    }
    if (!failed) failed = run_pass(&loop, REFINE, threads);
    for (int64_t b = 0; b < batch && !failed; b++) {
        float *sums = loop.sums + b * loop.tasks * loop.count;
        add_up(sums, loop.tasks, loop.count);
        for (int64_t m = 0; m < entries; m++) {
            const float share = 1 / sums[of_x + m];
            statistics[(b * STATISTICS + SHARE) * wide + m] = share;
            for (int64_t c = 0; c < channels; c++)
                out[(b * entries + m) * channels + c] = sums[m * wide_channels + c] * share;
        }
    }
    put_away(&loop);
    return failed;
}

/* grad like out, out and statistics from the forward -> gradients of matrix, x and weight. */
int ppsr_refinement_backward(const float *grad, const float *matrix, const float *x, const float *weight,
                             const float *out, const float *statistics, float *grad_matrix, float *grad_x,
                             float *grad_weight, int64_t batch, int64_t tokens, int64_t entries, int64_t channels,
                             int64_t threads) {
    const int64_t wide = padded(entries, LANES), wide_channels = padded(channels, LANES);
    struct dictionary_loop loop;
    int failed = prepare(&loop,
                         (struct dictionary_gradient){.tokens = tokens, .entries = entries, .channels = channels,
                                                      .rank = 1, .matrix = (float *)matrix, .x = x,
                                                      .grad_x = grad_x, .grad_p = grad_matrix},
                         batch, wide, entries * wide_channels + (channels + 3 + STATISTICS) * wide);
    for (int64_t b = 0; b < batch && !failed; b++) {
        struct dictionary_gradient *d = loop.image + b;
        const float *from = grad + b * entries * channels, *result = out + b * entries * channels;
        float *rows = loop.laid_out + b * loop.room, *by_channel = rows + entries * wide_channels;
        float *along = by_channel + channels * wide, *slant = along + wide, *scale = slant + wide;
        lay_out(from, entries, channels, rows, wide_channels, by_channel, wide, 1);
        float *rows_of_statistics = scale + wide; /* copied, since these are aligned */
        memcpy(rows_of_statistics, statistics + b * STATISTICS * wide, STATISTICS * wide * sizeof(float));
        take_statistics(d, rows_of_statistics);
        for (int64_t m = 0; m < entries; m++) {
            double sum = 0;
            for (int64_t c = 0; c < channels; c++) sum += (double)from[m * channels + c] * result[m * channels + c];
            along[m] = (float)sum;
            scale[m] = weight[m] * d->factor[m];
        }
        d->grad = rows, d->grad_by_channel = by_channel, d->along = along, d->slant = slant, d->scale = scale;
    }
    if (!failed) failed = run_pass(&loop, REFINE_BACKWARD, threads);
    if (!failed) memset(grad_weight, 0, entries * sizeof(float));
    for (int64_t b = 0; b < batch && !failed; b++) {
        float *sums = loop.sums + b * loop.tasks * loop.count;
        add_up(sums, loop.tasks, loop.count);
        for (int64_t m = 0; m < entries; m++) {
            grad_weight[m] += sums[m];
            ((float *)loop.image[b].slant)[m] = sums[m] / (float)tokens;
        }
    }
    loop.count = 0;
    if (!failed) failed = run_pass(&loop, NORMALISE_BACKWARD, threads);
    put_away(&loop);
    return failed;
}
