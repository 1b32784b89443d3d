/* The part of DLPack 1.x (https://dmlc.github.io/dlpack) by which tensors are read: the C exchange API that
 * an array library's tensor type carries as __dlpack_c_exchange_api__, a capsule named "dlpack_exchange_api".
 */
#ifndef ATTN_SAMPLER_DLPACK_H_
#define ATTN_SAMPLER_DLPACK_H_

#include <cstdint>

extern "C" {

enum {
    kDLInt = 0,
    kDLUInt = 1,
    kDLFloat = 2,
    kDLBfloat = 4,
    kDLBool = 6,
    kDLFloat8_e4m3fn = 10
}; /* DLDataType.code */

struct DLDevice {
    int32_t device_type;
    int32_t device_id;
};

struct DLDataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct DLTensor {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape;
    int64_t *strides; /* in elements */
    uint64_t byte_offset;
};

struct DLPackExchangeAPIHeader {
    struct {
        uint32_t major;
        uint32_t minor;
    } version;
    DLPackExchangeAPIHeader *prev_api; /* of an older major version, or null */
};

struct DLPackExchangeAPI {
    DLPackExchangeAPIHeader header;
    void (*not_used_here[3])(); /* they make and take over tensors */
    /* Describes a tensor that stays the caller's, without waiting for a stream; may be null. Answers 0, or -1
     * with a Python exception set. */
    int (*dltensor_from_py_object_no_sync)(void *py_object, DLTensor *out);
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out);
};

} /* extern "C" */

#endif /* ATTN_SAMPLER_DLPACK_H_ */
