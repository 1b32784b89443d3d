/* What is asked of one tensor: its dimensions, dtype and memory. What is wrong throws Error, by its name. */
#ifndef ATTN_SAMPLER_TENSOR_CHECKS_H_
#define ATTN_SAMPLER_TENSOR_CHECKS_H_

#include <cinttypes>
#include <initializer_list>

#include "error.h"
#include "memory.h"

namespace attn_sampler {

using Tensor = attn_sampler_tensor;

constexpr attn_sampler_status kInvalid = ATTN_SAMPLER_INVALID_ARGUMENT;
constexpr int64_t kNone = -1; /* the size of a dimension that a tensor does not have */

inline const char *dtype_name(int dtype) {
    static const char *const names[] = {"float32", "float16",     "bfloat16", "int64",
                                        "bool",    "float8_e4m3", "uint8",    "int32"};
    return dtype >= 0 && dtype < 8 ? names[dtype] : "an unknown dtype";
}

inline void check_tensor(const char *name, const Tensor *t, int ndim) {
    if (t == nullptr)
        throw Error(kInvalid, "%s: expected a tensor, got NULL", name);
    if (t->ndim != ndim)
        throw Error(kInvalid, "%s: expected %d dimensions, got %d", name, ndim, t->ndim);
    bool empty = false;
    for (int i = 0; i < ndim; ++i) {
        if (t->shape[i] < 0)
            throw Error(kInvalid, "%s: expected sizes >= 0, got %" PRId64 " in dimension %d", name,
                        t->shape[i], i);
        empty = empty || t->shape[i] == 0;
    }
    check_reach(name, *t);
    if (t->data == nullptr && !empty)
        throw Error(kInvalid, "%s: expected an address, got NULL", name);
}

inline void check_dtype(const char *name, const Tensor *t, int dtype) {
    if (t->dtype != dtype)
        throw Error(kInvalid, "%s: expected dtype %s, got %s", name, dtype_name(dtype), dtype_name(t->dtype));
}

inline void check_float(const char *name, const Tensor *t, bool may_be_float8 = false) {
    if (t->dtype != ATTN_SAMPLER_FLOAT32 && t->dtype != ATTN_SAMPLER_FLOAT16 &&
        t->dtype != ATTN_SAMPLER_BFLOAT16 && !(may_be_float8 && t->dtype == ATTN_SAMPLER_FLOAT8_E4M3))
        throw Error(kInvalid, "%s: expected dtype float32, float16%s, got %s", name,
                    may_be_float8 ? ", bfloat16 or float8_e4m3" : " or bfloat16", dtype_name(t->dtype));
    const int last = t->ndim - 1;
    if (t->shape[last] > 1 && t->stride[last] != 1)
        throw Error(kInvalid, "%s: expected a contiguous last dimension, got stride %" PRId64, name,
                    t->stride[last]);
}

inline void check_size(const char *name, const Tensor *t, int dimension, int64_t expected) {
    if (t->shape[dimension] != expected)
        throw Error(kInvalid, "%s: expected size %" PRId64 " in dimension %d, got %" PRId64, name, expected,
                    dimension, t->shape[dimension]);
}

/* A tensor of this dtype and shape, without the dimensions of size kNone. */
inline void check_like(const char *name, const Tensor *t, int dtype, std::initializer_list<int64_t> shape) {
    int dimension = 0;
    for (const int64_t size : shape)
        dimension += size != kNone;
    check_tensor(name, t, dimension);
    check_dtype(name, t, dtype);
    dimension = 0;
    for (const int64_t size : shape)
        if (size != kNone)
            check_size(name, t, dimension++, size);
}

inline void check_optional(const char *name, const Tensor *t, int dtype,
                           std::initializer_list<int64_t> shape) {
    if (t != nullptr)
        check_like(name, t, dtype, shape);
}

/* A tensor to be written: its elements are apart in memory. */
inline void check_apart(const char *name, const Tensor *t) {
    for (int i = 0; i < t->ndim; ++i)
        if (t->shape[i] == 0)
            return;
    for (int i = 0; i < t->ndim; ++i) {
        if (t->shape[i] < 2)
            continue;
        /* A stride steps over all that the dimensions of smaller strides reach; of equal ones, none can. */
        int64_t reach = 0;
        for (int j = 0; j < t->ndim; ++j)
            if (t->shape[j] > 1 && j != i && t->stride[j] <= t->stride[i])
                reach += (t->shape[j] - 1) * t->stride[j];
        if (t->stride[i] <= reach)
            throw Error(kInvalid,
                        "%s: expected elements that are apart in memory, got stride %" PRId64
                        " in dimension %d",
                        name, t->stride[i], i);
    }
}

inline void check_output(const char *name, const Tensor *t, int dtype, std::initializer_list<int64_t> shape) {
    check_like(name, t, dtype, shape);
    check_apart(name, t);
}

} // namespace attn_sampler

#endif /* ATTN_SAMPLER_TENSOR_CHECKS_H_ */
