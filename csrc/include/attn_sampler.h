/* attn_sampler: attention-guided decoding of masked-diffusion language models.
 *
 * C API of the compiled core. It needs neither Python nor torch: tensors are plain views (pointer,
 * shape, strides in elements), every function returns a status, and attn_sampler_last_error() says in
 * words what was wrong. No function allocates or frees what the caller passes; on any status other
 * than ATTN_SAMPLER_OK and ATTN_SAMPLER_OUT_OF_MEMORY nothing has been written to an output, and tokens are
 * written only by a step that succeeds. (ATTN_SAMPLER_INTERNAL_ERROR from CUDA: a launch failed, and those
 * before it in the same call may have run.)
 *
 * Shapes: B sequences, Hq query heads, Hkv key heads (Hq a multiple of Hkv; query head h reads key
 * head h / (Hq / Hkv)), M query rows, N keys, D head dimension, C candidate columns, V vocabulary.
 *
 * Results do not depend on the number of threads: the same input gives the same bits, a sequence alone and in
 * any batch. On CUDA so too, for any number of multiprocessors of one architecture, where the rows of q and k
 * start on multiples of 16 bytes alone and in the batch, or in neither.
 */
#ifndef ATTN_SAMPLER_H_
#define ATTN_SAMPLER_H_

#include <stdint.h>

#if defined(_WIN32)
#define ATTN_SAMPLER_API __declspec(dllexport)
#else
#define ATTN_SAMPLER_API __attribute__((visibility("default")))
#endif

/* The largest values that are taken. */
#define ATTN_SAMPLER_MAX_HEADDIM 512 /* on CUDA: a tile of keys fits the shared memory of every GPU */
#define ATTN_SAMPLER_MAX_ELEMENTS (INT64_C(1) << 40) /* of a tensor, a size of 0 counting as 1 */
#define ATTN_SAMPLER_MAX_ROWS (INT64_C(1) << 32)     /* of the queries of all heads and sequences */
#define ATTN_SAMPLER_MAX_KEYS                                                                                \
    ((INT64_C(1) << 30) - 1) /* the kernels count keys, and positions of a block, in 32 bits */
#define ATTN_SAMPLER_MAX_VOCAB (INT64_C(1) << 34)    /* the sampling stream counts groups of 4 in 32 bits */
#define ATTN_SAMPLER_MAX_POSITION (INT64_C(1) << 62) /* sums of positions stay far from overflow */
#define ATTN_SAMPLER_MAX_POOL_WIDTH 1023      /* a kernel holds the scores around those that it pools */
#define ATTN_SAMPLER_MAX_SCALE 2.35e38        /* finite in float32, times log2(e) too */
#define ATTN_SAMPLER_MIN_TEMPERATURE 0x1p-120 /* logits are multiplied by its inverse in float32 */
#define ATTN_SAMPLER_MAX_TOP_P_VOCAB (INT64_C(1) << 32) /* weights of 30 bits add up to less than 2^63 */

#define ATTN_SAMPLER_WORKSPACE_ZEROS 65536 /* bytes of counters at the start of every CUDA workspace */

#ifdef __cplusplus
extern "C" {
#endif

typedef enum attn_sampler_status {
    ATTN_SAMPLER_OK = 0,
    ATTN_SAMPLER_INVALID_ARGUMENT = 1, /* an argument breaks the contract below */
    ATTN_SAMPLER_UNSUPPORTED = 2,      /* valid, but not served by this build or device */
    ATTN_SAMPLER_OUT_OF_MEMORY = 3,
    ATTN_SAMPLER_INTERNAL_ERROR = 4,
    ATTN_SAMPLER_WORKSPACE_TOO_SMALL = 5 /* CUDA: nothing was launched; see attn_sampler_exec */
} attn_sampler_status;

typedef enum attn_sampler_dtype {
    ATTN_SAMPLER_FLOAT32 = 0,
    ATTN_SAMPLER_FLOAT16 = 1,
    ATTN_SAMPLER_BFLOAT16 = 2,
    ATTN_SAMPLER_INT64 = 3,
    ATTN_SAMPLER_BOOL = 4,        /* one byte, 0 or 1 */
    ATTN_SAMPLER_FLOAT8_E4M3 = 5, /* of q and k only: OCP e4m3, finite, NaN where all other bits are set */
    ATTN_SAMPLER_UINT8 = 6,
    ATTN_SAMPLER_INT32 = 7
} attn_sampler_dtype;

typedef enum attn_sampler_device { ATTN_SAMPLER_CPU = 0, ATTN_SAMPLER_CUDA = 1 } attn_sampler_device;

/* Base of the logarithm in softmax_lse. */
typedef enum attn_sampler_lse_base {
    ATTN_SAMPLER_LSE_BASE_E = 0,
    ATTN_SAMPLER_LSE_BASE_2 = 1
} attn_sampler_lse_base;

/* Over which keys a row's softmax is normalised. */
typedef enum attn_sampler_scope {
    ATTN_SAMPLER_SCOPE_SEQUENCE = 0, /* all visible keys */
    ATTN_SAMPLER_SCOPE_BLOCK = 1     /* the visible keys of the columns; only rows of the block count */
} attn_sampler_scope;

/* Which query rows count in a decoding step. */
typedef enum attn_sampler_query_rows {
    ATTN_SAMPLER_QUERY_ROWS_ALL = 0,
    ATTN_SAMPLER_QUERY_ROWS_MASKED = 1 /* those at a position that is still masked */
} attn_sampler_query_rows;

/* How a column's attention is reduced over its rows. */
typedef enum attn_sampler_reduction {
    ATTN_SAMPLER_REDUCTION_SUM = 0,
    ATTN_SAMPLER_REDUCTION_MEAN = 1, /* over the rows that may see the column */
    ATTN_SAMPLER_REDUCTION_MAX = 2
} attn_sampler_reduction;

/* How a row of an attention map is reduced over its columns. */
typedef enum attn_sampler_map_reduction {
    ATTN_SAMPLER_MAP_REDUCTION_NONE = 0,
    ATTN_SAMPLER_MAP_REDUCTION_SUM = 1,
    ATTN_SAMPLER_MAP_REDUCTION_DIAGONAL = 2 /* the entry at the row's own position, 0 where there is none */
} attn_sampler_map_reduction;

/* What shares a choice of columns: G of it. */
typedef enum attn_sampler_per {
    ATTN_SAMPLER_PER_KV_HEAD = 0, /* the query heads of a key head, G = Hkv */
    ATTN_SAMPLER_PER_HEAD = 1,    /* each query head alone, G = Hq */
    ATTN_SAMPLER_PER_ALL = 2      /* G = 1 */
} attn_sampler_per;

/* How scores are pooled over neighbouring columns. */
typedef enum attn_sampler_pool { ATTN_SAMPLER_POOL_MAX = 0, ATTN_SAMPLER_POOL_MEAN = 1 } attn_sampler_pool;

typedef enum attn_sampler_metric {
    ATTN_SAMPLER_METRIC_PROBABILITY = 0,
    ATTN_SAMPLER_METRIC_MARGIN = 1,
    ATTN_SAMPLER_METRIC_ENTROPY = 2
} attn_sampler_metric;

typedef enum attn_sampler_rule {
    ATTN_SAMPLER_RULE_SEQUENTIAL = 0,
    ATTN_SAMPLER_RULE_PARALLEL = 1,
    ATTN_SAMPLER_RULE_THRESHOLD = 2
} attn_sampler_rule;

typedef enum attn_sampler_fallback {
    ATTN_SAMPLER_FALLBACK_CONFIDENCE = 0,
    ATTN_SAMPLER_FALLBACK_SCORE = 1
} attn_sampler_fallback;

/* In which order committed tokens that fail are revised, where not all may be. */
typedef enum attn_sampler_revision_order {
    ATTN_SAMPLER_REVISION_ORDER_PRODUCT = 0, /* of doubt and score */
    ATTN_SAMPLER_REVISION_ORDER_DOUBT = 1,   /* 1 - the probability of the token that stands there */
    ATTN_SAMPLER_REVISION_ORDER_SCORE = 2
} attn_sampler_revision_order;

/* What becomes of a committed token. */
typedef enum attn_sampler_verdict {
    ATTN_SAMPLER_KEPT = 0,
    ATTN_SAMPLER_REPLACED = 1,
    ATTN_SAMPLER_REMASKED = 2
} attn_sampler_verdict;

/* A strided view of at most ATTN_SAMPLER_MAX_ELEMENTS elements that reach over at most 2^53. Entries of shape
 * and stride beyond ndim are not read, nor is the stride of a dimension of size 1. Elements that are written
 * must be apart in memory, from each other and from all that the call reads. */
typedef struct attn_sampler_tensor {
    void *data;
    int64_t shape[4];
    int64_t stride[4]; /* in elements */
    int32_t ndim;
    int32_t dtype; /* attn_sampler_dtype */
} attn_sampler_tensor;

/* Where and how to run.
 *
 * On CUDA a call only launches kernels, on `stream` of the device, which is current during the call (and
 * stays so where the process has no context on the thread's former one); it allocates nothing, waits for
 * nothing and may be captured in a graph. What the kernels pass on to one another lies in the workspace:
 * device memory of the caller's, aligned to 256 bytes. A call to which it is too small launches nothing, says
 * in workspace_needed how large it has to be, and answers ATTN_SAMPLER_WORKSPACE_TOO_SMALL. Its first
 * ATTN_SAMPLER_WORKSPACE_ZEROS bytes must be zero before its first use; each call leaves it ready for the
 * next, of any function and shape. Calls that may run at the same time need one each. The CUDA kernels take
 * head dimensions up to ATTN_SAMPLER_MAX_HEADDIM.
 */
typedef struct attn_sampler_exec {
    int32_t device;           /* attn_sampler_device */
    int32_t num_threads;      /* CPU threads, at least 1; not read on CUDA, and what follows not on the CPU */
    int32_t device_index;     /* CUDA ordinal */
    void *stream;             /* cudaStream_t */
    void *workspace;          /* may be NULL where its size is 0 */
    int64_t workspace_size;   /* in bytes */
    int64_t workspace_needed; /* an answer, written only where the workspace is too small */
} attn_sampler_exec;

/* Positions [start, stop). */
typedef struct attn_sampler_span {
    int64_t start, stop;
} attn_sampler_span;

/* One layer's attention inputs. q [B,Hq,M,D], k [B,Hkv,N,D] (or pages: attn_sampler_masks): one dtype of
 * float32 | float16 | bfloat16 | float8_e4m3, last stride 1. softmax_lse [B,Hq,M] float32 or NULL (NULL in
 * block scope). q_descale, k_descale [B,Hkv] float32 or NULL (NULL unless q and k are float8_e4m3). */
typedef struct attn_sampler_layer {
    const attn_sampler_tensor *q, *k, *softmax_lse, *q_descale, *k_descale;
} attn_sampler_layer;

/* Which keys and query rows take part: key_mask [B,N], query_mask [B,M] bool, or NULL: all. Which columns of
 * an attention map count, after the softmax: column_mask [B,C] bool, or NULL: all. And where the keys lie:
 *
 * With block_table [B,P] int32, k of every layer is a cache [pages,Hkv,page_size,D] of any strides, page_size
 * at least 1: key n of sequence b is row n % page_size of page block_table[b, n / page_size], and N = P *
 * page_size. The keys of an entry outside [0, pages) are absent, as if key_mask hid them; nothing is read.
 *
 * With seqlens_k [B] int32, sequence b has the keys before seqlens_k[b], which is clamped into [0, N]; the
 * others are absent. params.columns, with -N <= start < stop <= 0, and params.query_start count from each
 * sequence's own end then, of whatever N: key position columns.start is seqlens_k[b] + columns.start. What
 * of the columns is before key 0 receives 0.
 */
typedef struct attn_sampler_masks {
    const attn_sampler_tensor *key_mask, *query_mask, *column_mask, *block_table, *seqlens_k;
} attn_sampler_masks;

/* The attention matrix that column_scores and attention_map read, with G = Hq / Hkv:
 *
 *   A[b,h,i,j] = exp(scale[b,h/G] * q[b,h,i] . k[b,h/G,j] - lse[b,h,i])   where row i may see key j
 *              = 0                                                       elsewhere
 *
 * scale[b,g] is softmax_scale * q_descale[b,g] * k_descale[b,g], a missing descale being 1: what float8 q and
 * k hold are the real values divided by it.
 *
 * Row i stands at key position query_start + i. It may see key j if key_mask[b,j] (or no key_mask),
 * query_mask[b,i] (or no query_mask), j is in the row's window, -window_left <= j - (query_start + i) <=
 * window_right with no limit at a side of -1, and, where causal, j <= query_start + i. In block scope a row
 * counts only if its position lies in the columns, and it sees the keys of the columns alone.
 * Without a given softmax_lse, lse is computed over the visible keys. The dot product is a float32; scaled it
 * may be of any size then: the weights are those of the differences, also of logits beyond float32. A row
 * that sees nothing, or whose lse is -inf, contributes exactly 0, whatever its q, k and lse hold; masked
 * entries are never NaN. Without `diagonal`, the entry whose key position is the row's own is left out after
 * the softmax.
 */
typedef struct attn_sampler_attention_params {
    attn_sampler_span columns; /* key positions, 0 <= start < stop <= N; see attn_sampler_masks too */
    attn_sampler_span rows;    /* query rows, 0 <= start < stop <= M; attention_map only */
    int64_t query_start;       /* key position of query row 0; of magnitude below ATTN_SAMPLER_MAX_POSITION */
    double softmax_scale;      /* of magnitude up to ATTN_SAMPLER_MAX_SCALE */
    int32_t lse_base;          /* attn_sampler_lse_base */
    int32_t causal;            /* 0 or 1 */
    int32_t softmax_scope;     /* attn_sampler_scope */
    int32_t diagonal;          /* 1 keeps A[i, own position], 0 drops it */
    int32_t reduction;         /* attn_sampler_reduction; of attention_map, attn_sampler_map_reduction */
    int32_t per_head;          /* 1 keeps the heads apart, 0 adds them up */
    int32_t accumulate;        /* 1 adds to out, 0 overwrites it */
    int64_t window_left;       /* keys before a row's own that it may see, or -1: all of them */
    int64_t window_right;      /* and after it; both below ATTN_SAMPLER_MAX_POSITION */
} attn_sampler_attention_params;

/* out[b,(h),c] (+)= reduce over rows i of A[b,h,i,columns.start + c], added up over heads unless per_head.
 * The mean divides by the number of rows that may see the column (its dropped diagonal entry not
 * counted), and is 0 where there is none; so is the maximum. A NaN entry makes the result NaN.
 *
 * masks may be NULL. out [B,C] or, per head, [B,Hq,C], float32. B and M may be 0.
 */
ATTN_SAMPLER_API attn_sampler_status attn_sampler_column_scores(const attn_sampler_layer *layer,
                                                                const attn_sampler_masks *masks,
                                                                const attn_sampler_attention_params *params,
                                                                const attn_sampler_tensor *out,
                                                                attn_sampler_exec *exec);

/* Which columns are chosen of those that receive most. A column is present if it has a key that is not absent
 * and that key_mask does not hide. */
typedef struct attn_sampler_top_columns_params {
    attn_sampler_attention_params attention; /* per_head, accumulate and rows are not read */
    int64_t count;                           /* 1 to the number of columns */
    int32_t per;                             /* attn_sampler_per */
    int64_t sinks, recent; /* first and last present columns that are chosen anyway, at most count together */
    int32_t pool;          /* attn_sampler_pool */
    int64_t pool_width;    /* odd, at most ATTN_SAMPLER_MAX_POOL_WIDTH; 1 pools nothing */
} attn_sampler_top_columns_params;

/* The columns of the largest scores, those of column_scores added up over the heads that share a choice, and
 * then pooled over the pool_width columns around each: in a window, what is beyond the columns, absent, or
 * one of the sinks or the recent has no part in the maximum and counts as 0 in the mean, which divides by the
 * width. First come the sinks and the recent, by position and with scores that are not pooled; then the
 * others, the largest score first, NaN after all numbers, the lowest position first among equals. Where fewer
 * are present than count, the rest is position -1 with score -inf. Positions count from key 0 of each
 * sequence, with seqlens_k too.
 *
 * masks may be NULL. positions [B,G,count] int64, scores [B,G,count] float32. B and M may be 0. */
ATTN_SAMPLER_API attn_sampler_status attn_sampler_top_columns(const attn_sampler_layer *layer,
                                                              const attn_sampler_masks *masks,
                                                              const attn_sampler_top_columns_params *params,
                                                              const attn_sampler_tensor *positions,
                                                              const attn_sampler_tensor *scores,
                                                              attn_sampler_exec *exec);

/* out[b,(h),r,c] (+)= A[b,h,rows.start + r,columns.start + c], added up over heads unless per_head, and 0 in
 * the columns that do not count. out [B,R,C] or, per head, [B,Hq,R,C], float32. Reduced, out[b,(h),r] is the
 * sum of a row or its entry at its own position, and out [B,R] or [B,Hq,R]. The rest as column_scores, which
 * does not read column_mask.
 */
ATTN_SAMPLER_API attn_sampler_status attn_sampler_attention_map(const attn_sampler_layer *layer,
                                                                const attn_sampler_masks *masks,
                                                                const attn_sampler_attention_params *params,
                                                                const attn_sampler_tensor *out,
                                                                attn_sampler_exec *exec);

/* One token and its confidence for each position.
 *
 * Greedy (temperature 0): token = arg max of the logits; sampled: arg max of
 * fl(fl(x * inv_temperature) + gumbel(seed_b, c, v)) in float32, inv_temperature = fl(1 / fl(temperature)),
 * The lowest token wins ties; NaN counts as -inf. gumbel() is fixed to the last bit: see
 * csrc/include/attn_sampler_random.h. Its stream depends on the row's seed, the position c
 * and the token v, not on the batch. Where logits are a part of a vocabulary, vocab_start is the place of
 * the first in the whole: token v draws the noise of token vocab_start + v then. Nothing else depends on it;
 * token ids are counted in logits.
 *
 * Only some tokens are drawn from: those of which d = fl(y - max y), y = fl(x * inv_temperature), says that
 * fewer than top_k tokens have a larger d; that, of the mass of these, less than top_p has a larger d; and
 * that d >= log(min_p). Tokens of the largest y always are. The mass is the sum of floor(2^30 exp(d)), with
 * an exponential that is fixed to the last bit: attn_sampler_random.h.
 *
 * token_bitmask [B,W] or [B,C,W] int32, W >= ceil(V / 32): tokens whose bit, t % 32 of word t / 32, is 0 are
 * absent, like the excluded one. Where none is left, the lowest that is not excluded is taken.
 *
 * Confidence is of softmax(logits) at temperature 1: the token's probability; its margin over the
 * most probable other token; or the negated entropy in nats. It is NaN where the softmax is undefined (a
 * NaN or +inf logit, or all -inf).
 */
typedef struct attn_sampler_sampling_params {
    int32_t metric;                   /* attn_sampler_metric */
    double temperature;               /* 0 is greedy; else finite and at least ATTN_SAMPLER_MIN_TEMPERATURE */
    uint64_t seed;                    /* of every row, unless seeds are given */
    const attn_sampler_tensor *seeds; /* [B] int64 or NULL: one stream per row */
    int64_t exclude_token_id;         /* a token treated as absent; negative for none */
    int64_t vocab_start;              /* at least 0, and vocab_start + V at most ATTN_SAMPLER_MAX_VOCAB */
    int64_t top_k;                    /* at least 0, which is all */
    double top_p;                     /* in [0, 1], of which 0, too, is all; else V is at most 2^32 */
    double min_p;                     /* in [0, 1] */
    /* [B] each, in the place of the number above, or NULL: temperatures, top_ps, min_ps float32, top_ks
     * int32. What is no temperature, below the least or NaN, is greedy; a value that is no top_k, top_p or
     * min_p, 0 or less or NaN or a top_p from 1 on, is all. */
    const attn_sampler_tensor *temperatures, *top_ks, *top_ps, *min_ps;
    const attn_sampler_tensor *token_bitmask; /* or NULL */
} attn_sampler_sampling_params;

/* logits [B,C,V] float32 | float16 | bfloat16, last stride 1. token_ids [B,C] int64, confidence [B,C]
 * float32. log_prob [B,C] float32, or NULL: the natural logarithm of the token's probability. current_ids
 * [B,C] int64 and current [B,C] float32, both or neither NULL: other tokens and their probabilities, 0 for
 * the excluded token and NaN for what is none of the vocabulary.
 */
ATTN_SAMPLER_API attn_sampler_status attn_sampler_token_confidence(
    const attn_sampler_tensor *logits, const attn_sampler_tensor *current_ids,
    const attn_sampler_sampling_params *params, const attn_sampler_tensor *token_ids,
    const attn_sampler_tensor *confidence, const attn_sampler_tensor *log_prob,
    const attn_sampler_tensor *current, attn_sampler_exec *exec);

/* Which masked positions to commit.
 *
 * parallel:   high = masked with confidence >= tau, low = the other masked ones (NaN is low);
 *             theta = max of scores over low, NaN as -inf; commit the positions of high with score > theta.
 *             Where none passes, commit one: the largest confidence or score (`fallback`).
 * sequential: commit the one masked position of the largest score.
 * threshold:  commit high; where it is empty, one as above.
 *
 * The lowest position wins ties. A NaN confidence counts as -inf in the fallback. A position whose score is
 * NaN is never committed, but by threshold with a fallback by confidence, which reads no scores. A row with
 * no masked position commits nothing.
 *
 * And which committed tokens to take back. A position that is not masked and has budget left is replaced
 * where another token is predicted with confidence >= replace_tau, and else re-masked where current <
 * remask_tau. Of these the first max_revisions of a sequence are revised, in descending order of doubt, 1 -
 * current; of the score; or of the product of both (each rounded to float32), a NaN counting as -inf, and the
 * lowest position winning ties. Each takes one from the budget of its position.
 */
typedef struct attn_sampler_selection_params {
    int32_t rule;           /* attn_sampler_rule */
    int32_t fallback;       /* attn_sampler_fallback */
    double tau;             /* in [0, 1]; compared in float32, as what follows */
    double replace_tau;     /* at least 0; nothing is replaced above 1. Not read, as what follows, without a
                               revision */
    double remask_tau;      /* in [0, 1]; nothing is re-masked at 0 */
    int64_t max_revisions;  /* at least 0 */
    int32_t revision_order; /* attn_sampler_revision_order */
    /* [B] each, in the place of the number above, or NULL: attn_sampler_rule int32, of which what is none is
     * parallel; float32. */
    const attn_sampler_tensor *rules, *taus;
} attn_sampler_selection_params;

/* What a revision reads and answers. */
typedef struct attn_sampler_revision {
    const attn_sampler_tensor *budget;   /* [B,C] int32, in place */
    const attn_sampler_tensor *revised;  /* [B,C] uint8, an output: attn_sampler_verdict */
    const attn_sampler_tensor *current;  /* [B,C] float32: the probability of the token that stands there; an
                                            output of decode_step */
    const attn_sampler_tensor *differs;  /* [B,C] bool: whether another is predicted; select_tokens only */
    const attn_sampler_tensor *log_prob; /* [B,C] float32 or NULL, an output; decode_step only */
} attn_sampler_revision;

/* scores, confidence [B,C] float32; masked, selected [B,C] bool. revision may be NULL. */
ATTN_SAMPLER_API attn_sampler_status attn_sampler_select_tokens(
    const attn_sampler_tensor *scores, const attn_sampler_tensor *confidence,
    const attn_sampler_tensor *masked, const attn_sampler_selection_params *params,
    const attn_sampler_tensor *selected, const attn_sampler_revision *revision, attn_sampler_exec *exec);

/* A whole step: column scores of all layers, token confidence, selection, revision, commit.
 *
 * masked = (tokens[:, block] == mask_token_id). With layers, scores is overwritten by their sum (the
 * attention's columns are the block's key positions); with none, it is read, and attention only has to be
 * valid. The mask token itself is never predicted. Positions of tokens that are selected or replaced receive
 * their token, and those that are re-masked the mask token.
 * attention.accumulate, per_head and rows are not read. With ATTN_SAMPLER_QUERY_ROWS_MASKED a query row
 * counts only if it stands at a masked token: row i at tokens[:, query_start + i - columns.start +
 * block.start].
 */
typedef struct attn_sampler_decode_step_params {
    attn_sampler_span block; /* positions in tokens, C of them */
    int64_t mask_token_id;   /* in [0, V) */
    int32_t query_rows;      /* attn_sampler_query_rows */
    attn_sampler_attention_params attention;
    attn_sampler_sampling_params sampling; /* but for exclude_token_id and vocab_start */
    attn_sampler_selection_params selection;
} attn_sampler_decode_step_params;

/* tokens [B,T] int64, in place. logits [B,C,V]. scores, confidence [B,C] float32, token_ids [B,C] int64,
 * selected [B,C] bool: outputs (scores an input where num_layers is 0). masks and revision may be NULL. */
ATTN_SAMPLER_API attn_sampler_status attn_sampler_decode_step(
    const attn_sampler_tensor *tokens, const attn_sampler_tensor *logits, const attn_sampler_layer *layers,
    int64_t num_layers, const attn_sampler_masks *masks, const attn_sampler_decode_step_params *params,
    const attn_sampler_tensor *scores, const attn_sampler_tensor *token_ids,
    const attn_sampler_tensor *confidence, const attn_sampler_tensor *selected,
    const attn_sampler_revision *revision, attn_sampler_exec *exec);

/* The message of the last failure on this thread; "" if there was none. Valid until the next call. */
ATTN_SAMPLER_API const char *attn_sampler_last_error(void);

/* The library's version, e.g. "0.1.0". */
ATTN_SAMPLER_API const char *attn_sampler_version(void);

/* The instruction set that the CPU kernels run with here: "amx", "avx512_bf16", "avx512", "avx2" or
 * "portable". The environment variable ATTN_SAMPLER_CPU_ISA, read once, asks for one by its name. */
ATTN_SAMPLER_API const char *attn_sampler_cpu_isa(void);

/* NULL, or why the processor's AMX unit does not serve, and other kernels give their own bits: Linux keeps it
 * from a program of which a thread has a small signal stack (sigaltstack) when the CPU kernels are first
 * asked for. Where it serves, bfloat16 numbers below 2^-126 in magnitude count as 0, as the unit has it;
 * elsewhere they are what they are. */
ATTN_SAMPLER_API const char *attn_sampler_cpu_amx_refusal(void);

/* NULL, or why the CPU kernels cannot run: ATTN_SAMPLER_CPU_ISA asks for what is not there. */
ATTN_SAMPLER_API const char *attn_sampler_cpu_unavailable(void);

/* NULL if this build has CUDA kernels and a usable device; else the reason why not. */
ATTN_SAMPLER_API const char *attn_sampler_cuda_unavailable(void);

/* NULL if they run on the device of this CUDA ordinal; else the reason why not, such as an architecture that
 * they are not compiled for. A call that asks for such a device answers ATTN_SAMPLER_UNSUPPORTED. */
ATTN_SAMPLER_API const char *attn_sampler_cuda_device_unavailable(int32_t device_index);

#ifdef __cplusplus
}
#endif

#endif /* ATTN_SAMPLER_H_ */
