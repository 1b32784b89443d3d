/* Python module attn_sampler._C: the C API for attn_sampler/_core.py, its only caller.
 *
 * Its functions take what the public functions of attn_sampler/functional.py take, and the outputs. What they
 * do not take as it is, they refuse before anything runs: the caller then goes the long way, which serves it
 * or says what is wrong with it. The global interpreter lock is released while a kernel runs.
 */
#include <pybind11/pybind11.h>

#include <cmath>
#include <stdexcept>
#include <vector>

#include "attn_sampler.h"
#include "dlpack.h"

namespace py = pybind11;

namespace {

/* Nothing has been run. */
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/* How tensors of one exact type are read; the type is null where its library has no such way. */
struct {
    PyTypeObject *type = nullptr;
    int (*read)(void *py_object, DLTensor *out) = nullptr;
} exchange;

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

/* Views of the tensors of one call, kept alive: another thread may change the lists that hold them. Those
 * that say where they are, are on one device. */
class Views {
  public:
    /* Room for so many, whose addresses stay. */
    explicit Views(size_t count) {
        views_.reserve(count);
        sources_.reserve(count);
    }

    /* Null for None. */
    const attn_sampler_tensor *optional(py::handle source) {
        return source.is_none() ? nullptr : (*this)(source);
    }

    /* Of a tensor of the type that is read, or what stands in its place. */
    const attn_sampler_tensor *operator()(py::handle source) {
        sources_.push_back(py::reinterpret_borrow<py::object>(source));
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
        bool has_unit_stride = false;
        for (int i = 0; i < tensor.ndim; ++i) {
            view->shape[i] = tensor.shape[i];
            view->stride[i] = tensor.strides[i];
            has_unit_stride |= tensor.strides[i] == 1 && tensor.shape[i] > 1;
        }
        /* An imaginary part may stand for the negated contents of its memory. All its strides are even. */
        if (!has_unit_stride && source.attr("is_neg")().cast<bool>())
            throw Refused("a tensor is the negative of its memory");
    }

    std::vector<attn_sampler_tensor> views_;
    std::vector<py::object> sources_;
    DLDevice device_{}; /* its type is 0 as long as no tensor has said it */
};

/* The items of a list or tuple, one at least; of a list, those that it holds now. */
py::tuple items(py::handle source) {
    if (!PyList_Check(source.ptr()) && !PyTuple_Check(source.ptr()))
        throw Refused("expected a list or a tuple");
    py::tuple result = py::reinterpret_borrow<py::object>(source);
    if (result.empty())
        throw Refused("expected at least one item");
    return result;
}

bool flag(py::handle value) {
    if (value.ptr() != Py_True && value.ptr() != Py_False)
        throw Refused("expected True or False");
    return value.ptr() == Py_True;
}

int64_t integer(py::handle value) {
    int overflow = 0;
    const int64_t result =
        PyLong_CheckExact(value.ptr()) ? PyLong_AsLongLongAndOverflow(value.ptr(), &overflow) : 0;
    if (!PyLong_CheckExact(value.ptr()) || overflow != 0)
        throw Refused("expected an integer of 64 bits");
    return result;
}

double number(py::handle value) {
    return PyFloat_CheckExact(value.ptr()) ? PyFloat_AS_DOUBLE(value.ptr())
                                           : static_cast<double>(integer(value));
}

/* The place of a word in a list of words, which are in the order of an enumeration of the C API. */
int32_t choice(py::handle value, std::initializer_list<const char *> words) {
    int32_t place = 0;
    for (const char *const word : words) {
        if (PyUnicode_Check(value.ptr()) && PyUnicode_CompareWithASCIIString(value.ptr(), word) == 0)
            return place;
        ++place;
    }
    throw Refused("expected one of a few words");
}

struct Span {
    int64_t start, stop;
};

/* The bounds of a slice of step 1; all of it for None. That they lie inside is for the C API to check. */
Span span(py::handle value, int64_t length) {
    if (value.is_none())
        return {0, length};
    if (!PySlice_Check(value.ptr()))
        throw Refused("expected a slice");
    const auto *const slice = reinterpret_cast<PySliceObject *>(value.ptr());
    if (slice->step != Py_None && integer(slice->step) != 1)
        throw Refused("expected a slice of step 1");
    Span result = {slice->start == Py_None ? 0 : integer(slice->start),
                   slice->stop == Py_None ? length : integer(slice->stop)};
    result.start += result.start < 0 ? length : 0;
    result.stop += result.stop < 0 ? length : 0;
    return result;
}

/* What the attention functions have in common. */
attn_sampler_attention_params attention_params(const attn_sampler_tensor *q, const attn_sampler_tensor *k,
                                               py::handle columns, py::handle lse_base,
                                               py::handle softmax_scale, py::handle causal,
                                               py::handle query_start, py::handle softmax_scope,
                                               py::handle diagonal) {
    attn_sampler_attention_params params{};
    const Span key_positions = span(columns, k->shape[2]);
    params.column_start = key_positions.start;
    params.column_stop = key_positions.stop;
    params.lse_base = choice(lse_base, {"e", "2"});
    params.softmax_scale =
        softmax_scale.is_none() ? std::pow(static_cast<double>(q->shape[3]), -0.5) : number(softmax_scale);
    params.causal = flag(causal);
    params.query_start = query_start.is_none() ? k->shape[2] - q->shape[2] : integer(query_start);
    params.softmax_scope = choice(softmax_scope, {"sequence", "block"});
    params.diagonal = flag(diagonal);
    return params;
}

int32_t reduction_of(py::handle value) { return choice(value, {"sum", "mean", "max"}); }

/* `seed` is an integer, or a tensor with a stream for each row, or None where nothing is sampled. */
attn_sampler_confidence_params confidence_params(py::handle metric, py::handle temperature, py::handle seed,
                                                 Views &view, const attn_sampler_tensor **seeds) {
    attn_sampler_confidence_params params{};
    params.metric = choice(metric, {"probability", "margin", "entropy"});
    params.temperature = number(temperature);
    params.exclude_token_id = -1;
    if (PyLong_CheckExact(seed.ptr())) {
        /* The stream is keyed by 64 bits, given signed or unsigned. */
        params.seed = PyLong_AsUnsignedLongLong(seed.ptr());
        if (PyErr_Occurred() != nullptr) {
            PyErr_Clear();
            params.seed = static_cast<uint64_t>(integer(seed));
        }
    } else {
        *seeds = view.optional(seed);
        if (*seeds == nullptr && params.temperature > 0.0)
            throw Refused("expected a seed");
    }
    return params;
}

attn_sampler_select_params select_params(py::handle policy, py::handle tau, py::handle fallback) {
    return {choice(policy, {"sequential", "parallel"}), choice(fallback, {"confidence", "score"}),
            number(tau)};
}

/* Where to run: device, CPU threads, CUDA ordinal, stream, workspace address and size. */
attn_sampler_exec exec_of(const py::tuple &where) {
    return {where[0].cast<int32_t>(),
            where[1].cast<int32_t>(),
            where[2].cast<int32_t>(),
            reinterpret_cast<void *>(where[3].cast<uintptr_t>()),
            reinterpret_cast<void *>(where[4].cast<uintptr_t>()),
            where[5].cast<int64_t>()};
}

/* Runs an API call without the lock and turns its status into an exception; 0, or the bytes of workspace
 * without which nothing was run. */
template <typename Call, typename Workspace>
int64_t run(Call call, Workspace workspace) {
    attn_sampler_status status;
    int64_t bytes = 0;
    {
        const py::gil_scoped_release unlocked;
        status = call();
        if (status == ATTN_SAMPLER_WORKSPACE_TOO_SMALL)
            status = workspace(&bytes);
    }
    if (status == ATTN_SAMPLER_OK)
        return bytes;
    const char *const message = attn_sampler_last_error();
    if (status == ATTN_SAMPLER_INVALID_ARGUMENT || status == ATTN_SAMPLER_UNSUPPORTED)
        throw Refused(message);
    if (status == ATTN_SAMPLER_OUT_OF_MEMORY) {
        PyErr_SetString(PyExc_MemoryError, message);
        throw py::error_already_set();
    }
    throw std::runtime_error(message);
}

int64_t column_scores(py::handle out, py::handle q, py::handle k, py::handle softmax_lse,
                      py::handle q_descale, py::handle k_descale, py::handle key_mask, py::handle query_mask,
                      py::handle columns, py::handle lse_base, py::handle softmax_scale, py::handle causal,
                      py::handle query_start, py::handle softmax_scope, py::handle diagonal,
                      py::handle reduction, py::handle per_head, py::handle accumulate,
                      const py::tuple &where) {
    Views view(8);
    const auto *const out_ = view(out), *const q_ = view(q), *const k_ = view(k),
                      *const lse = view.optional(softmax_lse), *const q_descale_ = view.optional(q_descale),
                      *const k_descale_ = view.optional(k_descale),
                      *const key_mask_ = view.optional(key_mask),
                      *const query_mask_ = view.optional(query_mask);
    attn_sampler_attention_params params = attention_params(q_, k_, columns, lse_base, softmax_scale, causal,
                                                            query_start, softmax_scope, diagonal);
    params.reduction = reduction_of(reduction);
    params.per_head = flag(per_head);
    params.accumulate = flag(accumulate);
    const attn_sampler_exec exec = exec_of(where);
    return run(
        [&] {
            return attn_sampler_column_scores(q_, k_, lse, q_descale_, k_descale_, key_mask_, query_mask_,
                                              &params, out_, &exec);
        },
        [&](int64_t *bytes) {
            return attn_sampler_column_scores_workspace(q_, k_, lse, q_descale_, k_descale_, key_mask_,
                                                        query_mask_, &params, out_, &exec, bytes);
        });
}

int64_t attention_map(py::handle out, py::handle q, py::handle k, py::handle softmax_lse,
                      py::handle q_descale, py::handle k_descale, py::handle key_mask, py::handle query_mask,
                      py::handle rows, py::handle columns, py::handle lse_base, py::handle softmax_scale,
                      py::handle causal, py::handle query_start, py::handle softmax_scope,
                      py::handle diagonal, py::handle per_head, py::handle accumulate,
                      const py::tuple &where) {
    Views view(8);
    const auto *const out_ = view(out), *const q_ = view(q), *const k_ = view(k),
                      *const lse = view.optional(softmax_lse), *const q_descale_ = view.optional(q_descale),
                      *const k_descale_ = view.optional(k_descale),
                      *const key_mask_ = view.optional(key_mask),
                      *const query_mask_ = view.optional(query_mask);
    attn_sampler_attention_params params = attention_params(q_, k_, columns, lse_base, softmax_scale, causal,
                                                            query_start, softmax_scope, diagonal);
    const Span query_rows = span(rows, q_->shape[2]);
    params.row_start = query_rows.start;
    params.row_stop = query_rows.stop;
    params.per_head = flag(per_head);
    params.accumulate = flag(accumulate);
    const attn_sampler_exec exec = exec_of(where);
    return run(
        [&] {
            return attn_sampler_attention_map(q_, k_, lse, q_descale_, k_descale_, key_mask_, query_mask_,
                                              &params, out_, &exec);
        },
        [&](int64_t *bytes) {
            return attn_sampler_attention_map_workspace(q_, k_, lse, q_descale_, k_descale_, key_mask_,
                                                        query_mask_, &params, out_, &exec, bytes);
        });
}

int64_t token_confidence(py::handle token_ids, py::handle confidence, py::handle logits, py::handle metric,
                         py::handle temperature, py::handle seed, py::handle exclude_token_id,
                         py::handle vocab_start, const py::tuple &where) {
    Views view(4);
    const auto *const token_ids_ = view(token_ids), *const confidence_ = view(confidence),
                      *const logits_ = view(logits);
    const attn_sampler_tensor *seeds = nullptr;
    attn_sampler_confidence_params params = confidence_params(metric, temperature, seed, view, &seeds);
    if (!exclude_token_id.is_none()) {
        params.exclude_token_id = integer(exclude_token_id);
        if (params.exclude_token_id < 0 || params.exclude_token_id >= logits_->shape[2])
            throw Refused("expected a token of the vocabulary");
    }
    params.vocab_start = integer(vocab_start);
    const attn_sampler_exec exec = exec_of(where);
    return run(
        [&] {
            return attn_sampler_token_confidence(logits_, seeds, &params, token_ids_, confidence_, &exec);
        },
        [&](int64_t *bytes) {
            return attn_sampler_token_confidence_workspace(logits_, seeds, &params, token_ids_, confidence_,
                                                           &exec, bytes);
        });
}

int64_t select_tokens(py::handle selected, py::handle scores, py::handle confidence, py::handle masked,
                      py::handle policy, py::handle tau, py::handle fallback, const py::tuple &where) {
    Views view(4);
    const auto *const selected_ = view(selected), *const scores_ = view(scores),
                      *const confidence_ = view(confidence), *const masked_ = view(masked);
    const attn_sampler_select_params params = select_params(policy, tau, fallback);
    const attn_sampler_exec exec = exec_of(where);
    return run(
        [&] { return attn_sampler_select_tokens(scores_, confidence_, masked_, &params, selected_, &exec); },
        [&](int64_t *bytes) {
            return attn_sampler_select_tokens_workspace(scores_, confidence_, masked_, &params, selected_,
                                                        &exec, bytes);
        });
}

/* A layer from (q, k), (q, k, softmax_lse) or (q, k, softmax_lse, q_descale, k_descale). */
attn_sampler_layer layer_of(py::handle source, Views &view) {
    const py::tuple fields = items(source);
    if (fields.size() != 2 && fields.size() != 3 && fields.size() != 5)
        throw Refused("expected two, three or five tensors");
    auto field = [&](size_t i) { return py::handle(PyTuple_GET_ITEM(fields.ptr(), i)); };
    auto optional = [&](size_t i) { return i < fields.size() ? view.optional(field(i)) : nullptr; };
    return {view(field(0)), view(field(1)), optional(2), optional(3), optional(4)};
}

/* Whether two layers have one dtype, M, N and D, and each of the optional tensors both or neither. */
bool alike(const attn_sampler_layer &x, const attn_sampler_layer &y) {
    return x.q->dtype == y.q->dtype && x.q->shape[2] == y.q->shape[2] && x.k->shape[2] == y.k->shape[2] &&
           x.q->shape[3] == y.q->shape[3] && (x.softmax_lse == nullptr) == (y.softmax_lse == nullptr) &&
           (x.q_descale == nullptr) == (y.q_descale == nullptr) &&
           (x.k_descale == nullptr) == (y.k_descale == nullptr);
}

/* `layers` is a sequence of layers, or `scores` itself: they are given then. */
int64_t decode_step(py::handle tokens, py::handle scores, py::handle token_ids, py::handle confidence,
                    py::handle selected, py::handle logits, py::handle layers, py::handle key_mask,
                    py::handle query_mask, py::handle block, py::handle mask_token_id, py::handle policy,
                    py::handle tau, py::handle fallback, py::handle metric, py::handle temperature,
                    py::handle seed, py::handle rows, py::handle columns, py::handle lse_base,
                    py::handle softmax_scale, py::handle causal, py::handle query_start,
                    py::handle softmax_scope, py::handle diagonal, py::handle reduction,
                    const py::tuple &where) {
    const py::tuple given = layers.is(scores) ? py::tuple() : items(layers);
    const size_t count = given.size();
    Views view(9 + 5 * count);
    const auto *const tokens_ = view(tokens), *const scores_ = view(scores),
                      *const token_ids_ = view(token_ids), *const confidence_ = view(confidence),
                      *const selected_ = view(selected), *const logits_ = view(logits),
                      *const key_mask_ = view.optional(key_mask),
                      *const query_mask_ = view.optional(query_mask);
    const attn_sampler_tensor *seeds = nullptr;
    std::vector<attn_sampler_layer> layers_;
    layers_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        layers_.push_back(layer_of(given[i], view));
        if (!alike(layers_[i], layers_[0]))
            throw Refused("the layers differ");
    }
    attn_sampler_decode_step_params params{};
    const Span positions = span(block, tokens_->shape[1]);
    params.block_start = positions.start;
    params.block_stop = positions.stop;
    params.mask_token_id = integer(mask_token_id);
    params.masked_rows_only = choice(rows, {"all", "masked"});
    /* Where the scores are given, nothing is made of these options, valid as they have to be. */
    attn_sampler_tensor none{};
    none.shape[3] = 1;
    params.attention = attention_params(count == 0 ? &none : layers_[0].q, count == 0 ? &none : layers_[0].k,
                                        columns.is_none() ? block : columns, lse_base, softmax_scale, causal,
                                        query_start, softmax_scope, diagonal);
    params.attention.reduction = reduction_of(reduction);
    params.confidence = confidence_params(metric, temperature, seed, view, &seeds);
    params.select = select_params(policy, tau, fallback);
    const attn_sampler_exec exec = exec_of(where);
    const auto num_layers = static_cast<int64_t>(count);
    return run(
        [&] {
            return attn_sampler_decode_step(tokens_, logits_, layers_.data(), num_layers, key_mask_,
                                            query_mask_, seeds, &params, scores_, token_ids_, confidence_,
                                            selected_, &exec);
        },
        [&](int64_t *bytes) {
            return attn_sampler_decode_step_workspace(tokens_, logits_, layers_.data(), num_layers, key_mask_,
                                                      query_mask_, seeds, &params, scores_, token_ids_,
                                                      confidence_, selected_, &exec, bytes);
        });
}

} // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled core of attn_sampler; use the functions of the package instead.";
    py::register_local_exception<Refused>(m, "Refused", PyExc_ValueError);
    /* A second copy of the module, such as another build of it, has a type of its own. */
    py::class_<attn_sampler_tensor>(m, "TensorView", py::module_local()).def(py::init(&tensor_view));
    m.def("read_tensors_of", &read_tensors_of);
    m.def("column_scores", &column_scores);
    m.def("attention_map", &attention_map);
    m.def("token_confidence", &token_confidence);
    m.def("select_tokens", &select_tokens);
    m.def("decode_step", &decode_step);
    m.def("version", [] { return attn_sampler_version(); });
    m.def("cpu_isa", [] { return attn_sampler_cpu_isa(); });
    m.def("cpu_unavailable", [] { return attn_sampler_cpu_unavailable(); });
    m.def("cuda_unavailable", [] { return attn_sampler_cuda_unavailable(); });
}
