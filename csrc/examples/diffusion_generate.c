/* A decoder with the shape of llama.cpp's examples/diffusion, on the C API alone: blocks of masked tokens are
 * filled over several passes of a model, each pass followed by one attn_sampler_decode_step.
 *
 * What such a decoder has at hand is all that is used. Its model gives logits [T][V] and shows the tensors of
 * its graph to a callback as it computes them (there: cb_eval, with flash attention off or on, as queries and
 * keys are the same): "Qcur-L" and "Kcur-L" after RoPE, with ne = {head size, heads, tokens}, the first
 * counted fastest. They are handed to the step where they lie. It makes the row log-sum-exps itself.
 *
 * The model here is a small one of random weights. Checked: the scores of each step against attention written
 * out by hand in double precision, that prompts stay and blocks are filled from left to right, and that one
 * thread and two decode the same. Exits with 0 if all of that holds.
 *
 *     cmake -B build && cmake --build build && ctest --test-dir build
 */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attn_sampler.h"

/* --- What stands for the engine: a model, and the tensors that it shows. ---------------------------------
 */

typedef int32_t token;

struct tensor {
    const char *name;
    float *data;
    int64_t ne[3];
};

typedef void (*eval_callback)(const struct tensor *tensor, void *user_data);

enum { LAYERS = 2, HEADS = 4, KV_HEADS = 2, HEAD_SIZE = 16, WIDTH = HEADS * HEAD_SIZE, VOCAB = 24 };
enum { MASK = VOCAB - 1, PROMPT = 5, LENGTH = 21, BLOCK = 8 };

struct model {
    float embedding[VOCAB][WIDTH], position[LENGTH][WIDTH], head[VOCAB][WIDTH];
    float wq[LAYERS][WIDTH][WIDTH], wk[LAYERS][KV_HEADS * HEAD_SIZE][WIDTH];
};

static void fill(float *data, size_t count, double scale, unsigned *state) {
    for (size_t i = 0; i < count; ++i) {
        *state = *state * 1664525u + 1013904223u;
        data[i] = (float)(scale * ((double)(*state >> 8) / (1 << 23) - 1.0));
    }
}

static void make_model(struct model *model) {
    unsigned state = 7;
    fill(&model->embedding[0][0], VOCAB * WIDTH, 1.0, &state);
    fill(&model->position[0][0], LENGTH * WIDTH, 1.0, &state);
    fill(&model->head[0][0], VOCAB * WIDTH, 3.0, &state);
    fill(&model->wq[0][0][0], sizeof(model->wq) / sizeof(float), 0.4, &state);
    fill(&model->wk[0][0][0], sizeof(model->wk) / sizeof(float), 0.4, &state);
}

/* y [n][rows] = x [n][WIDTH] w^T, w [rows][WIDTH] */
static void matmul(const float *x, const float *w, int n, int rows, float *y) {
    for (int i = 0; i < n; ++i)
        for (int r = 0; r < rows; ++r) {
            double sum = 0.0;
            for (int c = 0; c < WIDTH; ++c)
                sum += (double)x[i * WIDTH + c] * (double)w[r * WIDTH + c];
            y[i * rows + r] = (float)sum;
        }
}

/* The weights of one row, over all keys: attention is bidirectional. */
static void attention_row(const float *q, const float *k, int n, int head, int row, double *weight) {
    double sum = 0.0;
    for (int j = 0; j < n; ++j) {
        double dot = 0.0;
        for (int d = 0; d < HEAD_SIZE; ++d)
            dot += (double)q[(row * HEADS + head) * HEAD_SIZE + d] *
                   (double)k[(j * KV_HEADS + head / (HEADS / KV_HEADS)) * HEAD_SIZE + d];
        sum += weight[j] = exp(dot / sqrt(HEAD_SIZE));
    }
    for (int j = 0; j < n; ++j)
        weight[j] /= sum;
}

static void decode(const struct model *model, const token *tokens, int n, eval_callback callback,
                   void *user_data, float *logits) {
    static float x[LENGTH][WIDTH], q[LENGTH * WIDTH], k[LENGTH * WIDTH];
    for (int t = 0; t < n; ++t)
        for (int c = 0; c < WIDTH; ++c)
            x[t][c] = model->embedding[tokens[t]][c] + model->position[t][c];
    for (int l = 0; l < LAYERS; ++l) {
        matmul(&x[0][0], &model->wq[l][0][0], n, WIDTH, q);
        matmul(&x[0][0], &model->wk[l][0][0], n, KV_HEADS * HEAD_SIZE, k);
        char q_name[16], k_name[16];
        snprintf(q_name, sizeof(q_name), "Qcur-%d", l);
        snprintf(k_name, sizeof(k_name), "Kcur-%d", l);
        callback(&(struct tensor){q_name, q, {HEAD_SIZE, HEADS, n}}, user_data);
        callback(&(struct tensor){k_name, k, {HEAD_SIZE, KV_HEADS, n}}, user_data);
        float mixed[LENGTH][WIDTH] = {{0.0f}};
        for (int h = 0; h < HEADS; ++h)
            for (int i = 0; i < n; ++i) {
                double weight[LENGTH];
                attention_row(q, k, n, h, i, weight);
                for (int j = 0; j < n; ++j)
                    for (int d = 0; d < HEAD_SIZE; ++d)
                        mixed[i][h * HEAD_SIZE + d] += (float)weight[j] * x[j][h * HEAD_SIZE + d];
            }
        for (int t = 0; t < n; ++t)
            for (int c = 0; c < WIDTH; ++c)
                x[t][c] = 0.5f * x[t][c] + mixed[t][c];
    }
    matmul(&x[0][0], &model->head[0][0], n, VOCAB, logits);
}

/* --- The decoder. ----------------------------------------------------------------------------------------
 */

struct diffusion_params {
    token mask_token_id;
    int32_t max_length, block_length;
    int32_t rule; /* attn_sampler_rule */
    double tau, temperature;
    uint64_t seed;
    bool shift_logits; /* position t is predicted from row t - 1, and position 0 from its own */
    int32_t num_threads;
    /* Called after each step; false ends the decoding. */
    bool (*step_callback)(int32_t step, const token *tokens, int32_t n_tokens, void *user_data);
    void *user_data;
};

/* What the callback keeps of a pass: queries and keys where the engine's buffers are reused. */
struct observed {
    float q[LAYERS][LENGTH * WIDTH], k[LAYERS][LENGTH * WIDTH];
    int64_t n_tokens;
    float scores[LENGTH]; /* of the last step's block, which begins at block_start */
    int32_t block_start, block_length;
};

static void observe(const struct tensor *tensor, void *user_data) {
    struct observed *seen = user_data;
    int layer;
    if (sscanf(tensor->name, "Qcur-%d", &layer) != 1 && sscanf(tensor->name, "Kcur-%d", &layer) != 1)
        return;
    float *target = tensor->name[0] == 'Q' ? seen->q[layer] : seen->k[layer];
    memcpy(target, tensor->data, sizeof(float) * tensor->ne[0] * tensor->ne[1] * tensor->ne[2]);
    seen->n_tokens = tensor->ne[2];
}

/* [1, heads, tokens, head size] of a tensor with ne = {head size, heads, tokens}. */
static attn_sampler_tensor heads_of(float *data, int64_t heads, int64_t n_tokens) {
    return (attn_sampler_tensor){
        .data = data,
        .shape = {1, heads, n_tokens, HEAD_SIZE},
        .stride = {heads * n_tokens * HEAD_SIZE, HEAD_SIZE, heads * HEAD_SIZE, 1},
        .ndim = 4,
        .dtype = ATTN_SAMPLER_FLOAT32,
    };
}

static attn_sampler_tensor row_of(void *data, attn_sampler_dtype dtype, int64_t length) {
    return (attn_sampler_tensor){
        .data = data, .shape = {1, length}, .stride = {length, 1}, .ndim = 2, .dtype = dtype};
}

/* Fills max_length - n_input tokens behind the input. Returns how many passes it took, or -1. */
static int diffusion_generate(const struct model *model, struct observed *seen, const token *input,
                              int32_t n_input, token *output, const struct diffusion_params *params) {
    const int32_t n = params->max_length;
    int64_t tokens[LENGTH], token_ids[LENGTH];
    float logits[LENGTH + 1][VOCAB], confidence[LENGTH];
    uint8_t selected[LENGTH];
    for (int32_t t = 0; t < n; ++t)
        tokens[t] = output[t] = t < n_input ? input[t] : params->mask_token_id;

    int passes = 0;
    for (int32_t start = n_input; start < n; start += params->block_length) {
        const int32_t stop = start + params->block_length < n ? start + params->block_length : n;
        const int32_t count = stop - start;
        for (int32_t masked = count; masked > 0; ++passes) {
            decode(model, output, n, observe, seen, &logits[1][0]);
            memcpy(logits[0], logits[1], sizeof(logits[0]));

            attn_sampler_tensor q[LAYERS], k[LAYERS];
            attn_sampler_layer layers[LAYERS];
            for (int l = 0; l < LAYERS; ++l) {
                q[l] = heads_of(seen->q[l], HEADS, seen->n_tokens);
                k[l] = heads_of(seen->k[l], KV_HEADS, seen->n_tokens);
                layers[l] = (attn_sampler_layer){&q[l], &k[l], NULL, NULL, NULL};
            }
            const attn_sampler_tensor tokens_view = row_of(tokens, ATTN_SAMPLER_INT64, n);
            const attn_sampler_tensor scores_view = row_of(seen->scores, ATTN_SAMPLER_FLOAT32, count);
            const attn_sampler_tensor ids_view = row_of(token_ids, ATTN_SAMPLER_INT64, count);
            const attn_sampler_tensor confidence_view = row_of(confidence, ATTN_SAMPLER_FLOAT32, count);
            const attn_sampler_tensor selected_view = row_of(selected, ATTN_SAMPLER_BOOL, count);
            const attn_sampler_tensor logits_view = {
                .data = logits[start + (params->shift_logits ? 0 : 1)],
                .shape = {1, count, VOCAB},
                .stride = {(int64_t)count * VOCAB, VOCAB, 1},
                .ndim = 3,
                .dtype = ATTN_SAMPLER_FLOAT32,
            };
            const attn_sampler_span block = {start, stop};
            const attn_sampler_decode_step_params step = {
                .block = block,
                .mask_token_id = params->mask_token_id,
                .query_rows = ATTN_SAMPLER_QUERY_ROWS_ALL,
                .attention = {.columns = block,
                              .softmax_scale = 1.0 / sqrt(HEAD_SIZE),
                              .diagonal = 1,
                              .window_left = -1,
                              .window_right = -1},
                .sampling = {.metric = ATTN_SAMPLER_METRIC_PROBABILITY,
                             .temperature = params->temperature,
                             .seed = params->seed + (uint64_t)passes}, /* a stream of its own for each step */
                .selection = {.rule = params->rule,
                              .fallback = ATTN_SAMPLER_FALLBACK_CONFIDENCE,
                              .tau = params->tau},
            };
            attn_sampler_exec exec = {.device = ATTN_SAMPLER_CPU, .num_threads = params->num_threads};
            if (attn_sampler_decode_step(&tokens_view, &logits_view, layers, LAYERS, NULL, &step,
                                         &scores_view, &ids_view, &confidence_view, &selected_view, NULL,
                                         &exec) != ATTN_SAMPLER_OK) {
                fprintf(stderr, "%s\n", attn_sampler_last_error());
                return -1;
            }
            seen->block_start = start;
            seen->block_length = count;
            masked = 0;
            for (int32_t t = start; t < stop; ++t) {
                output[t] = (token)tokens[t];
                masked += output[t] == params->mask_token_id;
            }
            if (params->step_callback != NULL && !params->step_callback(passes, output, n, params->user_data))
                return passes + 1;
        }
    }
    return passes;
}

/* --- The checks. -----------------------------------------------------------------------------------------
 */

struct checked {
    const struct observed *seen;
    int32_t masked; /* before the step */
    int wrong;
};

static bool check_step(int32_t step, const token *tokens, int32_t n_tokens, void *user_data) {
    struct checked *checked = user_data;
    const struct observed *seen = checked->seen;
    double expected[LENGTH] = {0.0};
    for (int l = 0; l < LAYERS; ++l)
        for (int h = 0; h < HEADS; ++h)
            for (int i = 0; i < n_tokens; ++i) {
                double weight[LENGTH];
                attention_row(seen->q[l], seen->k[l], n_tokens, h, i, weight);
                for (int j = 0; j < n_tokens; ++j)
                    expected[j] += weight[j];
            }
    for (int c = 0; c < seen->block_length; ++c) {
        const double score = expected[seen->block_start + c];
        if (!(fabs((double)seen->scores[c] - score) <= 1e-5 * score)) {
            fprintf(stderr, "step %d: score %g, expected %g\n", step, (double)seen->scores[c], score);
            checked->wrong = 1;
        }
    }
    int32_t masked = 0;
    for (int32_t t = 0; t < n_tokens; ++t) {
        masked += tokens[t] == MASK;
        /* Nothing behind the block is filled, and nothing before it is left. */
        if ((tokens[t] != MASK && t >= seen->block_start + seen->block_length) ||
            (tokens[t] == MASK && t < seen->block_start))
            checked->wrong = 1;
    }
    if (masked >= checked->masked)
        checked->wrong = 1; /* no progress */
    checked->masked = masked;
    return true;
}

int main(void) {
    static struct model model;
    static struct observed seen;
    make_model(&model);
    const token input[PROMPT] = {3, 1, 4, 1, 5};
    const struct {
        const char *name;
        int32_t rule;
        double tau, temperature;
        bool shift_logits;
    } cases[] = {
        {"parallel", ATTN_SAMPLER_RULE_PARALLEL, 0.6, 0.0, false},
        {"sequential", ATTN_SAMPLER_RULE_SEQUENTIAL, 0.9, 0.0, true},
        {"threshold", ATTN_SAMPLER_RULE_THRESHOLD, 0.6, 0.7, true},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); ++i) {
        token output[2][LENGTH];
        int passes[2];
        for (int run = 0; run < 2; ++run) {
            struct checked checked = {&seen, LENGTH - PROMPT, 0};
            const struct diffusion_params params = {
                .mask_token_id = MASK,
                .max_length = LENGTH,
                .block_length = BLOCK,
                .rule = cases[i].rule,
                .tau = cases[i].tau,
                .temperature = cases[i].temperature,
                .seed = 11,
                .shift_logits = cases[i].shift_logits,
                .num_threads = run + 1,
                .step_callback = check_step,
                .user_data = &checked,
            };
            passes[run] = diffusion_generate(&model, &seen, input, PROMPT, output[run], &params);
            if (passes[run] < 0 || checked.wrong || checked.masked != 0)
                return EXIT_FAILURE;
        }
        printf("%s:", cases[i].name);
        for (int t = 0; t < LENGTH; ++t)
            printf(" %d", output[0][t]);
        printf("  (%d passes)\n", passes[0]);
        if (passes[0] != passes[1] || memcmp(output[0], output[1], sizeof(output[0])) != 0 ||
            memcmp(output[0], input, sizeof(input)) != 0)
            return EXIT_FAILURE;
        const bool one_a_pass = cases[i].rule == ATTN_SAMPLER_RULE_SEQUENTIAL;
        if (one_a_pass != (passes[0] == LENGTH - PROMPT))
            return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
