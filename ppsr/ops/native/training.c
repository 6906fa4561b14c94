/* The loops around the kernels of training: layout of the weights, who works on which tokens or rows, how the gradients
 * of parameters are put together. The tasks depend on the sizes alone, and their sums are added up in order: the same
 * gradients with any number of threads. The definitions are the PyTorch code in ppsr/ops/linear.py and depthwise.py. */

#include "training.h"

#include <stdlib.h>
#include <string.h>

#include "runtime.h"

enum {
    RUN = 10 * CHUNK, /* tokens of a task, at least */
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
    const int64_t run = larger(RUN, padded((tokens + MOST_TASKS - 1) / MOST_TASKS, CHUNK));
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
