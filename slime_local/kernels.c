/* The decoder of `model.py` for the engine: new tokens of many requests through all layers in one call. Everything is
   fp32, but for the products where the weights are given in bf16: what is multiplied is rounded to it, keys, values and
   their weights too; sums stay fp32.

   Compiled and called by `kernels.py`. Every `omp for` ends with a barrier, so that a step sees what the one before it
   has written. Tokens are rows; H is the hidden size, D the head dimension, a multiple of LANES.

   Weights are read in panels: PANEL neighbouring outputs, input after input, [ceil(n_out / PANEL)][n_in][PANEL]. One
   row then reads each of them once in order, at the rate of the memory, and many rows use the vector units fully. In
   bf16 two inputs stand side by side, [ceil(n_out / PANEL)][ceil(n_in / 2)][PANEL][2]: some CPUs multiply pairs, and
   others, with WIDEN, multiply faster what is widened to fp32 on its way to the vector units.

   Keys and values are kept as the right operands of such products, position after position. Keys, multiplied over D, are
   panels of positions, [capacity / PANEL][D][PANEL], in bf16 [..][D / 2][PANEL][2]; values, multiplied over positions,
   are [capacity][D], in bf16 [capacity / 2][D][2]. A value whose partner is not there yet has zeros in its place. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif
#if defined __AVX512BF16__ && !defined WIDEN
#define PAIRS 1
#else
#define PAIRS 0
#endif

#define LANES 16 /* compilers split vectors of this length where the machine's are shorter */
#define ROWS 8   /* rows of a block: ROWS x PANEL sums stay in registers */
#ifdef __AVX512F__
#define PANEL 32
#else
#define PANEL 16
#endif
#define VALUES (2 * PANEL) /* elements of a value that are read together, for ROWS / 2 queries */
#define KEYS 512    /* most keys of a part */
#define MAX_DIM 256 /* largest D */
#define AHEAD 4096  /* bytes that a block asks for in advance: the hardware does so within a page of memory only */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t bf16;

/* An element of a left operand of a product in bf16: rounded, and stored as it is multiplied. */
#if PAIRS
typedef bf16 left;
#else
typedef float left;
#endif

/* qkv, proj, fc1 and fc2 are panels. */
typedef struct {
    const float *input_norm;
    const void *qkv;
    const float *qkv_bias, *q_norm, *k_norm;
    const void *proj;
    const float *mlp_norm;
    const void *fc1, *fc2;
} Layer;

typedef struct {
    int64_t layers, hidden, kv_heads, group, dim, ffn, in_bf16; /* in_bf16: the panels, and what is kept */
    double eps;
    const Layer *layer;
} Model;

/* Where a row's key and value belong: `kept` are the keys of layer 0, KV head 0; the next head is `head` elements on,
   values behind the keys of all heads. */
typedef struct {
    void *kept;
    int64_t head, position;
} Place;

/* Rows first .. first + rows attend over `keys` keys from position `start` on, all in one block of KEYS; row r of them
   sees only the first visible + r. Its results are rows `result` .. result + rows of `partial`. */
typedef struct {
    void *kept;
    int64_t head, start, keys, visible, first, rows, result;
} Part;

typedef struct {
    int64_t rows, parts;
    const Part *part;
    const Place *place;
    const int64_t *results_of, *results; /* results[results_of[r] .. results_of[r + 1]) belong to row r */
    const float *cos, *sin;              /* [rows][D / 2] */
    float *x, *normed, *qkv, *attended, *gate_up, *gate;
    left *rounded; /* [rows * (the widest + 1)]: the input of a product */
    float *partial, *sums; /* [results][kv_heads * group](x D): attention over one part, and its log-sum-exp */
} Step;

int64_t panel_width(void) { return PANEL; }
int64_t part_keys(void) { return KEYS; }
int64_t has_bf16(void) { return HAS_BF16; }
int64_t multiplies_bf16(void) { return PAIRS; } /* else what was rounded is multiplied at the rate of fp32 */

/* ---- products --------------------------------------------------------------------------------------------------- */

/* The sums of a block, plus `plus` where that is not NULL. The arguments that end in s are the distances of rows. */
INLINE void put_block(const int rows, const int columns, vec sum[ROWS][VALUES / LANES], const float *plus, int64_t ps,
                      float *y, int64_t ys, int64_t width) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            const float *more = plus ? plus + r * ps + c * LANES : NULL;
            float *to = y + r * ys + c * LANES;
            if (width >= (c + 1) * LANES)
                *(vec *)to = more ? sum[r][c] + *(const vec *)more : sum[r][c];
            else
                for (int i = 0; i < width - c * LANES; i++) to[i] = sum[r][c][i] + (more ? more[i] : 0);
        }
}

/* y[r][0 .. width) = sum over i of x[r][i] * w[i][0 .. width), plus `plus`. */
INLINE void block(const int rows, const int columns, const float *x, int64_t xs, const float *w, int64_t ws,
                  const float *plus, int64_t ps, float *y, int64_t ys, int64_t k, int64_t width) {
    vec sum[ROWS][VALUES / LANES];
    memset(sum, 0, sizeof sum);
    for (int64_t i = 0; i < k; i++, w += ws) {
        for (int c = 0; c < columns; c++) __builtin_prefetch((const char *)(w + c * LANES) + AHEAD);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++) sum[r][c] += x[r * xs + i] * *(const vec *)(w + c * LANES);
    }
    put_block(rows, columns, sum, plus, ps, y, ys, width);
}

/* BLOCK with its number of rows, fewer than ROWS, as a constant. */
#define REST(rows, BLOCK) \
    switch (rows) { \
        case 1: BLOCK(1); break; \
        case 2: BLOCK(2); break; \
        case 3: BLOCK(3); break; \
        case 4: BLOCK(4); break; \
        case 5: BLOCK(5); break; \
        case 6: BLOCK(6); break; \
        case 7: BLOCK(7); break; \
    }

/* The same for any number of rows, `most` at a time. */
INLINE void blocks(const int most, int64_t m, const int columns, const float *x, int64_t xs, const float *w, int64_t ws,
                   const float *plus, int64_t ps, float *y, int64_t ys, int64_t k, int64_t width) {
#define BLOCK(rows) block(rows, columns, x, xs, w, ws, plus, ps, y, ys, k, width)
    for (; m >= most; m -= most, x += most * xs, y += most * ys, plus += plus ? most * ps : 0) BLOCK(most);
    REST(m, BLOCK)
}

/* y [m][n] = x [m][k] times panels of a weight [n][k], plus `plus` (rows ps apart: a bias has 0). */
static void multiply(const float *x, const float *panels, const float *plus, int64_t ps, float *y, int64_t m,
                     int64_t n, int64_t k) {
#pragma omp for schedule(static)
    for (int64_t j = 0; j < n; j += PANEL) {
        int64_t width = n - j < PANEL ? n - j : PANEL;
        blocks(ROWS, m, PANEL / LANES, x, k, panels + j * k, PANEL, plus ? plus + j : plus, ps, y + j, n, k, width);
    }
}

/* To the nearest, ties to even. */
INLINE bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE float widened(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE left to_left(float x) { return PAIRS ? to_bf16(x) : widened(to_bf16(x)); }

/* n values, and a zero behind an odd number of them. */
INLINE void round_vector(const float *x, left *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = to_left(x[i]);
    if (n & 1) y[n] = 0;
}

#if HAS_BF16
/* sum + the products of x's pair and pairs of weights. Not left to the compiler, which would add the two first. */
INLINE __m512 add_pair(__m512 sum, const left *x, __m512i pairs) {
#if PAIRS
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)pairs);
#else
    __m512 first = (__m512)_mm512_slli_epi32(pairs, 16);
    __m512 second = (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000));
    return _mm512_fmadd_ps(_mm512_set1_ps(x[1]), second, _mm512_fmadd_ps(_mm512_set1_ps(x[0]), first, sum));
#endif
}

/* As `block`, over pairs of inputs. w is [k / 2][..][2], its pairs ws apart; k is even. */
INLINE void block_bf16(const int rows, const int columns, const left *x, int64_t xs, const bf16 *w, int64_t ws,
                       const float *plus, int64_t ps, float *y, int64_t ys, int64_t k, int64_t width) {
    vec sum[ROWS][VALUES / LANES];
    memset(sum, 0, sizeof sum);
    for (int64_t i = 0; i < k; i += 2, w += ws) {
        for (int c = 0; c < columns; c++) __builtin_prefetch((const char *)(w + c * 2 * LANES) + AHEAD);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++)
                sum[r][c] = add_pair(sum[r][c], x + r * xs + i, _mm512_loadu_si512(w + c * 2 * LANES));
    }
    put_block(rows, columns, sum, plus, ps, y, ys, width);
}
#else
INLINE void block_bf16(const int rows, const int columns, const left *x, int64_t xs, const bf16 *w, int64_t ws,
                       const float *plus, int64_t ps, float *y, int64_t ys, int64_t k, int64_t width) {}
#endif

/* As `blocks`. */
INLINE void blocks_bf16(const int most, int64_t m, const int columns, const left *x, int64_t xs, const bf16 *w,
                        int64_t ws, const float *plus, int64_t ps, float *y, int64_t ys, int64_t k, int64_t width) {
#define BLOCK_BF16(rows) block_bf16(rows, columns, x, xs, w, ws, plus, ps, y, ys, k, width)
    for (; m >= most; m -= most, x += most * xs, y += most * ys, plus += plus ? most * ps : 0) BLOCK_BF16(most);
    REST(m, BLOCK_BF16)
}

static void multiply_bf16(const float *x, left *rounded, const bf16 *panels, const float *plus, int64_t ps, float *y,
                          int64_t m, int64_t n, int64_t k) {
    int64_t even = k + (k & 1);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < m; r++) round_vector(x + r * k, rounded + r * even, k);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < n; j += PANEL) {
        int64_t width = n - j < PANEL ? n - j : PANEL;
        blocks_bf16(ROWS, m, PANEL / LANES, rounded, even, panels + j * even, 2 * PANEL, plus ? plus + j : plus, ps,
                    y + j, n, even, width);
    }
}

/* `rounded`: room for x as a left operand where the panels are in bf16, else NULL. */
static void multiply_by(const void *panels, left *rounded, const float *x, const float *plus, int64_t ps, float *y,
                        int64_t m, int64_t n, int64_t k) {
    if (rounded)
        multiply_bf16(x, rounded, panels, plus, ps, y, m, n, k);
    else
        multiply(x, panels, plus, ps, y, m, n, k);
}

void product(const float *x, const void *panels, const float *bias, float *y, left *rounded, int64_t m, int64_t n,
             int64_t k, int64_t threads) {
#pragma omp parallel num_threads(threads)
    multiply_by(panels, rounded, x, bias, 0, y, m, n, k);
}

/* ---- element by element ----------------------------------------------------------------------------------------- */

/* exp(x), written so that compilers vectorise it: 2^whole * e^rest, the latter by its Taylor series. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float whole = rintf(x * 1.44269504f), r = x - whole * 0.693147181f;
    union {
        int32_t bits;
        float value;
    } power = {((int32_t)whole + 127) << 23};
    float series = 1 + r * (1 + r * (1 / 2.0f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r / 720)))));
    return power.value * series;
}

static void norm_vector(const float *x, const float *weight, float *y, int64_t n, double eps) {
    float squares = 0;
    for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
    float scale = 1 / sqrtf(squares / n + (float)eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

static void norm_rows(const float *x, const float *weight, float *y, int64_t m, int64_t n, double eps) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < m; r++) norm_vector(x + r * n, weight, y + r * n, n, eps);
}

/* out [m][F] = silu(gate) * up, of gate_up [m][2 F]. */
static void gated(const float *gate_up, float *out, int64_t m, int64_t ffn) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < m; r++) {
        const float *gate = gate_up + r * 2 * ffn, *up = gate + ffn;
        for (int64_t j = 0; j < ffn; j++) out[r * ffn + j] = gate[j] / (1 + exponential(-gate[j])) * up[j];
    }
}

void norm(const float *x, const float *weight, float *y, int64_t m, int64_t n, double eps, int64_t threads) {
#pragma omp parallel num_threads(threads)
    norm_rows(x, weight, y, m, n, eps);
}

/* Gradients of `norm`, given that by y: dx [m][n] and dw [n], the sum of each thread's part, which begins as zeros in
   sum_dw [threads][n]. With s = 1 / sqrt(mean(x^2) + eps): dx = s (grad w - x s^2 mean(grad w x)). */
void norm_backward(const float *x, const float *weight, const float *grad, float *dx, float *dw, float *sum_dw, int64_t m,
                   int64_t n, double eps, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        float *part = sum_dw + omp_get_thread_num() * n;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < m; r++) {
            const float *row = x + r * n, *by_y = grad + r * n;
            float squares = 0, inner = 0;
            for (int64_t i = 0; i < n; i++) {
                squares += row[i] * row[i];
                inner += by_y[i] * weight[i] * row[i];
            }
            float scale = 1 / sqrtf(squares / n + (float)eps), along = inner * scale * scale / n;
            for (int64_t i = 0; i < n; i++) {
                dx[r * n + i] = scale * (by_y[i] * weight[i] - row[i] * along);
                part[i] += by_y[i] * row[i] * scale;
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {
            dw[i] = 0;
            for (int64_t t = 0; t < threads; t++) dw[i] += sum_dw[t * n + i];
        }
    }
}

void gate(const float *gate_up, float *out, int64_t m, int64_t ffn, int64_t threads) {
#pragma omp parallel num_threads(threads)
    gated(gate_up, out, m, ffn);
}

/* In place: gate_up [m][2 F] becomes the gradient of `gate` by it, and the gradient by its result, `out` [m][F], that
   result. */
void gate_backward(float *gate_up, float *out, int64_t m, int64_t ffn, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < m; r++) {
        float *gates = gate_up + r * 2 * ffn, *ups = gates + ffn, *outs = out + r * ffn;
        for (int64_t j = 0; j < ffn; j++) {
            float gate = gates[j], up = ups[j], grad = outs[j], share = 1 / (1 + exponential(-gate)), silu = gate * share;
            outs[j] = silu * up;
            ups[j] = grad * silu;
            gates[j] = grad * up * (share + silu * (1 - share));
        }
    }
}

/* Half-split rotary embedding, as in Hugging Face checkpoints, after the norm of Qwen3's heads where there is one. */
static void rotate(float *x, const float *weight, const float *cos, const float *sin, int64_t dim, double eps) {
    if (weight) norm_vector(x, weight, x, dim, eps);
    for (int64_t i = 0, half = dim / 2; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

/* ---- attention -------------------------------------------------------------------------------------------------- */

/* The element `offset` of what is kept. */
INLINE void *element(const void *kept, int64_t offset, int64_t in_bf16) {
    return (char *)kept + offset * (in_bf16 ? sizeof(bf16) : sizeof(float));
}

/* x [D] as the key at `position`. */
INLINE void put_key(void *keys, int64_t position, const float *x, int64_t dim, int64_t in_bf16) {
    int64_t c = position % PANEL;
    void *panel = element(keys, (position - c) * dim, in_bf16);
    for (int64_t d = 0; d < dim; d++)
        if (in_bf16)
            ((bf16 *)panel)[(d / 2 * PANEL + c) * 2 + d % 2] = to_bf16(x[d]);
        else
            ((float *)panel)[d * PANEL + c] = x[d];
}

/* x [D] as the value at `position`; clears: with zeros for its partner behind it. */
INLINE void put_value(void *values, int64_t position, const float *x, int64_t dim, int64_t in_bf16, int clears) {
    if (in_bf16) {
        bf16 *pairs = (bf16 *)values + position / 2 * 2 * dim;
        for (int64_t d = 0; d < dim; d++) pairs[2 * d + position % 2] = to_bf16(x[d]);
        for (int64_t d = 0; clears && position % 2 == 0 && d < dim; d++) pairs[2 * d + 1] = 0;
    } else
        memcpy((float *)values + position * dim, x, dim * sizeof *x);
}

/* scores [m][n] = queries [m][D] times n keys from `keys` on, a whole number of panels. */
INLINE void score(const void *queries, int64_t m, const void *keys, int64_t n, float *scores, int64_t stride,
                  int64_t dim, int64_t in_bf16) {
    for (int64_t j = 0; j < n; j += PANEL)
        if (in_bf16)
            blocks_bf16(ROWS, m, PANEL / LANES, queries, dim, (const bf16 *)keys + j * dim, 2 * PANEL, 0, 0, scores + j,
                        stride, dim, PANEL);
        else
            blocks(ROWS, m, PANEL / LANES, queries, dim, (const float *)keys + j * dim, PANEL, 0, 0, scores + j, stride,
                   dim, PANEL);
}

/* out [m][D] = weights [m][n] times n values, an even number in bf16. */
INLINE void weigh(const void *weights, int64_t stride, int64_t m, const void *values, int64_t n, float *out, int64_t os,
                  int64_t dim, int64_t in_bf16) {
    const bf16 *pairs = values;
    const float *rows = values;
    int64_t d = 0;
    for (; d + VALUES <= dim; d += VALUES)
        if (in_bf16)
            blocks_bf16(ROWS / 2, m, VALUES / LANES, weights, stride, pairs + 2 * d, 2 * dim, 0, 0, out + d, os, n, VALUES);
        else
            blocks(ROWS / 2, m, VALUES / LANES, weights, stride, rows + d, dim, 0, 0, out + d, os, n, VALUES);
    for (; d < dim; d += LANES)
        if (in_bf16)
            blocks_bf16(ROWS, m, 1, weights, stride, pairs + 2 * d, 2 * dim, 0, 0, out + d, os, n, LANES);
        else
            blocks(ROWS, m, 1, weights, stride, rows + d, dim, 0, 0, out + d, os, n, LANES);
}

/* Rotate queries and keys, and put the new keys and values where they are kept. */
static void place(const Model *model, const Layer *w, const Step *step, int64_t layer) {
    int64_t kv = model->kv_heads, group = model->group, dim = model->dim, width = kv * (group + 2) * dim;
#pragma omp for collapse(2) schedule(static)
    for (int64_t r = 0; r < step->rows; r++)
        for (int64_t head = 0; head < kv; head++) {
            float *q = step->qkv + r * width + head * (group + 2) * dim, *k = q + group * dim, *v = k + dim;
            const float *cos = step->cos + r * dim / 2, *sin = step->sin + r * dim / 2;
            const Place *to = step->place + r;
            void *keys = element(to->kept, (2 * kv * layer + head) * to->head, model->in_bf16);
            int last = r + 1 == step->rows || to[1].kept != to->kept; /* else another thread writes the partner */
            for (int64_t g = 0; g < group; g++) rotate(q + g * dim, w->q_norm, cos, sin, dim, model->eps);
            rotate(k, w->k_norm, cos, sin, dim, model->eps);
            put_key(keys, to->position, k, dim, model->in_bf16);
            put_value(element(keys, kv * to->head, model->in_bf16), to->position, v, dim, model->in_bf16, last);
        }
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* Softmax of n scores in place; returns their log-sum-exp. */
static float softmax(float *scores, int64_t n) {
    float most = scores[0], sum = 0;
    for (int64_t j = 1; j < n; j++) most = scores[j] > most ? scores[j] : most;
    for (int64_t j = 0; j < n; j++) sum += scores[j] = exponential(scores[j] - most);
    for (int64_t j = 0; j < n; j++) scores[j] /= sum;
    return most + logf(sum);
}

/* The queries of one KV head over the keys of one part, ROWS queries at a time. */
INLINE void attend_part(const Model *model, const Step *step, const Part *part, int64_t layer, int64_t head,
                        const int64_t dim, const int64_t in_bf16) {
    int64_t kv = model->kv_heads, group = model->group, width = kv * (group + 2) * dim;
    int64_t from = part->start / PANEL * PANEL, skipped = part->start - from; /* panels are read from their start */
    const void *keys = element(part->kept, (2 * kv * layer + head) * part->head + from * dim, in_bf16);
    const void *values = element(keys, kv * part->head, in_bf16);
    float q[ROWS * MAX_DIM], scores[ROWS * KEYS], out[ROWS * MAX_DIM], scale = 1 / sqrtf(dim);
    left rounded_q[ROWS * MAX_DIM], rounded[ROWS * KEYS];
    for (int64_t first = 0; first < part->rows * group; first += ROWS) {
        int64_t m = part->rows * group - first < ROWS ? part->rows * group - first : ROWS;
        int64_t last = part->visible + (first + m - 1) / group;
        int64_t n = skipped + (last < part->keys ? last : part->keys), even = n + (n & 1);
        for (int64_t i = 0; i < m; i++) {
            int64_t row = part->first + (first + i) / group, g = (first + i) % group;
            const float *query = step->qkv + row * width + (head * (group + 2) + g) * dim;
            for (int64_t d = 0; d < dim; d++) q[i * dim + d] = query[d] * scale;
            if (in_bf16) round_vector(q + i * dim, rounded_q + i * dim, dim);
        }
        score(in_bf16 ? (void *)rounded_q : q, m, keys, n, scores, KEYS, dim, in_bf16);
        for (int64_t i = 0; i < m; i++) {
            int64_t r = (first + i) / group, g = (first + i) % group;
            int64_t seen = part->visible + r < part->keys ? part->visible + r : part->keys;
            step->sums[((part->result + r) * kv + head) * group + g] = softmax(scores + i * KEYS + skipped, seen);
            for (int64_t j = 0; j < skipped; j++) scores[i * KEYS + j] = 0;
            for (int64_t j = skipped + seen; j < n; j++) scores[i * KEYS + j] = 0;
            if (in_bf16) round_vector(scores + i * KEYS, rounded + i * KEYS, n);
        }
        weigh(in_bf16 ? (void *)rounded : scores, KEYS, m, values, in_bf16 ? even : n, out, dim, dim, in_bf16);
        for (int64_t i = 0; i < m; i++) {
            int64_t r = (first + i) / group, g = (first + i) % group;
            memcpy(step->partial + (((part->result + r) * kv + head) * group + g) * dim, out + i * dim,
                   dim * sizeof *out);
        }
    }
}

/* The parts of a row joined by their log-sum-exps (FlashAttention, arXiv 2205.14135, section 3.1). */
static void join_row(const Model *model, const Step *step, int64_t row, int64_t head) {
    int64_t heads = model->kv_heads * model->group, dim = model->dim;
    const int64_t *result = step->results + step->results_of[row];
    int64_t n = step->results_of[row + 1] - step->results_of[row];
    float *out = step->attended + (row * heads + head) * dim, most = step->sums[result[0] * heads + head], total = 0;
    for (int64_t i = 1; i < n; i++) most = fmaxf(most, step->sums[result[i] * heads + head]);
    memset(out, 0, dim * sizeof *out);
    for (int64_t i = 0; i < n; i++) {
        int64_t from = result[i] * heads + head;
        float weight = exponential(step->sums[from] - most);
        total += weight;
        for (int64_t d = 0; d < dim; d++) out[d] += weight * step->partial[from * dim + d];
    }
    for (int64_t d = 0; d < dim; d++) out[d] /= total;
}

/* Constant dimensions make faster loops. */
static void attend_part_of(const Model *model, const Step *step, const Part *part, int64_t layer, int64_t head) {
    switch (model->dim * 2 + model->in_bf16) {
        case 64 * 2: attend_part(model, step, part, layer, head, 64, 0); break;
        case 64 * 2 + 1: attend_part(model, step, part, layer, head, 64, 1); break;
        case 128 * 2: attend_part(model, step, part, layer, head, 128, 0); break;
        case 128 * 2 + 1: attend_part(model, step, part, layer, head, 128, 1); break;
        default: attend_part(model, step, part, layer, head, model->dim, model->in_bf16);
    }
}

static void attend(const Model *model, const Step *step, int64_t layer) {
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t p = 0; p < step->parts; p++)
        for (int64_t head = 0; head < model->kv_heads; head++)
            attend_part_of(model, step, step->part + p, layer, head);
#pragma omp for collapse(2) schedule(static)
    for (int64_t row = 0; row < step->rows; row++)
        for (int64_t head = 0; head < model->kv_heads * model->group; head++) join_row(model, step, row, head);
}

/* ---- attention in training -------------------------------------------------------------------------------------- */

#define TILE 32 /* queries of a tile: in the gradient one panel of them */
#define STRIP 64 /* keys that a tile meets at a time in the gradient: what belongs to them stays in the first cache */

/* The last n of m positions attend causally: q, out, grad, dq [n][kv][group][D], k, v, dk, dv [m][kv][D], sums
   [n][kv][group]. Queries are rows r = position * group + member of the group. The rest is scratch; `wide` is m filled
   up to whole panels. Forward, keys and values stand as the engine keeps them; the gradient has them as left operands. */
typedef struct {
    int64_t n, m, kv, group, dim, in_bf16, wide;
    const float *q, *k, *v, *out, *sums, *grad;
    float *dq, *dk, *dv;
    void *keys, *values;                               /* [kv][wide][D] */
    float *scores;                                     /* [threads][TILE][wide] */
    left *rounded;                                     /* [threads][TILE][wide] */
    left *key_rows, *value_rows, *turned_keys;         /* [kv][m][D] twice, [kv][D][wide] */
    float *sum_dk, *sum_dv;                            /* [threads][kv][m][D], zeros */
} Attention;

/* Where row r of a head stands in q and its like. */
static int64_t place_of(const Attention *a, int64_t head, int64_t r) {
    return (r / a->group * a->kv + head) * a->group + r % a->group;
}

/* How many keys a row sees. */
static int64_t seen_by(const Attention *a, int64_t row) { return a->m - a->n + row / a->group + 1; }

/* Two positions at a time: one thread writes both halves of a pair. */
static void pack(const Attention *a) {
#pragma omp for collapse(2) schedule(static)
    for (int64_t head = 0; head < a->kv; head++)
        for (int64_t first = 0; first < a->m; first += 2)
            for (int64_t j = first; j < a->m && j < first + 2; j++) {
                const float *k = a->k + (j * a->kv + head) * a->dim, *v = a->v + (j * a->kv + head) * a->dim;
                int64_t at = head * a->wide * a->dim;
                put_key(element(a->keys, at, a->in_bf16), j, k, a->dim, a->in_bf16);
                put_value(element(a->values, at, a->in_bf16), j, v, a->dim, a->in_bf16, 1);
            }
}

/* The same for the gradient; an odd number of turned keys has a zero behind them. */
static void pack_left(const Attention *a) {
#pragma omp for collapse(2) schedule(static)
    for (int64_t head = 0; head < a->kv; head++)
        for (int64_t j = 0; j < a->m; j++) {
            int64_t from = (j * a->kv + head) * a->dim, to = (head * a->m + j) * a->dim;
            left *turned = a->turned_keys + head * a->dim * a->wide + j;
            round_vector(a->k + from, a->key_rows + to, a->dim);
            round_vector(a->v + from, a->value_rows + to, a->dim);
            for (int64_t d = 0; d < a->dim; d++) turned[d * a->wide] = a->key_rows[to + d];
            for (int64_t d = 0; j + 1 == a->m && (a->m & 1) && d < a->dim; d++) turned[d * a->wide + 1] = 0;
        }
}

/* The queries first .. first + rows of one head, times 1 / sqrt(D): tile [rows][D]. */
static void load_queries(const Attention *a, int64_t head, int64_t first, int64_t rows, float *tile) {
    float scale = 1 / sqrtf(a->dim);
    for (int64_t i = 0; i < rows; i++) {
        const float *from = a->q + place_of(a, head, first + i) * a->dim;
        for (int64_t d = 0; d < a->dim; d++) tile[i * a->dim + d] = from[d] * scale;
    }
}

void attend_forward(const Attention *a, float *out, float *sums, int64_t threads) {
    int64_t dim = a->dim, wide = a->wide, tiles = (a->n * a->group + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
    {
        float *scores = a->scores + TILE * wide * omp_get_thread_num();
        left *rounded = a->rounded + TILE * wide * omp_get_thread_num();
        float tile[TILE * MAX_DIM], found[TILE * MAX_DIM];
        left rounded_tile[TILE * MAX_DIM];
        pack(a);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t t = 0; t < tiles; t++)
            for (int64_t head = 0; head < a->kv; head++) {
                int64_t first = (tiles - 1 - t) * TILE, left = a->n * a->group - first; /* the longest first */
                int64_t rows = left < TILE ? left : TILE, seen = seen_by(a, first + rows - 1);
                const void *keys = element(a->keys, head * wide * dim, a->in_bf16);
                const void *values = element(a->values, head * wide * dim, a->in_bf16);
                load_queries(a, head, first, rows, tile);
                if (a->in_bf16) round_vector(tile, rounded_tile, rows * dim);
                score(a->in_bf16 ? (void *)rounded_tile : tile, rows, keys, seen, scores, wide, dim, a->in_bf16);
                for (int64_t i = 0; i < rows; i++) {
                    int64_t own = seen_by(a, first + i);
                    sums[place_of(a, head, first + i)] = softmax(scores + i * wide, own);
                    for (int64_t j = own; j < seen; j++) scores[i * wide + j] = 0;
                    if (a->in_bf16) round_vector(scores + i * wide, rounded + i * wide, seen);
                }
                weigh(a->in_bf16 ? (void *)rounded : scores, wide, rows, values, a->in_bf16 ? seen + (seen & 1) : seen,
                      found, dim, dim, a->in_bf16);
                for (int64_t i = 0; i < rows; i++)
                    memcpy(out + place_of(a, head, first + i) * dim, found + i * dim, dim * sizeof *found);
            }
    }
}

/* A tile of queries in the gradient, in the forms in which products want it, filled up with zeros. */
typedef struct {
    bf16 queries_as_keys[TILE * MAX_DIM], grads_as_keys[TILE * MAX_DIM];
    bf16 queries_as_values[TILE * MAX_DIM], grads_as_values[TILE * MAX_DIM];
    float sums[TILE], inner[TILE]; /* inner: of the gradient and the output */
    int32_t own[TILE];             /* how many keys each query sees */
    float turned_dq[MAX_DIM * TILE];
} Tile;

static void load_tile(const Attention *a, int64_t head, int64_t first, int64_t rows, Tile *tile) {
    float queries[TILE * MAX_DIM];
    if (rows < TILE) memset(tile, 0, sizeof *tile);
    memset(tile->turned_dq, 0, a->dim * TILE * sizeof *tile->turned_dq);
    load_queries(a, head, first, rows, queries);
    for (int64_t i = 0; i < rows; i++) {
        int64_t from = place_of(a, head, first + i);
        const float *query = queries + i * a->dim, *grad = a->grad + from * a->dim;
        put_key(tile->queries_as_keys, i, query, a->dim, 1);
        put_key(tile->grads_as_keys, i, grad, a->dim, 1);
        put_value(tile->queries_as_values, i, query, a->dim, 1, 0);
        put_value(tile->grads_as_values, i, grad, a->dim, 1, 0);
        tile->sums[i] = a->sums[from];
        tile->inner[i] = dot(grad, a->out + from * a->dim, a->dim);
        tile->own[i] = seen_by(a, first + i);
    }
}

/* rows [n][D] += weights [n][TILE] times a tile in the form of values. */
INLINE void add_weighed(const left *weights, int64_t n, const bf16 *values, float *rows, int64_t dim) {
    int64_t d = 0;
    for (; d + VALUES <= dim; d += VALUES)
        blocks_bf16(ROWS / 2, n, VALUES / LANES, weights, TILE, values + 2 * d, 2 * dim, rows + d, dim, rows + d, dim, TILE,
                    VALUES);
    for (; d < dim; d += LANES)
        blocks_bf16(ROWS, n, 1, weights, TILE, values + 2 * d, 2 * dim, rows + d, dim, rows + d, dim, TILE, LANES);
}

/* What a tile gives to the gradients of the n keys and values from `start` on, and they to that of the tile. Scores are
   [key][query], so that nothing has to be transposed. */
INLINE void strip_backward(const Attention *a, int64_t head, int64_t start, int64_t n, Tile *tile, float *dk, float *dv,
                           const int64_t dim) {
    float scores[STRIP * TILE], by_score[(STRIP + 1) * TILE];
    left weights[STRIP * TILE], by[STRIP * TILE];
    uint32_t pairs[STRIP / 2 * TILE];
    int64_t rows = (head * a->m + start) * dim;
    score(a->key_rows + rows, n, tile->queries_as_keys, TILE, scores, TILE, dim, 1);
    score(a->value_rows + rows, n, tile->grads_as_keys, TILE, by_score, TILE, dim, 1);
    for (int32_t j = 0; j < n; j++) {
        float *weight = scores + j * TILE, *by_weight = by_score + j * TILE;
        int32_t place = start + j;
        for (int32_t i = 0; i < TILE; i++) {
            float found = exponential(weight[i] - tile->sums[i]);
            weight[i] = place < tile->own[i] ? found : 0;
            by_weight[i] = weight[i] * (by_weight[i] - tile->inner[i]);
        }
    }
    memset(by_score + n * TILE, 0, TILE * sizeof *by_score); /* the partner of an odd key */
    round_vector(scores, weights, n * TILE);
    round_vector(by_score, by, n * TILE);
    for (int64_t j = 0; j < n; j += 2)
        for (int64_t i = 0; i < TILE; i++)
            pairs[j / 2 * TILE + i] = to_bf16(by_score[j * TILE + i]) | (uint32_t)to_bf16(by_score[(j + 1) * TILE + i]) << 16;
    add_weighed(weights, n, tile->grads_as_values, dv + start * dim, dim);
    add_weighed(by, n, tile->queries_as_values, dk + start * dim, dim);
    blocks_bf16(ROWS, dim, TILE / LANES, a->turned_keys + head * dim * a->wide + start, a->wide, (bf16 *)pairs, 2 * TILE,
                tile->turned_dq, TILE, tile->turned_dq, TILE, n + (n & 1), TILE);
}

/* Constant dimensions make faster loops. */
static void strip_backward_of(const Attention *a, int64_t head, int64_t start, int64_t n, Tile *tile, float *dk, float *dv) {
    switch (a->dim) {
        case 64: strip_backward(a, head, start, n, tile, dk, dv, 64); break;
        case 128: strip_backward(a, head, start, n, tile, dk, dv, 128); break;
        default: strip_backward(a, head, start, n, tile, dk, dv, a->dim);
    }
}

/* dq, and of each thread its part of dk and dv, all products in bf16. FlashAttention, arXiv 2205.14135, algorithm 4. */
void attend_backward(const Attention *a, int64_t threads) {
    int64_t dim = a->dim, m = a->m, tiles = (a->n * a->group + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
    {
        int64_t thread = omp_get_thread_num();
        float *dk = a->sum_dk + thread * a->kv * m * dim, *dv = a->sum_dv + thread * a->kv * m * dim;
        Tile tile;
        pack_left(a);
        /* In fixed turns: each thread's sums, and so the gradient's bits, are the same in every run. */
#pragma omp for collapse(2) schedule(static, 1)
        for (int64_t t = 0; t < tiles; t++)
            for (int64_t head = 0; head < a->kv; head++) {
                int64_t first = (tiles - 1 - t) * TILE, left = a->n * a->group - first, at = head * m * dim;
                int64_t rows = left < TILE ? left : TILE, seen = seen_by(a, first + rows - 1);
                load_tile(a, head, first, rows, &tile);
                for (int64_t start = 0; start < seen; start += STRIP)
                    strip_backward_of(a, head, start, seen - start < STRIP ? seen - start : STRIP, &tile, dk + at, dv + at);
                for (int64_t i = 0; i < rows; i++) {
                    float *to = a->dq + place_of(a, head, first + i) * dim;
                    for (int64_t d = 0; d < dim; d++) to[d] = tile.turned_dq[d * TILE + i] / sqrtf(dim);
                }
            }
#pragma omp for collapse(2) schedule(static)
        for (int64_t head = 0; head < a->kv; head++)
            for (int64_t j = 0; j < m; j++)
                for (int64_t d = 0; d < dim; d++) {
                    float by_k = 0, by_v = 0;
                    for (int64_t i = 0; i < threads; i++) {
                        by_k += a->sum_dk[((i * a->kv + head) * m + j) * dim + d];
                        by_v += a->sum_dv[((i * a->kv + head) * m + j) * dim + d];
                    }
                    a->dk[(j * a->kv + head) * dim + d] = by_k;
                    a->dv[(j * a->kv + head) * dim + d] = by_v;
                }
    }
}

/* ---- sampling --------------------------------------------------------------------------------------------------- */

/* exp((logit - most) / temperature) summed up over the block that starts at `from`. */
static float weight_of(const float *logits, int64_t from, int64_t n, float most, float temperature) {
    float sum = 0;
    int64_t end = from + KEYS < n ? from + KEYS : n;
    for (int64_t i = from; i < end; i++) sum += exponential((logits[i] - most) / temperature);
    return sum;
}

/* `sample` of engine.py without top-p and top-k: ids and log-probs of m rows of n logits, one uniform number each. */
void sample(const float *logits, int64_t m, int64_t n, const float *temperatures, const double *uniforms, int64_t *ids,
            float *logprobs, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < m; r++) {
        const float *row = logits + r * n, temperature = temperatures[r] > 0 ? temperatures[r] : 1;
        float most = row[0];
        double total = 0, passed = 0, target;
        for (int64_t i = 1; i < n; i++) most = row[i] > most ? row[i] : most;
        for (int64_t from = 0; from < n; from += KEYS) total += weight_of(row, from, n, most, temperature);
        int64_t id = 0, block = 0;
        if (temperatures[r] > 0) { /* the inverse of the cumulated weights: first the block, then the token in it */
            target = uniforms[r] * total;
            for (double weight; block + KEYS < n; block += KEYS, passed += weight)
                if (passed + (weight = weight_of(row, block, n, most, temperature)) > target) break;
            for (id = block; id < n - 1; id++)
                if ((passed += exponential((row[id] - most) / temperature)) > target) break;
        } else
            while (id < n - 1 && row[id] != most) id++;
        ids[r] = id;
        logprobs[r] = (row[id] - most) / temperature - log(total);
    }
}

/* ---- the decoder ------------------------------------------------------------------------------------------------ */

/* The residual stream step->x [rows][H] through all layers, in place; keys and values of the rows are kept. */
void decode(const Model *model, const Step *step, int64_t threads) {
    int64_t m = step->rows, hidden = model->hidden, ffn = model->ffn;
    int64_t heads = model->kv_heads * model->group * model->dim, width = heads + 2 * model->kv_heads * model->dim;
    left *rounded = model->in_bf16 ? step->rounded : NULL;
#pragma omp parallel num_threads(threads)
    for (int64_t layer = 0; layer < model->layers; layer++) {
        const Layer *w = model->layer + layer;
        norm_rows(step->x, w->input_norm, step->normed, m, hidden, model->eps);
        multiply_by(w->qkv, rounded, step->normed, w->qkv_bias, 0, step->qkv, m, width, hidden);
        place(model, w, step, layer);
        attend(model, step, layer);
        multiply_by(w->proj, rounded, step->attended, step->x, hidden, step->x, m, hidden, heads);
        norm_rows(step->x, w->mlp_norm, step->normed, m, hidden, model->eps);
        multiply_by(w->fc1, rounded, step->normed, 0, 0, step->gate_up, m, 2 * ffn, hidden);
        gated(step->gate_up, step->gate, m, ffn);
        multiply_by(w->fc2, rounded, step->gate, step->x, hidden, step->x, m, hidden, ffn);
    }
}
