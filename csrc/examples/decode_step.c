/* Decoding steps from C: two layers' queries, keys and log-sum-exps in, committed tokens out. What the first
 * steps commit in doubt is masked again, as long as its budget lasts.
 *
 * The step's scores are then compared with attention written out by hand in double precision, and an invalid
 * call is shown to say what is wrong. Exits with 0 if all of that holds.
 *
 *     cmake -B build && cmake --build build && ctest --test-dir build
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attn_sampler.h"

enum { B = 2, HQ = 4, HKV = 2, M = 10, N = 30, D = 24, LAYERS = 2, C = 5, V = 11, T = 30 };
enum { BLOCK_START = 22, MASK = 10 };

static double uniform(unsigned *state) { /* in (-1, 1) */
    *state = *state * 1664525u + 1013904223u;
    return (double)(*state >> 8) / (1 << 23) - 1.0;
}

static float q[LAYERS][B][HQ][M][D], k[LAYERS][B][HKV][N][D], lse[LAYERS][B][HQ][M], logits[B][C][V];
static int64_t tokens[B][T], token_ids[B][C];
static float scores[B][C], confidence[B][C], current[B][C];
static uint8_t selected[B][C], revised[B][C];
static int32_t budget[B][C];
static double expected[B][C];

/* A dense view of an array. */
static attn_sampler_tensor view(void *data, attn_sampler_dtype dtype, int ndim, const int64_t *shape) {
    attn_sampler_tensor t = {data, {0}, {0}, ndim, dtype};
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; --i) {
        t.shape[i] = shape[i];
        t.stride[i] = stride;
        stride *= shape[i];
    }
    return t;
}
#define VIEW(array, dtype, ...)                                                                              \
    view(array, dtype, sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t), (int64_t[]){__VA_ARGS__})

static double logit(int l, int b, int h, int i, int j) {
    double sum = 0.0;
    for (int d = 0; d < D; ++d)
        sum += (double)q[l][b][h][i][d] * (double)k[l][b][h / (HQ / HKV)][j][d];
    return sum / sqrt(D);
}

static void make_problem(void) {
    unsigned state = 1;
    for (size_t i = 0; i < sizeof(q) / sizeof(float); ++i)
        ((float *)q)[i] = (float)(2 * uniform(&state));
    for (size_t i = 0; i < sizeof(k) / sizeof(float); ++i)
        ((float *)k)[i] = (float)(2 * uniform(&state));
    for (size_t i = 0; i < sizeof(logits) / sizeof(float); ++i)
        ((float *)logits)[i] = (float)(8 * uniform(&state));
    for (int b = 0; b < B; ++b)
        for (int t = 0; t < T; ++t)
            tokens[b][t] = t >= BLOCK_START && t % 3 != 0 ? MASK : t % 10;
    for (int l = 0; l < LAYERS; ++l)
        for (int b = 0; b < B; ++b)
            for (int h = 0; h < HQ; ++h)
                for (int i = 0; i < M; ++i) {
                    double sum = 0.0;
                    for (int j = 0; j < N; ++j)
                        sum += exp(logit(l, b, h, i, j));
                    lse[l][b][h][i] = (float)log(sum);
                    for (int c = 0; c < C; ++c)
                        expected[b][c] += exp(logit(l, b, h, i, BLOCK_START + c)) / sum;
                }
}

int main(void) {
    make_problem();
    attn_sampler_tensor q_view[LAYERS], k_view[LAYERS], lse_view[LAYERS];
    attn_sampler_layer layers[LAYERS];
    for (int l = 0; l < LAYERS; ++l) {
        q_view[l] = VIEW(q[l], ATTN_SAMPLER_FLOAT32, B, HQ, M, D);
        k_view[l] = VIEW(k[l], ATTN_SAMPLER_FLOAT32, B, HKV, N, D);
        lse_view[l] = VIEW(lse[l], ATTN_SAMPLER_FLOAT32, B, HQ, M);
        layers[l] = (attn_sampler_layer){&q_view[l], &k_view[l], &lse_view[l], NULL, NULL};
    }
    const attn_sampler_tensor tokens_view = VIEW(tokens, ATTN_SAMPLER_INT64, B, T);
    const attn_sampler_tensor logits_view = VIEW(logits, ATTN_SAMPLER_FLOAT32, B, C, V);
    const attn_sampler_tensor scores_view = VIEW(scores, ATTN_SAMPLER_FLOAT32, B, C);
    const attn_sampler_tensor ids_view = VIEW(token_ids, ATTN_SAMPLER_INT64, B, C);
    const attn_sampler_tensor confidence_view = VIEW(confidence, ATTN_SAMPLER_FLOAT32, B, C);
    const attn_sampler_tensor selected_view = VIEW(selected, ATTN_SAMPLER_BOOL, B, C);
    const attn_sampler_tensor budget_view = VIEW(budget, ATTN_SAMPLER_INT32, B, C);
    const attn_sampler_tensor revised_view = VIEW(revised, ATTN_SAMPLER_UINT8, B, C);
    const attn_sampler_tensor current_view = VIEW(current, ATTN_SAMPLER_FLOAT32, B, C);
    const attn_sampler_revision revision = {&budget_view, &revised_view, &current_view, NULL, NULL};
    const attn_sampler_span block = {BLOCK_START, BLOCK_START + C}; /* of tokens and of keys */
    attn_sampler_decode_step_params params = {
        .block = block,
        .mask_token_id = MASK,
        .query_rows = ATTN_SAMPLER_QUERY_ROWS_ALL,
        .attention = {.columns = block,
                      .query_start = N - M,
                      .softmax_scale = 1.0 / sqrt(D),
                      .diagonal = 1,
                      .window_left = -1,
                      .window_right = -1},
        .sampling = {.metric = ATTN_SAMPLER_METRIC_PROBABILITY, .temperature = 0.0},
        .selection = {.rule = ATTN_SAMPLER_RULE_PARALLEL,
                      .fallback = ATTN_SAMPLER_FALLBACK_CONFIDENCE,
                      .tau = 0.9,
                      .replace_tau = INFINITY, /* the logits stay as they are: nothing better comes */
                      .remask_tau = 0.5,
                      .max_revisions = 1,
                      .revision_order = ATTN_SAMPLER_REVISION_ORDER_PRODUCT},
    };
    attn_sampler_exec exec = {.device = ATTN_SAMPLER_CPU, .num_threads = 2};
    printf("attn_sampler %s, CPU kernels: %s\n", attn_sampler_version(), attn_sampler_cpu_isa());

    /* An invalid call writes nothing and says why. */
    params.selection.tau = 1.5;
    attn_sampler_status status =
        attn_sampler_decode_step(&tokens_view, &logits_view, layers, LAYERS, NULL, &params, &scores_view,
                                 &ids_view, &confidence_view, &selected_view, &revision, &exec);
    printf("refused: %s\n", attn_sampler_last_error());
    if (status != ATTN_SAMPLER_INVALID_ARGUMENT || strstr(attn_sampler_last_error(), "tau") == NULL ||
        scores[0][0] != 0.0f)
        return EXIT_FAILURE;
    params.selection.tau = 0.9;

    const int64_t before = tokens[0][BLOCK_START - 1];
    for (int b = 0; b < B; ++b)
        for (int c = 0; c < C; ++c)
            budget[b][c] = 1;
    int steps = 0, revisions = 0;
    for (int masked = 1; masked > 0; ++steps) {
        int64_t old_tokens[B][T];
        memcpy(old_tokens, tokens, sizeof(tokens));
        status =
            attn_sampler_decode_step(&tokens_view, &logits_view, layers, LAYERS, NULL, &params, &scores_view,
                                     &ids_view, &confidence_view, &selected_view, &revision, &exec);
        if (status != ATTN_SAMPLER_OK) {
            fprintf(stderr, "%s\n", attn_sampler_last_error());
            return EXIT_FAILURE;
        }
        masked = 0;
        for (int b = 0; b < B; ++b) {
            int committed = 0, were_masked = 0;
            for (int c = 0; c < C; ++c) {
                const int64_t old = old_tokens[b][BLOCK_START + c], now = tokens[b][BLOCK_START + c];
                committed += selected[b][c];
                were_masked += old == MASK;
                masked += now == MASK;
                const int64_t expected_token = selected[b][c]                           ? token_ids[b][c]
                                               : revised[b][c] == ATTN_SAMPLER_REMASKED ? MASK
                                                                                        : old;
                revisions += revised[b][c] != ATTN_SAMPLER_KEPT;
                if (now != expected_token || (selected[b][c] && old != MASK) || budget[b][c] < 0 ||
                    (revised[b][c] != ATTN_SAMPLER_KEPT && current[b][c] >= 0.5f)) {
                    fprintf(stderr, "wrong token at %d, %d\n", b, c);
                    return EXIT_FAILURE;
                }
                if (fabs((double)scores[b][c] - expected[b][c]) > 1e-5 * expected[b][c]) {
                    fprintf(stderr, "score %g, expected %g\n", (double)scores[b][c], expected[b][c]);
                    return EXIT_FAILURE;
                }
            }
            if (were_masked > 0 && committed == 0) {
                fprintf(stderr, "sequence %d made no progress\n", b);
                return EXIT_FAILURE;
            }
        }
    }
    printf("all masked positions of the block committed in %d steps, %d revisions among them\n", steps,
           revisions);
    return revisions > 0 && tokens[0][BLOCK_START - 1] == before ? EXIT_SUCCESS : EXIT_FAILURE;
}
