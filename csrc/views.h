/* How csrc/bindings.cpp, alone, reads tensors of Python: as views for the C API. */
#ifndef ATTN_SAMPLER_VIEWS_H_
#define ATTN_SAMPLER_VIEWS_H_

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "attn_sampler.h"
#include "dlpack.h"

namespace {

namespace py = pybind11;

/* Nothing has been run. */
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/* How tensors of one exact type are read; the type is null where its library has no such way. */
struct {
    PyTypeObject *type = nullptr;
    int (*read)(void *py_object, DLTensor *out) = nullptr;
} exchange;

/* Where a tensor says that it is not what its memory holds: bits of a word of the implementation to which a
 * word of the Python object points. DLPack does not tell, and to ask the tensor takes as long as everything
 * else. */
struct {
    size_t object = 0, word = 0; /* 0: it has to be asked */
    uint64_t bits = 0;
} flags;

uint64_t word_at(const void *address, size_t word) {
    uint64_t value;
    memcpy(&value, static_cast<const char *>(address) + 8 * word, sizeof(value));
    return value;
}

/* Finds these places by samples: tensor, address of its implementation, the word in it. Each word of the
 * object, then of the implementation, is tried until one is right for all. False, and they have to be asked,
 * where none is, or there are no samples. */
bool find_flags(const std::vector<std::tuple<py::object, uint64_t, uint64_t>> &samples, uint64_t bits) {
    flags = {};
    if (samples.empty())
        return false;
    constexpr size_t kWords = 24; /* of an implementation, at the most */
    const auto size = static_cast<size_t>(Py_TYPE(std::get<0>(samples[0]).ptr())->tp_basicsize);
    const auto first = [&](size_t from, size_t stop, auto is_right) {
        while (from < stop &&
               !std::all_of(samples.begin(), samples.end(), [&](auto &x) { return is_right(x, from); }))
            ++from;
        return from < stop ? from : 0;
    };
    const size_t object = first(sizeof(PyObject) / 8, size / 8, [](auto &x, size_t word) {
        return word_at(std::get<0>(x).ptr(), word) == std::get<1>(x);
    });
    const size_t word = object == 0 ? 0 : first(1, kWords, [](auto &x, size_t place) {
        return word_at(reinterpret_cast<void *>(std::get<1>(x)), place) == std::get<2>(x);
    });
    if (word != 0)
        flags = {object, word, bits};
    return word != 0;
}

bool is_what_its_memory_holds(py::handle tensor) {
    if (flags.word == 0)
        return !tensor.attr("is_neg")().cast<bool>();
    const auto *const implementation = reinterpret_cast<void *>(word_at(tensor.ptr(), flags.object));
    return (word_at(implementation, flags.word) & flags.bits) == 0;
}

bool read_tensors_of(const py::type &type) {
    const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
        return false;
    const auto *const api =
        static_cast<DLPackExchangeAPI *>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api->header.version.major != 1 || api->dltensor_from_py_object_no_sync == nullptr)
        return false;
    exchange = {reinterpret_cast<PyTypeObject *>(type.ptr()), api->dltensor_from_py_object_no_sync};
    return true;
}

int32_t dtype_of(DLDataType dtype) {
    if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 32)
        return ATTN_SAMPLER_FLOAT32;
    if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 16)
        return ATTN_SAMPLER_FLOAT16;
    if (dtype.lanes == 1 && dtype.code == kDLBfloat && dtype.bits == 16)
        return ATTN_SAMPLER_BFLOAT16;
    if (dtype.lanes == 1 && dtype.code == kDLFloat8_e4m3fn && dtype.bits == 8)
        return ATTN_SAMPLER_FLOAT8_E4M3;
    if (dtype.lanes == 1 && dtype.code == kDLInt && dtype.bits == 64)
        return ATTN_SAMPLER_INT64;
    if (dtype.lanes == 1 && dtype.code == kDLInt && dtype.bits == 32)
        return ATTN_SAMPLER_INT32;
    if (dtype.lanes == 1 && dtype.code == kDLUInt && dtype.bits == 8)
        return ATTN_SAMPLER_UINT8;
    if (dtype.lanes == 1 && dtype.code == kDLBool && dtype.bits == 8)
        return ATTN_SAMPLER_BOOL;
    throw Refused("a tensor has a dtype that no kernel takes");
}

void set_dimensions(int64_t count, attn_sampler_tensor *view) {
    if (count > 4)
        throw Refused("a tensor has more than 4 dimensions");
    view->ndim = static_cast<int32_t>(count);
}

/* What a caller that has validated a tensor hands over in its place. */
attn_sampler_tensor tensor_view(uintptr_t address, int32_t dtype, const py::tuple &shape,
                                const py::tuple &stride) {
    attn_sampler_tensor view{};
    set_dimensions(static_cast<int64_t>(shape.size()), &view);
    view.data = reinterpret_cast<void *>(address);
    view.dtype = dtype;
    for (size_t i = 0; i < shape.size(); ++i) {
        view.shape[i] = shape[i].cast<int64_t>();
        view.stride[i] = stride[i].cast<int64_t>();
    }
    return view;
}

/* Views of the tensors of one call. Those that say where they are, are on one device. */
class Views {
  public:
    /* Room for so many, whose addresses stay. */
    void reserve(size_t count) { views_.reserve(count); }

    /* The items of a list or tuple. Those that a list holds now are kept alive: another thread may change it.
     */
    PyObject *items(py::handle source) {
        if (PyTuple_Check(source.ptr()))
            return source.ptr();
        if (!PyList_Check(source.ptr()))
            throw Refused("expected a list or a tuple");
        lists_.push_back(py::reinterpret_steal<py::object>(PySequence_Tuple(source.ptr())));
        if (!lists_.back())
            throw py::error_already_set();
        return lists_.back().ptr();
    }

    /* Null for None. */
    const attn_sampler_tensor *optional(py::handle source) {
        return source.is_none() ? nullptr : (*this)(source);
    }

    /* Of a tensor of the type that is read, or what stands in its place. */
    const attn_sampler_tensor *operator()(py::handle source) {
        views_.emplace_back();
        if (Py_TYPE(source.ptr()) == exchange.type) {
            read(source, &views_.back());
            return &views_.back();
        }
        py::detail::make_caster<attn_sampler_tensor> view;
        if (source.is_none() || !view.load(source, false))
            throw Refused("a tensor is not of the plain type");
        views_.back() = py::detail::cast_op<const attn_sampler_tensor &>(view);
        return &views_.back();
    }

  private:
    void read(py::handle source, attn_sampler_tensor *view) {
        DLTensor tensor;
        if (exchange.read(source.ptr(), &tensor) != 0) {
            PyErr_Clear();
            throw Refused("a tensor has no plain memory");
        }
        if (device_.device_type == 0)
            device_ = tensor.device;
        if (tensor.device.device_type != device_.device_type || tensor.device.device_id != device_.device_id)
            throw Refused("the tensors are on different devices");
        set_dimensions(tensor.ndim, view);
        view->data = static_cast<char *>(tensor.data) + tensor.byte_offset;
        view->dtype = dtype_of(tensor.dtype);
        for (int i = 0; i < tensor.ndim; ++i) {
            view->shape[i] = tensor.shape[i];
            view->stride[i] = tensor.strides[i];
        }
        if (!is_what_its_memory_holds(source))
            throw Refused("a tensor is the negative of its memory, or zeros without any");
    }

    std::vector<attn_sampler_tensor> views_;
    std::vector<py::object> lists_;
    DLDevice device_{}; /* its type is 0 as long as no tensor has said it */
};

} // namespace

#endif /* ATTN_SAMPLER_VIEWS_H_ */
