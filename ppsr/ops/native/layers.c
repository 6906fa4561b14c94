/* The loops around the kernels of layers: how weights are laid out, who works on which tokens, how sums are put
 * together. The definitions are the PyTorch code in ppsr/ops/linear.py, depthwise.py, dictionary.py. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

enum {
    RUN = 10 * CHUNK,   /* tokens of a task of linear layers */
    STRIP = 16,         /* rows of a task of what stands in for attention: 4 more are normalised for their means */
    LEAST = 64 * LANES, /* tokens of a task of the dictionary, at least */
    MOST_TASKS = 256,   /* of the dictionary, per image */
    SHORT = 16 * LANES, /* tokens whose sums are kept in float; longer sums are in double */
    LARGE = 1 << 21,    /* bytes of a map that will have left a core's own cache before anyone reads it */
};

/* --- linear layers ------------------------------------------------------------------------------------------------ */

struct linear_loop {
    struct linear linear;
    int64_t tokens;
};

static void linear_task(void *context, int64_t task, int more, void *scratch) {
    (void)more;
    const struct linear_loop *loop = context;
    ppsr_layer_kernels()->linear(&loop->linear, task * RUN, smaller((task + 1) * RUN, loop->tokens), scratch);
}

/* weight (width, in), bias (width) -> panels of 16 outputs, (in + 1) rows of 16 each with the bias behind all weights;
 * the weights of the LayerNorm that each `normal` inputs have passed go into both. Weights are laid out for the kernels.
 * Returns where the biases begin. */
static float *pack(const float *weight, const float *bias, const float *norm_weight, const float *norm_bias,
                   int64_t normal, int64_t in, int64_t width, float *packed) {
    const int64_t panels = padded(width, LANES) / LANES;
    float *biases = packed + panels * in * LANES;
    memset(packed, 0, panels * (in + 1) * LANES * sizeof(float));
    for (int64_t o = 0; o < width; o++) {
        double sum = bias ? bias[o] : 0;
        for (int64_t i = 0; i < in; i++) {
            const float w = weight[o * in + i];
            if (norm_bias) sum += (double)w * norm_bias[i % normal];
            packed[(o / LANES * in + i) * LANES + o % LANES] = norm_weight ? w * norm_weight[i % normal] : w;
        }
        biases[o] = (float)sum;
    }
    ppsr_layer_kernels()->lay_out(panels, in, packed);
    return biases;
}

/* Whether a map (tokens, stride) is to be written past the caches. */
static int streams(const float *out, int64_t tokens, int64_t stride) {
    return tokens * stride * (int64_t)sizeof(float) >= LARGE && stride % 16 == 0 && (uintptr_t)out % 64 == 0;
}

/* x (tokens, in), LayerNorm (in) twice or NULL, weight (width, in), bias (width) or NULL, a second layer of the same or
 * NULL -> out (tokens, width) and out2. To the first layer belong what is added, like out, or NULL; and rows (…, columns)
 * with row (tokens), or NULL: then out is (tokens, width + columns), and what is added with it. */
int ppsr_linear(const float *x, const float *norm_weight, const float *norm_bias, const float *weight,
                const float *bias, const float *weight2, const float *bias2, const float *add, const float *add2,
                const float *rows, const int64_t *row, float *out, float *out2, float eps, int64_t tokens, int64_t in,
                int64_t width, int64_t width2, int64_t columns, int64_t has_gelu, int64_t threads) {
    ppsr_expect(out, tokens * (width + columns));
    if (weight2) ppsr_expect(out2, tokens * width2);
    const int64_t floats = padded(width, LANES) * (in + 1);
    float *packed = ppsr_take((floats + padded(width2, LANES) * (in + 1)) * sizeof(float));
    if (!packed) return -1;
    const float *biases = pack(weight, bias, norm_weight, norm_bias, in, in, width, packed);
    const float *biases2 = weight2 ? pack(weight2, bias2, norm_weight, norm_bias, in, in, width2, packed + floats) : NULL;
    const struct part parts[2] = {
        {packed, biases, width, {add ? add : add2, add ? add2 : NULL}, out, width + columns, NULL,
         streams(out, tokens, width + columns)},
        {packed + floats, biases2, width2, {NULL, NULL}, out2, width2, NULL, streams(out2, tokens, width2)}};
    struct linear_loop loop = {{x, in, norm_weight ? eps : -1, has_gelu != 0, weight2 ? 2 : 1, parts, rows, row, columns},
                               tokens};
    const int failed =
        ppsr_for_each((tokens + RUN - 1) / RUN, threads, linear_floats(in) * sizeof(float), &loop, linear_task);
    free(packed);
    return failed;
}

/* The same where not every token wants everything: weight (first + rest, in), whose `first` outputs are for the tokens
 * marked in only_first, the others for those in only_rest, (tokens) each; a second layer for all, or NULL. Of the first
 * layer, the other rows of out, (tokens, first + rest), stay as they are; what is added may be `out` itself. */
int ppsr_linear_some(const float *x, const float *norm_weight, const float *norm_bias, const float *weight,
                     const float *bias, const float *weight2, const float *bias2, const float *add, const float *add2,
                     const uint8_t *only_first, const uint8_t *only_rest, float *out, float *out2, float eps,
                     int64_t tokens, int64_t in, int64_t first, int64_t rest, int64_t width2, int64_t threads) {
    const int64_t widths[PARTS] = {first, rest, width2};
    const float *weights[PARTS] = {weight, weight + first * in, weight2};
    const float *biases[PARTS] = {bias, bias + first, bias2};
    const uint8_t *only[PARTS] = {only_first, only_rest, NULL};
    struct part parts[PARTS];
    int64_t floats = 0, used = 0;
    for (int i = 0; i < PARTS; i++) floats += padded(widths[i], LANES) * (in + 1);
    float *packed = ppsr_take(floats * sizeof(float)), *to = packed;
    if (!packed) return -1;
    for (int i = 0; i < PARTS; i++) {
        if (!widths[i]) continue;
        const float *packed_bias = pack(weights[i], biases[i], norm_weight, norm_bias, in, in, widths[i], to);
        float *results = i < 2 ? out + i * first : out2;
        const int64_t stride = i < 2 ? first + rest : width2;
        parts[used++] = (struct part){to, packed_bias, widths[i], {NULL, NULL}, results, stride, only[i],
                                      streams(results, tokens, stride)};
        to += padded(widths[i], LANES) * (in + 1);
    }
    parts->add[0] = add ? add : add2;
    parts->add[1] = add ? add2 : NULL;
    struct linear_loop loop = {{x, in, norm_weight ? eps : -1, 0, used, parts, NULL, NULL, 0}, tokens};
    const int failed =
        ppsr_for_each((tokens + RUN - 1) / RUN, threads, linear_floats(in) * sizeof(float), &loop, linear_task);
    free(packed);
    return failed;
}

/* --- what stands in for attention --------------------------------------------------------------------------------- */

struct stand_in_loop {
    struct stand_in image; /* the first; the others follow it in memory */
    int64_t tasks;         /* of an image */
};

static void stand_in_task(void *context, int64_t task, int more, void *scratch) {
    (void)more;
    const struct stand_in_loop *loop = context;
    struct stand_in image = loop->image;
    const int64_t number = task / loop->tasks, begin = task % loop->tasks * STRIP, skip = image.height * image.width;
    image.x += number * skip * image.channels;
    image.pure += number * skip;
    image.out += number * skip * image.channels;
    for (int a = 0; a < 2 && image.add[a]; a++) image.add[a] += number * skip * image.channels;
    ppsr_layer_kernels()->stand_in(&image, begin, smaller(begin + STRIP, image.height), scratch);
}

/* x, out and what is added (or NULL), all (batch, height, width, channels), weights of a LayerNorm (channels),
 * weight (channels, channels or twice as many), bias (channels), pure (batch, height, width), own, around: see struct
 * stand_in; writes the rows of out that are pure. */
int ppsr_linear_stand_in(const float *x, const float *norm_weight, const float *norm_bias, const float *weight,
                         const float *bias, const float *add, const float *add2, const uint8_t *pure, float *out,
                         float eps, int64_t own, int64_t around, int64_t batch, int64_t height, int64_t width,
                         int64_t channels, int64_t threads) {
    const int64_t in = (own + around) * channels;
    float *packed = ppsr_take(padded(channels, LANES) * (in + 1) * sizeof(float));
    if (!packed) return -1;
    const float *biases = pack(weight, bias, norm_weight, norm_bias, channels, in, channels, packed);
    struct stand_in_loop loop = {{x, height, width, channels, eps, (int)own, (int)around, packed, biases,
                                  {add ? add : add2, add ? add2 : NULL}, pure, out},
                                 (height + STRIP - 1) / STRIP};
    const int failed = ppsr_for_each(batch * loop.tasks, threads, stand_in_floats(width, channels) * sizeof(float),
                                     &loop, stand_in_task);
    free(packed);
    return failed;
}

/* --- depthwise convolution ---------------------------------------------------------------------------------------- */

static void depthwise_task(void *context, int64_t task, int more, void *scratch) {
    (void)more, (void)scratch;
    struct depthwise image = *(const struct depthwise *)context;
    const int64_t skip = task / image.height * image.height * image.width * image.channels;
    image.u += skip;
    image.out += skip;
    ppsr_layer_kernels()->depthwise(&image, task % image.height);
}

/* u (batch, height, width, channels), weight (channels, kernel, kernel), bias (channels) -> out like u; channels >= 16,
 * kernel odd. */
int ppsr_depthwise(const float *u, const float *weight, const float *bias, float *out, int64_t batch, int64_t height,
                   int64_t width, int64_t channels, int64_t kernel, int64_t threads) {
    ppsr_expect(out, batch * height * width * channels);
    const int64_t taps = kernel * kernel;
    float *by_tap = ppsr_take(taps * channels * sizeof(float));
    if (!by_tap) return -1;
    for (int64_t c = 0; c < channels; c++)
        for (int64_t t = 0; t < taps; t++) by_tap[t * channels + c] = weight[c * taps + t];
    struct depthwise d = {u, by_tap, bias, height, width, channels, kernel, out,
                          streams(out, batch * height * width, channels)};
    const int failed = ppsr_for_each(batch * height, threads, 0, &d, depthwise_task);
    free(by_tap);
    return failed;
}

/* --- tokens and dictionary ---------------------------------------------------------------------------------------- */

struct dictionary_loop {
    struct dictionary image; /* the first; the others follow it in memory */
    int64_t length, tasks;   /* tokens of a task, tasks of an image */
    struct moments *moments; /* (batch, tasks, entries), of the refinement */
    double *sums;            /* (batch, tasks, ...): per task (panels, entries, 16), then (entries) weights alone */
};

static int64_t panels_of(const struct dictionary *d) { return padded(d->channels, LANES) / LANES; }

/* How many sums there are of a task, without and with the weights; rows begin at multiples of 64 bytes. */
static int64_t sums_of(const struct dictionary *d) { return d->entries * panels_of(d) * LANES; }
static int64_t sums_and_weights_of(const struct dictionary *d) { return sums_of(d) + padded(d->entries, LANES); }

static struct dictionary_loop plan(struct dictionary image) {
    const int64_t length = larger(LEAST, padded((image.tokens + MOST_TASKS - 1) / MOST_TASKS, LANES));
    return (struct dictionary_loop){image, length, (image.tokens + length - 1) / length, NULL, NULL};
}

/* The image of a task and its tokens. */
static struct dictionary locate(const struct dictionary_loop *loop, int64_t task, int64_t *begin, int64_t *end) {
    struct dictionary d = loop->image;
    const int64_t image = task / loop->tasks;
    *begin = task % loop->tasks * loop->length;
    *end = smaller(*begin + loop->length, d.tokens);
    d.q += image * d.tokens * d.rank;
    d.k += image * d.entries * d.rank;
    if (d.v) d.v += image * d.entries * panels_of(&d) * LANES;
    if (d.out) d.out += image * d.tokens * d.channels;
    if (d.category) d.category += image * d.tokens;
    if (d.x) d.x += image * d.tokens * d.channels;
    if (d.pivot) d.pivot += image * d.entries;
    if (d.slope) d.slope += image * d.entries;
    if (d.peak) d.peak += image * d.entries;
    return d;
}

static int for_each_part(struct dictionary_loop *loop, int64_t batch, int64_t threads,
                         void (*body)(void *, int64_t, int, void *)) {
    const int64_t floats = dictionary_floats(loop->image.rank, loop->image.entries) + sums_and_weights_of(&loop->image);
    return ppsr_for_each(batch * loop->tasks, threads, floats * sizeof(float), loop, body);
}

static void attend_task(void *context, int64_t task, int more, void *scratch) {
    (void)more;
    int64_t begin, end;
    const struct dictionary d = locate(context, task, &begin, &end);
    ppsr_layer_kernels()->attend(&d, begin, end, scratch);
}

/* q (batch, tokens, rank), k (batch, entries, rank) in units of log 2, v (batch, entries, channels) -> out (batch,
 * tokens, channels), category (batch, tokens). */
int ppsr_dictionary_attention(const float *q, const float *k, const float *v, float *out, int64_t *category,
                              int64_t batch, int64_t tokens, int64_t rank, int64_t entries, int64_t channels,
                              int64_t threads) {
    ppsr_expect(out, batch * tokens * channels);
    const int64_t panels = padded(channels, LANES) / LANES;
    float *packed = ppsr_take(batch * panels * entries * LANES * sizeof(float));
    if (!packed) return -1;
    memset(packed, 0, batch * panels * entries * LANES * sizeof(float));
    for (int64_t i = 0; i < batch * entries * channels; i++) {
        const int64_t image = i / channels / entries, m = i / channels % entries, c = i % channels;
        packed[((image * panels + c / LANES) * entries + m) * LANES + c % LANES] = v[i];
    }
    struct dictionary_loop loop = plan((struct dictionary){
        .q = q, .k = k, .tokens = tokens, .rank = rank, .entries = entries, .channels = channels, .v = packed,
        .out = out, .stream = streams(out, batch * tokens, channels), .category = category});
    const int failed = for_each_part(&loop, batch, threads, attend_task);
    free(packed);
    return failed;
}

static void moments_task(void *context, int64_t task, int more, void *scratch) {
    (void)more;
    const struct dictionary_loop *loop = context;
    int64_t begin, end;
    const struct dictionary d = locate(loop, task, &begin, &end);
    struct moments *moments = loop->moments + task * d.entries;
    for (int64_t m = 0; m < d.entries; m++) moments[m] = (struct moments){0, 0, INFINITY, -INFINITY};
    for (; begin < end; begin += SHORT)
        ppsr_layer_kernels()->moments(&d, begin, smaller(begin + SHORT, end), scratch, moments);
}

static void refine_task(void *context, int64_t task, int more, void *scratch) {
    (void)more;
    const struct dictionary_loop *loop = context;
    int64_t begin, end;
    const struct dictionary d = locate(loop, task, &begin, &end);
    const int64_t count = sums_and_weights_of(&d);
    float *some = scratch; /* sums over a few tokens */
    double *sums = loop->sums + task * count;
    for (int64_t i = 0; i < count; i++) sums[i] = 0;
    for (; begin < end; begin += SHORT) {
        memset(some, 0, count * sizeof(float));
        ppsr_layer_kernels()->refine(&d, begin, smaller(begin + SHORT, end), some + count, some, some + sums_of(&d));
        for (int64_t i = 0; i < count; i++) sums[i] += some[i];
    }
}

/* Mean and variance of the similarities, the largest of what they weigh -> slope and peak of the weights. */
static void weigh(const struct dictionary_loop *loop, int64_t image, const float *weight, const float *bias, float eps,
                  float *slope, float *peak) {
    const int64_t entries = loop->image.entries;
    for (int64_t m = 0; m < entries; m++) {
        double sum = 0, squares = 0;
        float least = INFINITY, most = -INFINITY;
        for (int64_t t = 0; t < loop->tasks; t++) {
            const struct moments *part = loop->moments + (image * loop->tasks + t) * entries + m;
            sum += part->sum;
            squares += part->squares;
            least = fminf(least, part->least);
            most = fmaxf(most, part->most);
        }
        const double n = (double)loop->image.tokens, mean = sum / n, variance = squares / n - mean * mean;
        const double factor = weight[m] / sqrt((variance > 0 ? variance : variance * 0) + eps) / log(2);
        slope[image * entries + m] = (float)factor;
        /* the bias and the mean are the same for all tokens, so they do not change the weights; unless they are NaN */
        peak[image * entries + m] = (float)factor * (factor > 0 ? most : least) + 0 * bias[m];
    }
}

/* Softmax over the tokens of the normalised similarities, times x: q, k as above, x (batch, tokens, channels), weight
 * and bias (entries) of the normalisation -> out (batch, entries, channels). tokens >= 1. */
int ppsr_dictionary_refinement(const float *q, const float *k, const float *x, const float *weight, const float *bias,
                               float *out, float eps, int64_t batch, int64_t tokens, int64_t rank, int64_t entries,
                               int64_t channels, int64_t threads) {
    struct dictionary_loop loop = plan((struct dictionary){
        .q = q, .k = k, .tokens = tokens, .rank = rank, .entries = entries, .channels = channels, .x = x});
    const int64_t count = sums_and_weights_of(&loop.image);
    float *pivot = ppsr_take(3 * batch * entries * sizeof(float)); /* pivot, slope, peak */
    float *scratch = ppsr_take(dictionary_floats(rank, entries) * sizeof(float));
    loop.moments = ppsr_take(batch * loop.tasks * entries * sizeof(struct moments));
    loop.sums = ppsr_take(batch * loop.tasks * count * sizeof(double));
    int failed = pivot && scratch && loop.moments && loop.sums ? 0 : -1;
    if (!failed) {
        float *slope = pivot + batch * entries, *peak = slope + batch * entries;
        memset(pivot, 0, batch * entries * sizeof(float));
        loop.image.pivot = pivot;
        for (int64_t b = 0; b < batch; b++) { /* measured from 0, the sum over one token is its similarity */
            int64_t begin, end;
            const struct dictionary d = locate(&loop, b * loop.tasks, &begin, &end);
            for (int64_t m = 0; m < entries; m++) loop.moments[m] = (struct moments){0, 0, INFINITY, -INFINITY};
            ppsr_layer_kernels()->moments(&d, 0, 1, scratch, loop.moments);
            for (int64_t m = 0; m < entries; m++) pivot[b * entries + m] = (float)loop.moments[m].sum;
        }
        failed = for_each_part(&loop, batch, threads, moments_task);
        for (int64_t b = 0; b < batch; b++) weigh(&loop, b, weight, bias, eps, slope, peak);
        loop.image.slope = slope;
        loop.image.peak = peak;
    }
    if (!failed) failed = for_each_part(&loop, batch, threads, refine_task);
    for (int64_t b = 0; !failed && b < batch; b++) {
        double *sums = loop.sums + b * loop.tasks * count; /* of the first task, then of all */
        for (int64_t t = 1; t < loop.tasks; t++)
            for (int64_t i = 0; i < count; i++) sums[i] += sums[t * count + i];
        for (int64_t m = 0; m < entries; m++)
            for (int64_t c = 0; c < channels; c++)
                out[(b * entries + m) * channels + c] =
                    (float)(sums[(c / LANES * entries + m) * LANES + c % LANES] / sums[sums_of(&loop.image) + m]);
    }
    free(pivot);
    free(scratch);
    free(loop.moments);
    free(loop.sums);
    return failed;
}
