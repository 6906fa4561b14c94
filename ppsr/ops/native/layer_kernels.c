/* What a layer does between its self-attentions, each a single pass over the tokens, float32: linear layers with their
 * neighbours, the depthwise convolution with its own, and the attention between tokens and dictionary. Maps have few
 * channels, 48 in ATD-light, so a product costs about as much as to read and write one: no intermediate result goes to
 * memory. */

#include "kernels.h"

#include <math.h>
#include <string.h>

#include "products.h"

/* --- linear layers ------------------------------------------------------------------------------------------------ */

/* Rows of x without their mean, over their standard deviation. */
INLINE void normalise(int64_t n, int64_t in, float eps, const float *x, float *y) {
    const int64_t whole = in / VL * VL;
    for (; n > 0; n--, x += in, y += in) {
        vf total = splat(0), squares = splat(0);
        float rest = 0;
        for (int64_t i = 0; i < whole; i += VL) total += load_anywhere(x + i);
        for (int64_t i = whole; i < in; i++) rest += x[i];
        const vf mean = (total_of(total) + rest) / (float)in;
        rest = 0;
        for (int64_t i = 0; i < whole; i += VL) {
            const vf d = load_anywhere(x + i) - mean;
            squares += d * d;
        }
        for (int64_t i = whole; i < in; i++) rest += (x[i] - mean[0]) * (x[i] - mean[0]);
        const float factor = 1 / sqrtf((total_of(squares)[0] + rest) / (float)in + eps);
        for (int64_t i = 0; i < whole; i += VL) store_anywhere(y + i, (load_anywhere(x + i) - mean) * factor);
        for (int64_t i = whole; i < in; i++) y[i] = (x[i] - mean[0]) * factor;
    }
}

/* n rows of x as the product takes them: words of them, at `to`, or they themselves. `to` may be x. */
INLINE const float *operand(int64_t n, int64_t in, const float *x, float *to) {
    if (!BFLOAT16) return x;
    if (in % 2 == 0)
        words_of_line(n * in, x, to);
    else
        for (int64_t i = 0; i < n; i++) {
            const float last[2] = {x[i * in + in - 1], 0};
            words_of_line(in - 1, x + i * in, to + i * WORDS(in));
            words_of_line(2, last, to + i * WORDS(in) + in / 2);
        }
    return to;
}

/* (panels, in, 16) of weights as the product takes them, (panels, WORDS(in), 16), in place. */
static void lay_out(int64_t panels, int64_t in, float *weight) {
    if (!BFLOAT16) return;
    for (int64_t p = 0; p < panels; p++)
        words_of_panel(in, weight + p * in * LANES, weight + p * WORDS(in) * LANES);
}

/* What is left to do with sums (rows, 16) of the last panel where it is not a whole one. */
static NOT_INLINE void finish_last(int rows, const float *sums, const struct part *part, int64_t column, int64_t first,
                                   const int64_t *token) {
    for (int i = 0; i < rows; i++)
        for (int64_t l = 0; l < part->width - column; l++) {
            const int64_t to = (token ? token[i] : first + i) * part->stride + column + l;
            float sum = sums[i * LANES + l];
            for (int a = 0; a < 2 && part->add[a]; a++) sum += part->add[a][to];
            part->out[to] = sum;
        }
}

/* How many lines of a row of x are fetched before the outputs from `column` on are worked on. */
INLINE int64_t lines_before(const struct linear *l, const struct part *part, int64_t column) {
    return (l->in * (column < part->width ? column : part->width) / part->width + LANES - 1) / LANES;
}

/* What the next chunk reads in the place of `rows` tokens is fetched little by little, while the sums are computed: all
 * at once would be more than the processor can wait for. Beyond the last row nothing is there, and nothing happens. */
INLINE void fetch_ahead(int rows, const struct linear *l, const struct part *part, int64_t column, int64_t first) {
    const int64_t next = first + CHUNK, last = lines_before(l, part, column + LANES);
    for (int64_t line = lines_before(l, part, column); line < last && part == l->part; line++)
        EACH(i, rows) __builtin_prefetch(l->x + (next + i) * l->in + line * LANES, 0, 2);
    for (int a = 0; a < 2 && part->add[a]; a++)
        EACH(i, rows) __builtin_prefetch(part->add[a] + (next + i) * part->stride + column, 0, 2);
}

/* `rows` <= BLOCK tokens of `depth` numbers or words, the 16 outputs of a part from `column` on, which exist if they
 * are `whole`; the tokens follow each other from number first on, or are the ones listed. */
INLINE void linear_block(int rows, int64_t depth, const float *x, const struct linear *l, int has_gelu,
                         const struct part *part, int64_t column, int whole, int64_t first, const int64_t *token) {
    const float *bias = part->bias + column;
    if (!token) fetch_ahead(rows, l, part, column, first);
    vf y[BLOCK][NV];
    EACH(i, rows)
        EACH(v, NV) y[i][v] = load(bias + v * VL);
    accumulate_of(BFLOAT16, rows, depth, part->weight + column * depth, x, depth, 1, y);
    if (has_gelu) EACH(i, rows) EACH(v, NV) y[i][v] = gelu(y[i][v]);
    if (!whole) {
        float sums[BLOCK * LANES] __attribute__((aligned(64)));
        EACH(i, rows) EACH(v, NV) store(sums + i * LANES + v * VL, y[i][v]);
        finish_last(rows, sums, part, column, first, token);
        return;
    }
    for (int a = 0; a < 2 && part->add[a]; a++)
        EACH(i, rows) {
            const float *add = part->add[a] + (token ? token[i] : first + i) * part->stride + column;
            EACH(v, NV) y[i][v] += load_anywhere(add + v * VL);
        }
    float *out = part->out + column;
    if (part->stream)
        EACH(i, rows) {
            float *to = out + (token ? token[i] : first + i) * part->stride;
            EACH(v, NV) stream(to + v * VL, y[i][v]);
        }
    else
        EACH(i, rows) {
            float *to = out + (token ? token[i] : first + i) * part->stride;
            EACH(v, NV) store_anywhere(to + v * VL, y[i][v]);
        }
}

INLINE void linear_panel(int64_t n, int64_t depth, const float *x, const struct linear *l, int has_gelu,
                         const struct part *part, int64_t column, int whole, int64_t first, const int64_t *token) {
    int64_t i = 0;
    for (; i + BLOCK <= n; i += BLOCK)
        linear_block(BLOCK, depth, x + i * depth, l, has_gelu, part, column, whole, first + i, token ? token + i : NULL);
    /* the rest in powers of two, to keep several accumulators going */
#pragma GCC unroll 4
    for (int step = 8; step; step /= 2)
        if (step < BLOCK && n - i >= step) {
            linear_block(step, depth, x + i * depth, l, has_gelu, part, column, whole, first + i,
                         token ? token + i : NULL);
            i += step;
        }
}

INLINE void linear_panels(int64_t n, int64_t depth, const float *x, const struct linear *l, int has_gelu,
                          const struct part *part, int64_t first, const int64_t *token) {
    int64_t column = 0;
    for (; column + LANES <= part->width; column += LANES)
        linear_panel(n, depth, x, l, has_gelu, part, column, 1, first, token);
    if (column < part->width) linear_panel(n, depth, x, l, has_gelu, part, column, 0, first, token);
}

/* A chunk of tokens, n rows of an operand, through a part: those of `l` from number first on, or those listed. */
static NOT_INLINE void linear_part(int64_t n, int64_t depth, const float *x, const struct part *part,
                                   const struct linear *l, int64_t first, const int64_t *token) {
    if (token)
        linear_panels(n, depth, x, NULL, 0, part, 0, token);
    else if (l->gelu)
        linear_panels(n, depth, x, l, 1, part, first, NULL);
    else
        linear_panels(n, depth, x, l, 0, part, first, NULL);
}

/* What will be read and written for a token of a part. */
INLINE void prefetch_token(const struct part *part, int64_t token) {
    for (int a = 0; a < 2 && part->add[a]; a++) prefetch_floats(part->add[a] + token * part->stride, part->width);
    if (!part->stream) prefetch_floats(part->out + token * part->stride, part->width);
}

/* Tokens of a part that wait until they are a chunk. */
struct queue {
    int64_t waiting, token[CHUNK];
    float *x; /* (CHUNK, in), or words of that */
};

static int64_t count(int64_t n, const uint8_t *is) {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += is[i];
    return sum;
}

static void linear(const struct linear *l, int64_t begin, int64_t end, float *scratch) {
    const int64_t depth = WORDS(l->in);
    struct queue queue[PARTS];
    for (int64_t p = 0; p < l->parts; p++) queue[p] = (struct queue){.x = scratch + (1 + p) * CHUNK * l->in};
    for (int64_t first = begin; first < end; first += CHUNK) {
        const int64_t n = end - first < CHUNK ? end - first : CHUNK;
        const int64_t next = first + CHUNK, soon = next < end ? (end - next < CHUNK ? end - next : CHUNK) : 0;
        int64_t wanted[PARTS], most = 0;
        for (int64_t p = 0; p < l->parts; p++) {
            wanted[p] = l->part[p].only ? count(n, l->part[p].only + first) : n;
            most = most > wanted[p] ? most : wanted[p];
        }
        if (!most) continue;
        if (wanted[0] < n) prefetch_floats(l->x + next * l->in, soon * l->in);
        const float *x = l->x + first * l->in;
        if (l->eps >= 0) {
            normalise(n, l->in, l->eps, x, scratch);
            x = scratch;
        }
        x = operand(n, l->in, x, scratch);
        for (int64_t p = 0; p < l->parts; p++) {
            const struct part *part = &l->part[p];
            struct queue *q = &queue[p];
            if (wanted[p] == n) {
                linear_part(n, depth, x, part, l, first, NULL);
                continue;
            }
            for (int64_t i = 0; i < n; i++) {
                if (!part->only[first + i]) continue;
                memcpy(q->x + q->waiting * depth, x + i * depth, depth * sizeof(float));
                q->token[q->waiting++] = first + i;
                prefetch_token(part, first + i);
                if (q->waiting < CHUNK) continue;
                linear_part(CHUNK, depth, q->x, part, NULL, 0, q->token);
                q->waiting = 0;
            }
        }
        for (int64_t t = first; t < first + n && l->rows; t++)
            for (int64_t i = 0; i < l->columns; i++)
                l->part->out[t * l->part->stride + l->part->width + i] = l->rows[l->row[t] * l->columns + i];
    }
    for (int64_t p = 0; p < l->parts; p++)
        if (queue[p].waiting) linear_part(queue[p].waiting, depth, queue[p].x, &l->part[p], NULL, 0, queue[p].token);
    stream_fence();
}

/* --- what stands in for attention ----------------------------------------------------------------------------------- */

enum { REACH = 2, SIDE = 2 * REACH + 1 }; /* of the mean around a token */

/* factor * the sum of some rows, n floats each. */
INLINE void sum_rows(int64_t n, int64_t rows, const float *const *row, float factor, float *sum) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vf total = load_anywhere(row[0] + i);
        for (int64_t r = 1; r < rows; r++) total += load_anywhere(row[r] + i);
        store_anywhere(sum + i, total * factor);
    }
    for (; i < n; i++) {
        float total = row[0][i];
        for (int64_t r = 1; r < rows; r++) total += row[r][i];
        sum[i] = total * factor;
    }
}

INLINE int64_t within(int64_t i, int64_t n) { return i < 0 ? 0 : i < n ? i : n - 1; }

static void stand_in(const struct stand_in *s, int64_t begin, int64_t end, float *scratch) {
    const int64_t c = s->channels, row = s->width * c, in = (s->own + s->around) * c, reach = s->around ? REACH : 0;
    float *normal = scratch, *sum = normal + SIDE * row, *rows = sum + row;
    const struct part part = {s->weight, s->bias, c, {s->add[0], s->add[1]}, s->out, c, NULL, 0};
    int64_t waiting = 0, ready = 0, token[CHUNK]; /* tokens in `rows`; the first row of the map that is not normalised */
    for (int64_t y = begin; y < end; y++) {
        const uint8_t *pure = s->pure + y * s->width;
        const uint8_t *found = memchr(pure, 1, s->width);
        if (!found) continue;
        const int64_t top = within(y - reach, s->height), bottom = within(y + reach, s->height);
        for (ready = ready > top ? ready : top; ready <= bottom; ready++)
            normalise(s->width, c, s->eps, s->x + ready * row, normal + ready % SIDE * row);
        int64_t summed = within(found - pure - REACH, s->width); /* the first column without a sum */
        for (int64_t x = found - pure; x < s->width; x++) {
            if (!pure[x]) continue;
            float *to = rows + waiting * in;
            if (s->own) {
                memcpy(to, normal + y % SIDE * row + x * c, c * sizeof(float));
                to += c;
            }
            if (s->around) {
                const int64_t left = within(x - REACH, s->width), right = within(x + REACH, s->width);
                const float *near[SIDE];
                summed = summed > left ? summed : left;
                if (summed <= right) {
                    const int64_t at = summed * c;
                    for (int64_t r = top; r <= bottom; r++) near[r - top] = normal + r % SIDE * row + at;
                    sum_rows((right + 1 - summed) * c, bottom + 1 - top, near, 1, sum + at);
                    summed = right + 1;
                }
                for (int64_t i = left; i <= right; i++) near[i - left] = sum + i * c;
                sum_rows(c, right + 1 - left, near, 1 / (float)((bottom + 1 - top) * (right + 1 - left)), to);
            }
            prefetch_token(&part, y * s->width + x);
            token[waiting++] = y * s->width + x;
            if (waiting < CHUNK) continue;
            linear_part(CHUNK, WORDS(in), operand(CHUNK, in, rows, rows), &part, NULL, 0, token);
            waiting = 0;
        }
    }
    if (waiting) linear_part(waiting, WORDS(in), operand(waiting, in, rows, rows), &part, NULL, 0, token);
}

/* --- depthwise convolution ---------------------------------------------------------------------------------------- */

enum { COLUMNS = 7 }; /* outputs that are worked on together, so that 7 sums and 7 weights fit 16 registers */

/* `n` neighbouring outputs from column x on, VL channels from c on. `inside`: no column is beyond the border. */
INLINE void depthwise_block(const struct depthwise *d, int n, int64_t kernel, int64_t y, int64_t x, int64_t c,
                            int inside) {
    const int64_t half = kernel / 2, channels = d->channels;
    vf sum[COLUMNS];
    EACH(i, n) sum[i] = load_anywhere(d->bias + c);
    for (int64_t ky = 0; ky < kernel; ky++) {
        if (y + ky < half || y + ky - half >= d->height) continue;
        const float *u = d->u + ((y + ky - half) * d->width + x - half) * channels + c;
        const float *weight = d->weight + ky * kernel * channels + c;
        if (inside) {
            vf w[COLUMNS];
            EACH(k, kernel) w[k] = load_anywhere(weight + k * channels);
            EACH(j, n + kernel - 1) {
                const vf near = load_anywhere(u + j * channels);
                EACH(i, n)
                    if (j >= i && j - i < kernel) sum[i] += near * w[j - i];
            }
        } else {
            for (int64_t k = 0; k < kernel; k++)
                EACH(i, n)
                    if (x + i + k >= half && x + i + k - half < d->width)
                        sum[i] += load_anywhere(u + (i + k) * channels) * load_anywhere(weight + k * channels);
        }
    }
    EACH(i, n) {
        const int64_t at = (y * d->width + x + i) * channels + c;
        const vf y = load_anywhere(d->u + at) + gelu(sum[i]);
        if (VL == LANES && d->stream) /* a shorter vector would be a part of a line, whose rest comes much later */
            stream(d->out + at, y);
        else
            store_anywhere(d->out + at, y);
    }
}

/* Where the next VL channels begin; at the end some are done twice if they do not fill a vector: it is the same result. */
INLINE int64_t next_channel(const struct depthwise *d, int64_t c) {
    return c + VL < d->channels && c + 2 * VL > d->channels ? d->channels - VL : c + VL;
}

/* Columns in which a kernel of known size fits into the map, COLUMNS at a time; the rest one by one. */
INLINE void depthwise_columns(const struct depthwise *d, int64_t kernel, int64_t y, int64_t begin, int64_t end) {
    const int64_t half = kernel / 2;
    for (int64_t c = 0; c < d->channels; c = next_channel(d, c))
        for (int64_t x = begin; x < end;)
            if (kernel <= COLUMNS && x >= half && x + COLUMNS <= end && x + COLUMNS + half <= d->width) {
                depthwise_block(d, COLUMNS, kernel, y, x, c, 1);
                x += COLUMNS;
            } else {
                depthwise_block(d, 1, kernel, y, x, c, 0);
                x++;
            }
}

static void depthwise(const struct depthwise *d, int64_t row) {
    enum { TOGETHER = 32 }; /* columns: few enough for the cache to keep their neighbourhood for all channels */
    for (int64_t x = 0; x < d->width; x += TOGETHER) {
        const int64_t end = x + TOGETHER < d->width ? x + TOGETHER : d->width;
        if (d->kernel == 7)
            depthwise_columns(d, 7, row, x, end);
        else if (d->kernel == 5)
            depthwise_columns(d, 5, row, x, end);
        else if (d->kernel == 3)
            depthwise_columns(d, 3, row, x, end);
        else
            for (int64_t c = 0; c < d->channels; c = next_channel(d, c))
                for (int64_t i = x; i < end; i++) depthwise_block(d, 1, d->kernel, row, i, c, 0);
    }
    stream_fence();
}

/* --- tokens and dictionary ---------------------------------------------------------------------------------------- */

/* Similarity of 16 tokens from `first` on (n of them exist) to all entries -> p (entries, 16); category may be NULL. */
INLINE void similarity(const struct dictionary *d, int64_t first, int64_t n, float *q, float *p, int64_t *category) {
    const int64_t rank = d->rank;
    float length[LANES] __attribute__((aligned(64))) = {0};
    if (n < LANES) memset(q, 0, rank * LANES * sizeof(float));
    for (int64_t l = 0; l < n; l++)
        for (int64_t i = 0; i < rank; i++) q[i * LANES + l] = d->q[(first + l) * rank + i];
    for (int64_t i = 0; i < rank; i++)
        EACH(v, NV) {
            const vf x = load(q + i * LANES + v * VL);
            store(length + v * VL, load(length + v * VL) + x * x);
        }
    for (int l = 0; l < LANES; l++) length[l] = sqrtf(length[l]);
    for (int64_t i = 0; i < rank; i++)
        EACH(v, NV) {
            const vf x = load(q + i * LANES + v * VL);
            store(q + i * LANES + v * VL, x / vmax(splat(1e-12f), load(length + v * VL)));
        }
    product(d->entries, rank, q, d->k, rank, 1, NULL, p);

    vf peak[NV], sum[NV];
    vi best[NV];
    EACH(v, NV) peak[v] = load(p + v * VL), sum[v] = splat(0), best[v] = (vi){0};
    for (int64_t m = 1; m < d->entries; m++)
        EACH(v, NV) {
            const vf x = load(p + m * LANES + v * VL);
            const vi above = x > peak[v];
            best[v] = (above & ((vi){0} + (int32_t)m)) | (~above & best[v]);
            peak[v] = vmax(x, peak[v]);
        }
    if (category)
        for (int64_t l = 0; l < n; l++) category[first + l] = best[l / VL][l % VL];
    int64_t m = 0;
    for (; m + IN_STEP / NV <= d->entries; m += IN_STEP / NV) exponentials(IN_STEP, p + m * LANES, peak, sum);
    for (; m < d->entries; m++) exponentials(NV, p + m * LANES, peak, sum);
    EACH(v, NV) sum[v] = 1.0f / sum[v];
    for (m = 0; m < d->entries; m++)
        EACH(v, NV) store(p + m * LANES + v * VL, load(p + m * LANES + v * VL) * sum[v]);
}

/* 1 for tokens that exist, else 0. */
INLINE void existing(int64_t n, vf *mask) {
    float lanes[LANES] __attribute__((aligned(64)));
    for (int l = 0; l < LANES; l++) lanes[l] = l < n;
    EACH(v, NV) mask[v] = load(lanes + v * VL);
}

static void attend(const struct dictionary *d, int64_t begin, int64_t end, float *scratch) {
    const int64_t entries = d->entries, channels = d->channels;
    float *q = scratch, *p = q + d->rank * LANES, *rows = p + entries * LANES;
    for (int64_t first = begin; first < end; first += LANES) {
        const int64_t n = end - first < LANES ? end - first : LANES;
        similarity(d, first, n, q, p, d->category);
        for (int64_t c = 0; c < channels; c += LANES) {
            product(LANES, entries, d->v + c * entries, p, 1, LANES, NULL, rows);
            const int64_t width = channels - c < LANES ? channels - c : LANES;
            for (int64_t l = 0; l < n; l++) {
                float *to = d->out + (first + l) * channels + c;
                if (d->stream)
                    EACH(v, NV) stream(to + v * VL, load(rows + l * LANES + v * VL));
                else if (width == LANES)
                    EACH(v, NV) store_anywhere(to + v * VL, load(rows + l * LANES + v * VL));
                else
                    memcpy(to, rows + l * LANES, width * sizeof(float));
            }
        }
    }
    stream_fence();
}

static void moments(const struct dictionary *d, int64_t begin, int64_t end, float *scratch, struct moments *result) {
    const int64_t entries = d->entries, all = entries * LANES;
    float *q = scratch, *p = q + d->rank * LANES, *sum = p + all, *squares = sum + all, *least = squares + all;
    float *most = least + all;
    memset(sum, 0, 2 * all * sizeof(float));
    for (int64_t i = 0; i < all; i++) least[i] = INFINITY, most[i] = -INFINITY;
    for (int64_t first = begin; first < end; first += LANES) {
        const int64_t n = end - first < LANES ? end - first : LANES;
        vf mask[NV];
        existing(n, mask);
        similarity(d, first, n, q, p, NULL);
        for (int64_t m = 0; m < entries; m++)
            EACH(v, NV) {
                const int64_t at = m * LANES + v * VL;
                /* lanes without a token: d = 0, which the sums do not feel and the first token has anyway */
                const vf x = (load(p + at) - d->pivot[m]) * mask[v];
                store(sum + at, load(sum + at) + x);
                store(squares + at, load(squares + at) + x * x);
                store(least + at, vmin(load(least + at), x));
                store(most + at, vmax(load(most + at), x));
            }
    }
    for (int64_t m = 0; m < entries; m++)
        for (int64_t at = m * LANES; at < (m + 1) * LANES; at++) {
            result[m].sum += sum[at];
            result[m].squares += squares[at];
            result[m].least = least[at] < result[m].least ? least[at] : result[m].least;
            result[m].most = most[at] > result[m].most ? most[at] : result[m].most;
        }
}

/* `count` vectors of similarities p, from entry m on -> weights, which are added to their totals. */
INLINE void weigh(const struct dictionary *d, int count, int64_t m, const vf *mask, float *p, float *total) {
    vf w[IN_STEP];
    EACH(i, count) {
        const int64_t of = m + i / NV;
        w[i] = (load(p + m * LANES + i * VL) - d->pivot[of]) * mask[i % NV] * d->slope[of] - d->peak[of];
    }
    exp2_in_step(count, w);
    EACH(i, count) {
        const int64_t at = m * LANES + i * VL;
        w[i] *= mask[i % NV];
        store(p + at, w[i]);
        store(total + at, load(total + at) + w[i]);
    }
}

static void refine(const struct dictionary *d, int64_t begin, int64_t end, float *scratch, float *sums,
                   float *weights) {
    const int64_t entries = d->entries, channels = d->channels;
    float *q = scratch, *p = q + d->rank * LANES, *total = p + entries * LANES, *rows = total + entries * LANES;
    memset(total, 0, entries * LANES * sizeof(float));
    for (int64_t first = begin; first < end; first += LANES) {
        const int64_t n = end - first < LANES ? end - first : LANES;
        vf mask[NV];
        existing(n, mask);
        similarity(d, first, n, q, p, NULL);
        int64_t m = 0;
        for (; m + IN_STEP / NV <= entries; m += IN_STEP / NV) weigh(d, IN_STEP, m, mask, p, total);
        for (; m < entries; m++) weigh(d, NV, m, mask, p, total);
        for (int64_t c = 0; c < channels; c += LANES) {
            const int64_t width = channels - c < LANES ? channels - c : LANES;
            if (n < LANES || width < LANES) memset(rows, 0, LANES * LANES * sizeof(float));
            for (int64_t l = 0; l < n; l++) {
                const float *from = d->x + (first + l) * channels + c;
                __builtin_prefetch(from + LANES * channels, 0, 2); /* of the next 16 tokens */
                if (width == LANES)
                    EACH(v, NV) store(rows + l * LANES + v * VL, load_anywhere(from + v * VL));
                else
                    memcpy(rows + l * LANES, from, width * sizeof(float));
            }
            product(entries, LANES, rows, p, LANES, 1, sums + c * entries, sums + c * entries);
        }
    }
    for (int64_t i = 0; i < entries * LANES; i++) weights[i / LANES] += total[i];
}

const struct layer_kernels FOR_TARGET(ppsr_layer_kernels_) = {lay_out,   linear, depthwise, stand_in, attend, moments, refine};
