/* Python module attn_sampler._C: the C API for attn_sampler/backends/extension.py, its only caller.
 *
 * Its functions take the outputs and the records of attn_sampler/options.py, resolved or as a user gave them:
 * tuples of their fields, in the order of the C API's structs. What they do not take as it is, they refuse
 * before anything runs: the caller then goes the long way, which serves it or says what is wrong with it. The
 * global interpreter lock is released while a kernel runs.
 */
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attn_sampler.h"
#include "views.h"

namespace py = pybind11;

namespace {

/* The fields of a record, which lives as long as what holds it: a tuple of so many. */
class Record {
  public:
    Record(py::handle source, Py_ssize_t size) : tuple_(source.ptr()) {
        if (!PyTuple_Check(tuple_) || PyTuple_GET_SIZE(tuple_) != size)
            throw Refused("expected a record of " + std::to_string(size) + " fields");
    }
    py::handle operator[](Py_ssize_t i) const { return PyTuple_GET_ITEM(tuple_, i); }

  private:
    PyObject *tuple_;
};

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

/* Of memory, or a stream. */
void *address(py::handle value) {
    const size_t result = PyLong_CheckExact(value.ptr()) ? PyLong_AsSize_t(value.ptr()) : 0;
    if (!PyLong_CheckExact(value.ptr()) || PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        throw Refused("expected an address");
    }
    return reinterpret_cast<void *>(result);
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

/* The bounds of a slice of step 1, or of a Span, which is resolved; all of it for None. Each sequence may
 * have an end of its own, from which they count then. That they lie inside is for the C API to check. A bare
 * tuple is no span: no user may give one. */
attn_sampler_span span(py::handle value, int64_t length, bool from_end = false) {
    const attn_sampler_span all = from_end ? attn_sampler_span{-length, 0} : attn_sampler_span{0, length};
    if (value.is_none())
        return all;
    if (PyTuple_Check(value.ptr()) && !PyTuple_CheckExact(value.ptr())) {
        const Record bounds(value, 2);
        return {integer(bounds[0]), integer(bounds[1])};
    }
    if (!PySlice_Check(value.ptr()))
        throw Refused("expected a slice");
    const auto *const slice = reinterpret_cast<PySliceObject *>(value.ptr());
    if (slice->step != Py_None && integer(slice->step) != 1)
        throw Refused("expected a slice of step 1");
    attn_sampler_span result = {slice->start == Py_None ? all.start : integer(slice->start),
                                slice->stop == Py_None ? all.stop : integer(slice->stop)};
    if (from_end)
        return result;
    result.start += result.start < 0 ? length : 0;
    result.stop += result.stop < 0 ? length : 0;
    return result;
}

/* From (q, k), (q, k, softmax_lse) or (q, k, softmax_lse, q_descale, k_descale). */
attn_sampler_layer layer_of(py::handle source, Views &view) {
    PyObject *const fields = view.items(source);
    const Py_ssize_t count = PyTuple_GET_SIZE(fields);
    if (count != 2 && count != 3 && count != 5)
        throw Refused("expected two, three or five tensors");
    auto optional = [&](Py_ssize_t i) {
        return i < count ? view.optional(PyTuple_GET_ITEM(fields, i)) : nullptr;
    };
    return {view(PyTuple_GET_ITEM(fields, 0)), view(PyTuple_GET_ITEM(fields, 1)), optional(2), optional(3),
            optional(4)};
}

/* Whether two layers have one dtype, M, N and D, and each of the optional tensors both or neither. */
bool alike(const attn_sampler_layer &x, const attn_sampler_layer &y) {
    return x.q->dtype == y.q->dtype && x.q->shape[2] == y.q->shape[2] && x.k->shape[2] == y.k->shape[2] &&
           x.q->shape[3] == y.q->shape[3] && (x.softmax_lse == nullptr) == (y.softmax_lse == nullptr) &&
           (x.q_descale == nullptr) == (y.q_descale == nullptr) &&
           (x.k_descale == nullptr) == (y.k_descale == nullptr);
}

attn_sampler_masks masks_of(py::handle source, Views &view) {
    if (source.is_none())
        return {};
    const Record fields(source, 5);
    return {view.optional(fields[0]), view.optional(fields[1]), view.optional(fields[2]),
            view.optional(fields[3]), view.optional(fields[4])};
}

/* N. */
int64_t key_count(const attn_sampler_tensor &k, const attn_sampler_masks &masks) {
    if (masks.block_table == nullptr)
        return k.shape[2];
    const int64_t page_size = k.shape[2], table_size = masks.block_table->shape[1];
    if (page_size > ATTN_SAMPLER_MAX_KEYS || table_size > ATTN_SAMPLER_MAX_KEYS)
        throw Refused("expected fewer than 2^30 keys");
    return page_size * table_size;
}

/* The columns are `otherwise` where they are None. */
attn_sampler_attention_params attention_params(py::handle source, const attn_sampler_tensor &q,
                                               const attn_sampler_tensor &k, const attn_sampler_masks &masks,
                                               std::initializer_list<const char *> reductions,
                                               py::handle otherwise = py::none()) {
    const Record fields(source, 12), window(fields[11], 2);
    const int64_t n_keys = key_count(k, masks);
    const bool from_end = masks.seqlens_k != nullptr;
    if (from_end && fields[0].is_none() && !otherwise.is_none())
        throw Refused("expected columns"); /* counted as the keys are */
    attn_sampler_attention_params params{};
    params.columns = span(fields[0].is_none() ? otherwise : fields[0], n_keys, from_end);
    params.rows = span(fields[1], q.shape[2]);
    params.query_start = fields[2].is_none() ? (from_end ? 0 : n_keys) - q.shape[2] : integer(fields[2]);
    params.softmax_scale =
        fields[3].is_none() ? std::pow(static_cast<double>(q.shape[3]), -0.5) : number(fields[3]);
    params.lse_base = choice(fields[4], {"e", "2"});
    params.causal = flag(fields[5]);
    params.softmax_scope = choice(fields[6], {"sequence", "block"});
    params.diagonal = flag(fields[7]);
    params.reduction = choice(fields[8], reductions);
    params.per_head = flag(fields[9]);
    params.accumulate = flag(fields[10]);
    params.window_left = integer(window[0]);
    params.window_right = integer(window[1]);
    return params;
}

/* Of a stream for all rows: 64 bits, given signed or unsigned. */
uint64_t seed_of(py::handle value) {
    int overflow = 0;
    const long long seed = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    if (overflow == 0)
        return static_cast<uint64_t>(seed);
    const unsigned long long large = PyLong_AsUnsignedLongLong(value.ptr());
    if (PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        throw Refused("expected an integer of 64 bits");
    }
    return large;
}

/* A number for all rows, or a tensor with one for each: then `all` is 0. */
template <typename T, typename Read>
void of_rows(py::handle value, T &all, const attn_sampler_tensor *&own, Views &view, Read read) {
    if (PyLong_CheckExact(value.ptr()) || PyFloat_CheckExact(value.ptr()) || PyUnicode_Check(value.ptr()))
        all = read(value);
    else
        own = view(value);
}

/* `seed` is an integer, or a tensor with a stream for each row, or None where nothing is sampled. */
attn_sampler_sampling_params sampling_params(py::handle source, const attn_sampler_tensor &logits,
                                             Views &view) {
    const Record fields(source, 9);
    attn_sampler_sampling_params params{};
    params.metric = choice(fields[0], {"probability", "margin", "entropy"});
    of_rows(fields[1], params.temperature, params.temperatures, view, number);
    if (PyLong_CheckExact(fields[2].ptr()))
        params.seed = seed_of(fields[2]);
    else
        params.seeds = view.optional(fields[2]);
    if (fields[2].is_none() && (params.temperature > 0.0 || params.temperatures != nullptr))
        throw Refused("expected a seed");
    params.exclude_token_id = fields[3].is_none() ? -1 : integer(fields[3]);
    if (!fields[3].is_none() && (params.exclude_token_id < 0 || params.exclude_token_id >= logits.shape[2]))
        throw Refused("expected a token of the vocabulary");
    params.vocab_start = integer(fields[4]);
    of_rows(fields[5], params.top_k, params.top_ks, view, integer);
    of_rows(fields[6], params.top_p, params.top_ps, view, number);
    of_rows(fields[7], params.min_p, params.min_ps, view, number);
    if (params.top_ps == nullptr && !(params.top_p > 0.0))
        throw Refused("expected a number above 0");
    params.token_bitmask = view.optional(fields[8]);
    return params;
}

attn_sampler_selection_params selection_params(py::handle source, Views &view) {
    const Record fields(source, 7);
    attn_sampler_selection_params params{};
    of_rows(fields[0], params.rule, params.rules, view,
            [](py::handle x) { return choice(x, {"sequential", "parallel", "threshold"}); });
    params.fallback = choice(fields[1], {"confidence", "score"});
    of_rows(fields[2], params.tau, params.taus, view, number);
    params.replace_tau = number(fields[3]);
    params.remask_tau = number(fields[4]);
    params.max_revisions = fields[5].is_none() ? ATTN_SAMPLER_MAX_KEYS : integer(fields[5]);
    params.revision_order = choice(fields[6], {"product", "doubt", "score"});
    return params;
}

/* Where to run: device, CPU threads, CUDA ordinal, stream, workspace address and size. */
attn_sampler_exec exec_of(py::handle source) {
    const Record fields(source, 6);
    int32_t small[3];
    for (int i = 0; i < 3; ++i) {
        const int64_t value = integer(fields[i]);
        small[i] = static_cast<int32_t>(value);
        if (small[i] != value)
            throw Refused("expected an integer of 32 bits");
    }
    return {small[0], small[1], small[2], address(fields[3]), address(fields[4]), integer(fields[5]), 0};
}

/* Runs an API call without the lock and turns its status into an exception; 0, or the bytes of workspace
 * without which nothing was run. */
template <typename Call>
int64_t run(py::handle where, Call call) {
    attn_sampler_exec exec = exec_of(where);
    attn_sampler_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = call(&exec);
    Py_END_ALLOW_THREADS;
    switch (status) {
    case ATTN_SAMPLER_OK:
        return 0;
    case ATTN_SAMPLER_WORKSPACE_TOO_SMALL:
        return exec.workspace_needed;
    case ATTN_SAMPLER_INVALID_ARGUMENT:
    case ATTN_SAMPLER_UNSUPPORTED:
        throw Refused(attn_sampler_last_error());
    case ATTN_SAMPLER_OUT_OF_MEMORY:
        throw std::bad_alloc();
    default:
        throw std::runtime_error(attn_sampler_last_error());
    }
}

/* column_scores or attention_map. */
template <auto kFunction, bool kIsMap>
int64_t attention(py::handle out, py::handle layer, py::handle masks, py::handle options, py::handle where) {
    Views view;
    view.reserve(11);
    const auto *const out_ = view(out);
    const attn_sampler_layer layer_ = layer_of(layer, view);
    const attn_sampler_masks masks_ = masks_of(masks, view);
    const std::initializer_list<const char *> reductions[] = {{"sum", "mean", "max"},
                                                              {"none", "sum", "diagonal"}};
    const attn_sampler_attention_params params =
        attention_params(options, *layer_.q, *layer_.k, masks_, reductions[kIsMap]);
    return run(where,
               [&](attn_sampler_exec *exec) { return kFunction(&layer_, &masks_, &params, out_, exec); });
}

int64_t top_columns(py::handle out, py::handle layer, py::handle masks, py::handle options,
                    py::handle where) {
    Views view;
    view.reserve(12);
    const Record outputs(out, 2), fields(options, 6);
    const auto *const positions = view(outputs[0]), *const scores = view(outputs[1]);
    const attn_sampler_layer layer_ = layer_of(layer, view);
    const attn_sampler_masks masks_ = masks_of(masks, view);
    attn_sampler_top_columns_params params{};
    params.attention = attention_params(fields[0], *layer_.q, *layer_.k, masks_, {"sum", "mean", "max"});
    params.count = integer(fields[1]);
    params.per = choice(fields[2], {"kv_head", "head", "all"});
    params.sinks = integer(fields[3]);
    params.recent = integer(fields[4]);
    params.pool_width = 1;
    if (!fields[5].is_none()) {
        const Record pool(fields[5], 2);
        params.pool = choice(pool[0], {"max", "mean"});
        params.pool_width = integer(pool[1]);
    }
    return run(where, [&](attn_sampler_exec *exec) {
        return attn_sampler_top_columns(&layer_, &masks_, &params, positions, scores, exec);
    });
}

int64_t token_confidence(py::handle out, py::handle logits, py::handle current_ids, py::handle options,
                         py::handle where) {
    Views view;
    view.reserve(12);
    const Record outputs(out, 4);
    const auto *const token_ids = view(outputs[0]), *const confidence = view(outputs[1]),
                      *const log_prob = view(outputs[2]), *const current = view.optional(outputs[3]),
                      *const logits_ = view(logits), *const current_ids_ = view.optional(current_ids);
    const attn_sampler_sampling_params params = sampling_params(options, *logits_, view);
    return run(where, [&](attn_sampler_exec *exec) {
        return attn_sampler_token_confidence(logits_, current_ids_, &params, token_ids, confidence, log_prob,
                                             current, exec);
    });
}

int64_t select_tokens(py::handle out, py::handle scores, py::handle confidence, py::handle masked,
                      py::handle current, py::handle differs, py::handle options, py::handle where) {
    Views view;
    view.reserve(10);
    const Record outputs(out, 3);
    const auto *const selected = view(outputs[0]), *const scores_ = view(scores),
                      *const confidence_ = view(confidence), *const masked_ = view(masked);
    const attn_sampler_revision revision = {view.optional(outputs[2]), view.optional(outputs[1]),
                                            view.optional(current), view.optional(differs), nullptr};
    const bool revises = revision.budget != nullptr;
    const attn_sampler_selection_params params = selection_params(options, view);
    return run(where, [&](attn_sampler_exec *exec) {
        return attn_sampler_select_tokens(scores_, confidence_, masked_, &params, selected,
                                          revises ? &revision : nullptr, exec);
    });
}

/* The scores are given where the layers are None. */
int64_t decode_step(py::handle out, py::handle logits, py::handle layers, py::handle masks,
                    py::handle options, py::handle where) {
    Views view;
    PyObject *const given = layers.is_none() ? nullptr : view.items(layers);
    const Py_ssize_t count = given == nullptr ? 0 : PyTuple_GET_SIZE(given);
    if (given != nullptr && count == 0) /* the scores are not to be read */
        throw Refused("expected at least one layer");
    view.reserve(23 + 5 * static_cast<size_t>(count));
    const Record outputs(out, 9), fields(options, 6);
    const auto *const tokens = view(outputs[0]), *const token_ids = view(outputs[1]),
                      *const confidence = view(outputs[2]), *const scores = view(outputs[3]),
                      *const selected = view(outputs[4]), *const logits_ = view(logits);
    const attn_sampler_revision revision = {view.optional(outputs[8]), view.optional(outputs[7]),
                                            view.optional(outputs[6]), nullptr, view.optional(outputs[5])};
    const bool revises = revision.budget != nullptr;
    const attn_sampler_masks masks_ = masks_of(masks, view);
    std::vector<attn_sampler_layer> layers_;
    layers_.reserve(static_cast<size_t>(count));
    for (Py_ssize_t i = 0; i < count; ++i) {
        layers_.push_back(layer_of(PyTuple_GET_ITEM(given, i), view));
        if (!alike(layers_.back(), layers_.front()))
            throw Refused("the layers differ");
    }
    /* Where the scores are given, nothing is made of the attention's options, valid as they have to be. */
    attn_sampler_tensor none{};
    none.shape[3] = 1;
    attn_sampler_decode_step_params params{};
    params.block = span(fields[0], tokens->shape[1]);
    params.mask_token_id = integer(fields[1]);
    params.query_rows = choice(fields[2], {"all", "masked"});
    params.attention =
        attention_params(fields[3], count == 0 ? none : *layers_[0].q, count == 0 ? none : *layers_[0].k,
                         masks_, {"sum", "mean", "max"}, fields[0]);
    params.sampling = sampling_params(fields[4], *logits_, view);
    params.selection = selection_params(fields[5], view);
    return run(where, [&](attn_sampler_exec *exec) {
        return attn_sampler_decode_step(tokens, logits_, layers_.data(), count, &masks_, &params, scores,
                                        token_ids, confidence, selected, revises ? &revision : nullptr, exec);
    });
}

PyObject *refused_type = nullptr;

template <typename... Arguments, size_t... kPlaces>
PyObject *call(int64_t (*function)(Arguments...), PyObject *const *arguments, Py_ssize_t count,
               std::index_sequence<kPlaces...>) {
    if (count != sizeof...(Arguments))
        return PyErr_Format(PyExc_TypeError, "expected %zu arguments, got %zd", sizeof...(Arguments), count);
    try {
        return PyLong_FromLongLong(function(arguments[kPlaces]...));
    } catch (const Refused &error) {
        PyErr_SetString(refused_type, error.what());
    } catch (py::error_already_set &error) {
        error.restore();
    } catch (const std::bad_alloc &) {
        PyErr_SetString(PyExc_MemoryError, "out of memory");
    } catch (const std::exception &error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

/* A function above as Python calls it, in a fraction of the time that pybind11 takes. */
template <auto kFunction, size_t kCount>
PyObject *entry(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
    return call(kFunction, arguments, count, std::make_index_sequence<kCount>());
}

template <auto kFunction, size_t kCount>
PyMethodDef method(const char *name) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry<kFunction, kCount>)),
            METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method<attention<attn_sampler_column_scores, false>, 5>("column_scores"),
    method<attention<attn_sampler_attention_map, true>, 5>("attention_map"),
    method<top_columns, 5>("top_columns"),
    method<token_confidence, 5>("token_confidence"),
    method<select_tokens, 8>("select_tokens"),
    method<decode_step, 6>("decode_step"),
    {nullptr, nullptr, 0, nullptr},
};

} // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled core of attn_sampler; use the functions of the package instead.";
    refused_type = py::register_local_exception<Refused>(m, "Refused", PyExc_ValueError).inc_ref().ptr();
    /* A second copy of the module, such as another build of it, has a type of its own. */
    py::class_<attn_sampler_tensor>(m, "TensorView", py::module_local()).def(py::init(&tensor_view));
    m.def("read_tensors_of", &read_tensors_of);
    m.def("find_flags", &find_flags);
    if (PyModule_AddFunctions(m.ptr(), methods) != 0)
        throw py::error_already_set();
    m.def("version", [] { return attn_sampler_version(); });
    m.def("cpu_isa", [] { return attn_sampler_cpu_isa(); });
    m.def("cpu_amx_refusal", [] { return attn_sampler_cpu_amx_refusal(); });
    m.def("cpu_unavailable", [] { return attn_sampler_cpu_unavailable(); });
    m.def("cuda_unavailable", [] { return attn_sampler_cuda_unavailable(); });
    m.def("cuda_device_unavailable", &attn_sampler_cuda_device_unavailable);
    py::dict limits;
    limits["MAX_ELEMENTS"] = ATTN_SAMPLER_MAX_ELEMENTS;
    limits["MAX_ROWS"] = ATTN_SAMPLER_MAX_ROWS;
    limits["MAX_KEYS"] = ATTN_SAMPLER_MAX_KEYS;
    limits["MAX_HEADDIM"] = ATTN_SAMPLER_MAX_HEADDIM;
    limits["MAX_VOCAB"] = ATTN_SAMPLER_MAX_VOCAB;
    limits["MAX_POSITION"] = ATTN_SAMPLER_MAX_POSITION;
    limits["MAX_POOL_WIDTH"] = ATTN_SAMPLER_MAX_POOL_WIDTH;
    limits["MAX_SCALE"] = ATTN_SAMPLER_MAX_SCALE;
    limits["MAX_TOP_P_VOCAB"] = ATTN_SAMPLER_MAX_TOP_P_VOCAB;
    m.attr("WORKSPACE_ZEROS") = ATTN_SAMPLER_WORKSPACE_ZEROS;
    limits["MIN_TEMPERATURE"] = ATTN_SAMPLER_MIN_TEMPERATURE;
    m.attr("LIMITS") = limits;
}
