/* The decoder of `model.py` for the engine: new tokens of many requests through all layers in one call. Everything is
   fp32, but for the products where the weights are given in bf16: their inputs are rounded to it, sums stay fp32.

   Compiled and called by `kernels.py`. Every `omp for` ends with a barrier, so that a step sees what the one before it
   has written. Tokens are rows; H is the hidden size, D the head dimension, a multiple of LANES.

   Weights are read in panels: PANEL neighbouring outputs, input after input, [ceil(n_out / PANEL)][n_in][PANEL]. One
   row then reads each of them once in order, at the rate of the memory, and many rows use the vector units fully. In
   bf16 two inputs stand side by side, [ceil(n_out / PANEL)][ceil(n_in / 2)][PANEL][2]: the CPU multiplies pairs. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif

#define LANES 16 /* compilers split vectors of this length where the machine's are shorter */
#define ROWS 8   /* rows of a block: ROWS x PANEL sums stay in registers */
#ifdef __AVX512F__
#define PANEL 32
#else
#define PANEL 16
#endif
#define VALUES (2 * PANEL) /* elements of a value that are read together, for ROWS / 2 queries */
#define KEYS 256    /* most keys of a part */
#define MAX_DIM 256 /* largest D */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t bf16;

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
    int64_t layers, hidden, kv_heads, group, dim, ffn, in_bf16;
    double eps;
    const Layer *layer;
} Model;

/* Where a row's key of layer 0, KV head 0 belongs; the next head is `head` floats on, values behind the keys. */
typedef struct {
    float *key;
    int64_t head;
} Place;

/* Rows first .. first + rows attend over `keys` keys from `key` on; row r of them sees only the first visible + r.
   Its results are rows `result` .. result + rows of `partial`. */
typedef struct {
    float *key;
    int64_t head, keys, visible, first, rows, result;
} Part;

typedef struct {
    int64_t rows, parts;
    const Part *part;
    const Place *place;
    const int64_t *results_of, *results; /* results[results_of[r] .. results_of[r + 1]) belong to row r */
    const float *cos, *sin;              /* [rows][D / 2] */
    float *x, *normed, *qkv, *attended, *gate_up, *gate;
    bf16 *rounded; /* [rows * (the widest + 1)]: the input of a product */
    float *partial, *sums; /* [results][kv_heads * group](x D): attention over one part, and its log-sum-exp */
} Step;

int64_t panel_width(void) { return PANEL; }
int64_t part_keys(void) { return KEYS; }
int64_t has_bf16(void) { return HAS_BF16; }

/* ---- products --------------------------------------------------------------------------------------------------- */

/* y[r][0 .. width) = sum over i of x[r][i] * w[i][0 .. width), plus `plus` where that is not NULL. The arguments that
   end in s are the distances of rows. */
INLINE void block(const int rows, const int columns, const float *x, int64_t xs, const float *w, int64_t ws,
                  const float *plus, int64_t ps, float *y, int64_t ys, int64_t k, int64_t width) {
    vec sum[ROWS][VALUES / LANES];
    memset(sum, 0, sizeof sum);
    for (int64_t i = 0; i < k; i++)
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++)
                sum[r][c] += x[r * xs + i] * *(const vec *)(w + i * ws + c * LANES);
    for (int r = 0; r < rows; r++) {
        float out[VALUES];
        memcpy(out, sum[r], sizeof out);
        for (int64_t c = 0; c < width; c++) y[r * ys + c] = out[c] + (plus ? plus[r * ps + c] : 0.0f);
    }
}

/* The same for any number of rows, `most` at a time. */
INLINE void blocks(const int most, int64_t m, const int columns, const float *x, int64_t xs, const float *w, int64_t ws,
                   const float *plus, int64_t ps, float *y, int64_t ys, int64_t k, int64_t width) {
#define BLOCK(rows) block(rows, columns, x, xs, w, ws, plus, ps, y, ys, k, width)
    for (; m >= most; m -= most, x += most * xs, y += most * ys, plus += plus ? most * ps : 0) BLOCK(most);
    switch (m) {
        case 1: BLOCK(1); break;
        case 2: BLOCK(2); break;
        case 3: BLOCK(3); break;
        case 4: BLOCK(4); break;
        case 5: BLOCK(5); break;
        case 6: BLOCK(6); break;
        case 7: BLOCK(7); break;
    }
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

/* To the nearest bf16, ties to even; a zero behind an odd number of inputs. */
static void round_rows(const float *x, bf16 *y, int64_t m, int64_t k) {
    int64_t even = k + (k & 1);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < m; r++) {
        const uint32_t *bits = (const uint32_t *)(x + r * k);
        for (int64_t i = 0; i < k; i++) y[r * even + i] = (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16;
        if (k & 1) y[r * even + k] = 0;
    }
}

#if HAS_BF16
/* As `block`, over pairs of inputs and the whole of a panel. */
INLINE void block_bf16(const int rows, const bf16 *x, int64_t xs, const bf16 *w, const float *plus, int64_t ps,
                       float *y, int64_t ys, int64_t k, int64_t width) {
    __m512 sum[ROWS][PANEL / LANES];
    memset(sum, 0, sizeof sum);
    for (int64_t i = 0; i < k; i += 2)
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * xs + i, sizeof pair);
            for (int c = 0; c < PANEL / LANES; c++)
                sum[r][c] = _mm512_dpbf16_ps(sum[r][c], (__m512bh)_mm512_set1_epi32(pair),
                                             (__m512bh)_mm512_loadu_si512(w + i * PANEL + c * 2 * LANES));
        }
    for (int r = 0; r < rows; r++) {
        float out[PANEL];
        memcpy(out, sum[r], sizeof out);
        for (int64_t c = 0; c < width; c++) y[r * ys + c] = out[c] + (plus ? plus[r * ps + c] : 0.0f);
    }
}

static void multiply_bf16(const bf16 *x, const bf16 *panels, const float *plus, int64_t ps, float *y, int64_t m,
                          int64_t n, int64_t k) {
    k += k & 1;
#pragma omp for schedule(static)
    for (int64_t j = 0; j < n; j += PANEL) {
        int64_t width = n - j < PANEL ? n - j : PANEL, r = 0;
#define BLOCK_BF16(rows) \
    block_bf16(rows, x + r * k, k, panels + j * k, plus ? plus + j + r * ps : plus, ps, y + j + r * n, n, k, width)
        for (; m - r >= ROWS; r += ROWS) BLOCK_BF16(ROWS);
        switch (m - r) {
            case 1: BLOCK_BF16(1); break;
            case 2: BLOCK_BF16(2); break;
            case 3: BLOCK_BF16(3); break;
            case 4: BLOCK_BF16(4); break;
            case 5: BLOCK_BF16(5); break;
            case 6: BLOCK_BF16(6); break;
            case 7: BLOCK_BF16(7); break;
        }
    }
}
#else
static void multiply_bf16(const bf16 *x, const bf16 *panels, const float *plus, int64_t ps, float *y, int64_t m,
                          int64_t n, int64_t k) {}
#endif

/* `rounded`: room for x in bf16 where the panels are in bf16, else NULL. */
static void multiply_by(const void *panels, bf16 *rounded, const float *x, const float *plus, int64_t ps, float *y,
                        int64_t m, int64_t n, int64_t k) {
    if (rounded) {
        round_rows(x, rounded, m, k);
        multiply_bf16(rounded, panels, plus, ps, y, m, n, k);
    } else
        multiply(x, panels, plus, ps, y, m, n, k);
}

void product(const float *x, const void *panels, const float *bias, float *y, bf16 *rounded, int64_t m, int64_t n,
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

/* Rotate queries and keys, and put the new keys and values where they are kept. */
static void place(const Model *model, const Layer *w, const Step *step, int64_t layer) {
    int64_t kv = model->kv_heads, group = model->group, dim = model->dim, width = kv * (group + 2) * dim;
#pragma omp for collapse(2) schedule(static)
    for (int64_t r = 0; r < step->rows; r++)
        for (int64_t head = 0; head < kv; head++) {
            float *q = step->qkv + r * width + head * (group + 2) * dim, *k = q + group * dim, *v = k + dim;
            const float *cos = step->cos + r * dim / 2, *sin = step->sin + r * dim / 2;
            const Place *to = step->place + r;
            float *key = to->key + (2 * kv * layer + head) * to->head;
            for (int64_t g = 0; g < group; g++) rotate(q + g * dim, w->q_norm, cos, sin, dim, model->eps);
            rotate(k, w->k_norm, cos, sin, dim, model->eps);
            memcpy(key, k, dim * sizeof *k);
            memcpy(key + kv * to->head, v, dim * sizeof *v);
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
                        const int64_t dim) {
    int64_t kv = model->kv_heads, group = model->group, width = kv * (group + 2) * dim;
    const float *key = part->key + (2 * kv * layer + head) * part->head, *value = key + kv * part->head;
    float q[ROWS][MAX_DIM], scores[ROWS][KEYS], out[ROWS][MAX_DIM], scale = 1 / sqrtf(dim);
    for (int64_t first = 0; first < part->rows * group; first += ROWS) {
        int64_t m = part->rows * group - first < ROWS ? part->rows * group - first : ROWS;
        int64_t last = part->visible + (first + m - 1) / group, n = last < part->keys ? last : part->keys;
        for (int64_t i = 0; i < m; i++) {
            int64_t row = part->first + (first + i) / group, g = (first + i) % group;
            const float *from = step->qkv + row * width + (head * (group + 2) + g) * dim;
            for (int64_t d = 0; d < dim; d++) q[i][d] = from[d] * scale;
        }
        for (int64_t j = 0; j < n; j++)
            for (int64_t i = 0; i < m; i++) scores[i][j] = dot(q[i], key + j * dim, dim);
        for (int64_t i = 0; i < m; i++) {
            int64_t r = (first + i) / group, g = (first + i) % group;
            int64_t seen = part->visible + r < n ? part->visible + r : n;
            step->sums[((part->result + r) * kv + head) * group + g] = softmax(scores[i], seen);
            for (int64_t j = seen; j < n; j++) scores[i][j] = 0;
        }
        int64_t d = 0;
        for (; d + VALUES <= dim; d += VALUES)
            blocks(ROWS / 2, m, VALUES / LANES, scores[0], KEYS, value + d, dim, 0, 0, out[0] + d, MAX_DIM, n, VALUES);
        for (; d < dim; d += LANES)
            blocks(ROWS, m, 1, scores[0], KEYS, value + d, dim, 0, 0, out[0] + d, MAX_DIM, n, LANES);
        for (int64_t i = 0; i < m; i++) {
            int64_t r = (first + i) / group, g = (first + i) % group;
            memcpy(step->partial + (((part->result + r) * kv + head) * group + g) * dim, out[i], dim * sizeof **out);
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
    switch (model->dim) {
        case 64: attend_part(model, step, part, layer, head, 64); break;
        case 128: attend_part(model, step, part, layer, head, 128); break;
        default: attend_part(model, step, part, layer, head, model->dim);
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

#define TILE 32 /* queries of a tile: its scores stay in the second cache */

/* The last n of m positions attend causally: q, out, grad, dq [n][kv][group][D], k, v, dk, dv [m][kv][D], sums
   [n][kv][group]. Queries are rows r = position * group + member of the group. The panels and the room of each thread
   are scratch, whose sizes kernels.py knows. */
typedef struct {
    int64_t n, m, kv, group, dim;
    const float *q, *k, *v, *out, *sums, *grad;
    float *dq, *dk, *dv;
    float *key_panels;                          /* [kv][m / PANEL][D][PANEL] */
    bf16 *value_pairs, *key_pairs;              /* [kv][m / PANEL][D / 2][PANEL][2], [kv][D / PANEL][m / 2][PANEL][2] */
    float *scores;                              /* [threads][2][TILE][m] */
    bf16 *turned;                               /* [threads][3][TILE][m] */
    float *sum_dk, *sum_dv;                     /* [threads][kv][m][D], zeros */
} Attention;

/* Keys of one head, from `key` on, rows `stride` apart, as the panels of a product over D. */
static void pack_keys(const float *key, int64_t stride, float *panel, int64_t count, int64_t dim) {
    for (int64_t d = 0; d < dim; d++)
        for (int64_t c = 0; c < PANEL; c++) panel[d * PANEL + c] = c < count ? key[c * stride + d] : 0.0f;
}

/* Where row r of a head stands in q and its like. */
static int64_t place_of(const Attention *a, int64_t head, int64_t r) {
    return (r / a->group * a->kv + head) * a->group + r % a->group;
}

/* The queries first .. first + rows of one head, times 1 / sqrt(D): tile [rows][D]. */
static void load_queries(const Attention *a, int64_t head, int64_t first, int64_t rows, float *tile) {
    float scale = 1 / sqrtf(a->dim);
    for (int64_t i = 0; i < rows; i++) {
        const float *from = a->q + place_of(a, head, first + i) * a->dim;
        for (int64_t d = 0; d < a->dim; d++) tile[i * a->dim + d] = from[d] * scale;
    }
}

static int64_t seen_by(const Attention *a, int64_t row) { return a->m - a->n + row / a->group + 1; }

/* scores [rows][m] of a tile over the first `seen` keys. */
static void score(const Attention *a, int64_t head, const float *tile, int64_t rows, int64_t seen, float *scores) {
    int64_t panels = (a->m + PANEL - 1) / PANEL, dim = a->dim;
    for (int64_t j = 0; j < seen; j += PANEL) {
        int64_t width = a->m - j < PANEL ? a->m - j : PANEL;
        const float *panel = a->key_panels + (head * panels + j / PANEL) * dim * PANEL;
        blocks(ROWS, rows, PANEL / LANES, tile, dim, panel, PANEL, 0, 0, scores + j, a->m, dim, width);
    }
}

static void pack_all_keys(const Attention *a) {
    int64_t panels = (a->m + PANEL - 1) / PANEL;
#pragma omp for collapse(2) schedule(static)
    for (int64_t head = 0; head < a->kv; head++)
        for (int64_t j = 0; j < panels; j++) {
            int64_t left = a->m - j * PANEL;
            pack_keys(a->k + (j * PANEL * a->kv + head) * a->dim, a->kv * a->dim,
                      a->key_panels + (head * panels + j) * a->dim * PANEL, left < PANEL ? left : PANEL, a->dim);
        }
}

void attend_forward(const Attention *a, float *out, float *sums, int64_t threads) {
    int64_t dim = a->dim, tiles = (a->n * a->group + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
    {
        float *scores = a->scores + 2 * TILE * a->m * omp_get_thread_num(), tile[TILE * MAX_DIM], found[TILE * MAX_DIM];
        pack_all_keys(a);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t t = 0; t < tiles; t++)
            for (int64_t head = 0; head < a->kv; head++) {
                int64_t first = (tiles - 1 - t) * TILE, left = a->n * a->group - first; /* the longest first */
                int64_t rows = left < TILE ? left : TILE, seen = seen_by(a, first + rows - 1);
                load_queries(a, head, first, rows, tile);
                score(a, head, tile, rows, seen, scores);
                for (int64_t i = 0; i < rows; i++) {
                    int64_t own = seen_by(a, first + i), r = first + i;
                    sums[place_of(a, head, r)] = softmax(scores + i * a->m, own);
                    for (int64_t j = own; j < seen; j++) scores[i * a->m + j] = 0;
                }
                int64_t d = 0, stride = a->kv * dim;
                const float *value = a->v + head * dim;
                for (; d + VALUES <= dim; d += VALUES)
                    blocks(ROWS / 2, rows, VALUES / LANES, scores, a->m, value + d, stride, 0, 0, found + d, dim, seen,
                           VALUES);
                for (; d < dim; d += LANES)
                    blocks(ROWS, rows, 1, scores, a->m, value + d, stride, 0, 0, found + d, dim, seen, LANES);
                for (int64_t i = 0; i < rows; i++) {
                    int64_t r = first + i;
                    memcpy(out + place_of(a, head, r) * dim, found + i * dim,
                           dim * sizeof *found);
                }
            }
    }
}

#if HAS_BF16
INLINE bf16 rounded_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* x [count][k], rows `stride` apart, as panels of pairs over the columns: [k / PANEL][count / 2][PANEL][2]; count and k
   are filled up with zeros to `even` and to whole panels. */
static void pack_rows(const float *x, int64_t stride, bf16 *pairs, int64_t count, int64_t even, int64_t k) {
    for (int64_t j = 0; j < k; j += PANEL)
        for (int64_t i = 0; i < even; i++)
            for (int64_t c = 0; c < PANEL; c++)
                pairs[j * even + (i / 2 * PANEL + c) * 2 + (i & 1)] =
                    i < count && j + c < k ? rounded_to_bf16(x[i * stride + j + c]) : 0;
}

/* x [count][k] as panels of pairs over the rows: [count / PANEL][k / 2][PANEL][2]. */
static void pack_columns(const float *x, int64_t stride, bf16 *pairs, int64_t count, int64_t k) {
    for (int64_t c = 0; c < PANEL; c++)
        for (int64_t i = 0; i < k; i++)
            pairs[(i / 2 * PANEL + c) * 2 + (i & 1)] = c < count ? rounded_to_bf16(x[c * stride + i]) : 0;
}

/* y [m][n] (+)= x [m][k] times panels of pairs, one thread. */
static void add_product(const bf16 *x, int64_t xs, const bf16 *pairs, float *y, int64_t ys, int64_t m, int64_t n,
                        int64_t k, int adds) {
    for (int64_t j = 0; j < n; j += PANEL) {
        int64_t width = n - j < PANEL ? n - j : PANEL, r = 0;
        const bf16 *panel = pairs + j * k;
#define ADD(rows) \
    block_bf16(rows, x + r * xs, xs, panel, adds ? y + r * ys + j : 0, ys, y + r * ys + j, ys, k, width)
        for (; m - r >= ROWS; r += ROWS) ADD(ROWS);
        for (; r < m; r++) ADD(1);
    }
}

/* dq, and of each thread its part of dk and dv. FlashAttention, arXiv 2205.14135, algorithm 4. */
void attend_backward(const Attention *a, int64_t threads) {
    int64_t dim = a->dim, m = a->m, even = m + (m & 1), panels = (m + PANEL - 1) / PANEL, stride = a->kv * dim;
    int64_t tiles = (a->n * a->group + TILE - 1) / TILE, wide = (dim + PANEL - 1) / PANEL * PANEL;
#pragma omp parallel num_threads(threads)
    {
        int64_t thread = omp_get_thread_num();
        float *scores = a->scores + 2 * TILE * m * thread, *by_score = scores + TILE * m;
        bf16 *by_key = a->turned + 3 * TILE * even * thread, *weight_turned = by_key + TILE * even;
        bf16 *score_turned = weight_turned + TILE * even;
        float *dk = a->sum_dk + thread * a->kv * m * dim, *dv = a->sum_dv + thread * a->kv * m * dim;
        float tile[TILE * MAX_DIM], grad[TILE * MAX_DIM], found[TILE * MAX_DIM];
        bf16 grad_rows[TILE * MAX_DIM], grad_pairs[TILE * MAX_DIM], query_pairs[TILE * MAX_DIM];
        pack_all_keys(a);
#pragma omp for collapse(2) schedule(static)
        for (int64_t head = 0; head < a->kv; head++)
            for (int64_t j = 0; j < panels; j++) {
                int64_t left = m - j * PANEL;
                pack_columns(a->v + (j * PANEL * a->kv + head) * dim, stride,
                             a->value_pairs + (head * panels + j) * dim * PANEL, left < PANEL ? left : PANEL, dim);
            }
#pragma omp for schedule(static)
        for (int64_t head = 0; head < a->kv; head++)
            pack_rows(a->k + head * dim, stride, a->key_pairs + head * wide * even, m, even, dim);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t t = 0; t < tiles; t++)
            for (int64_t head = 0; head < a->kv; head++) {
                int64_t first = (tiles - 1 - t) * TILE, left = a->n * a->group - first;
                int64_t rows = left < TILE ? left : TILE, seen = seen_by(a, first + rows - 1), pairs = seen + (seen & 1);
                load_queries(a, head, first, rows, tile);
                score(a, head, tile, rows, seen, scores);
                for (int64_t i = 0; i < rows; i++) {
                    int64_t r = first + i, at = place_of(a, head, r);
                    memcpy(grad + i * dim, a->grad + at * dim, dim * sizeof *grad);
                    for (int64_t d = 0; d < dim; d++) grad_rows[i * dim + d] = rounded_to_bf16(grad[i * dim + d]);
                }
                for (int64_t j = 0; j < seen; j += PANEL)
                    add_product(grad_rows, dim, a->value_pairs + (head * panels + j / PANEL) * dim * PANEL, by_score + j,
                                m, rows, m - j < PANEL ? m - j : PANEL, dim, 0);
                for (int64_t i = 0; i < rows; i++) {
                    int64_t r = first + i, at = place_of(a, head, r);
                    float inner = dot(grad + i * dim, a->out + at * dim, dim), sum = a->sums[at];
                    int64_t own = seen_by(a, r);
                    float *weight = scores + i * m, *by = by_score + i * m;
                    for (int64_t j = 0; j < own; j++) {
                        weight[j] = exponential(weight[j] - sum);
                        by[j] = weight[j] * (by[j] - inner);
                    }
                    for (int64_t j = own; j < seen; j++) weight[j] = by[j] = 0;
                    for (int64_t j = 0; j < seen; j++) by_key[i * even + j] = rounded_to_bf16(by[j]);
                    if (seen & 1) by_key[i * even + seen] = 0;
                }
                for (int64_t j = 0; j < seen; j++)
                    for (int64_t i = 0; i < TILE; i++) {
                        weight_turned[j * TILE + i] = i < rows ? rounded_to_bf16(scores[i * m + j]) : 0;
                        score_turned[j * TILE + i] = i < rows ? rounded_to_bf16(by_score[i * m + j]) : 0;
                    }
                pack_rows(grad, dim, grad_pairs, rows, TILE, dim);
                pack_rows(tile, dim, query_pairs, rows, TILE, dim);
                for (int64_t d = 0; d < dim; d += PANEL) {
                    int64_t width = dim - d < PANEL ? dim - d : PANEL;
                    add_product(by_key, even, a->key_pairs + head * wide * even + d * even, found + d, dim, rows, width,
                                pairs, 0);
                    add_product(weight_turned, TILE, grad_pairs + d * TILE, dv + head * m * dim + d, dim, seen, width,
                                TILE, 1);
                    add_product(score_turned, TILE, query_pairs + d * TILE, dk + head * m * dim + d, dim, seen, width,
                                TILE, 1);
                }
                for (int64_t i = 0; i < rows; i++) {
                    int64_t r = first + i, at = place_of(a, head, r);
                    for (int64_t d = 0; d < dim; d++) a->dq[at * dim + d] = found[i * dim + d] / sqrtf(dim);
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
#else
void attend_backward(const Attention *a, int64_t threads) {}
#endif

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
    bf16 *rounded = model->in_bf16 ? step->rounded : NULL;
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
