/* A model decoded without Python: the weights of a small masked-diffusion transformer are read from its
 * safetensors file, its forward pass is plain C++, and the library commits tokens block by block until none
 * is masked. The tokens are those of generate(model, prompt, block_length=..., tau=...) in Python.
 *
 *     decode_model sudoku.safetensors 36 0.9 43..5..5.34.16....3...1..6..4....2..
 *     decode_model addition.safetensors 27 0.9 12345678+87654321=.........
 *
 * The models lie in attn_sampler/bundled. A dot is a masked position; each further argument is a prompt.
 */
#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <initializer_list>
#include <iostream>
#include <iterator>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "attn_sampler.h"

namespace {

using Vector = std::vector<float>;

void require(bool condition, const std::string &what) {
    if (!condition)
        throw std::runtime_error(what);
}

double number(const std::string &text) {
    char *end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    require(!text.empty() && *end == '\0' && std::isfinite(value), "expected a number, got '" + text + "'");
    return value;
}

size_t count(const std::string &text) {
    const double value = number(text);
    require(value >= 0 && value < 0x1p40 && value == std::floor(value), "expected a size, got " + text);
    return static_cast<size_t>(value);
}

/* JSON as a flat table: the value at {"a": {"b": [7, 8]}} called "a/b/1" is "8". */
class Json {
  public:
    Json(std::string name, std::string text) : name_(std::move(name)), text_(std::move(text)) {
        read("", 0);
        require(peek() == '\0', name_ + ": JSON goes on behind its end");
    }
    const std::string &operator[](const std::string &path) const {
        const auto found = values_.find(path);
        require(found != values_.end(), name_ + ": has no " + path);
        return found->second;
    }

  private:
    char peek() {
        while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_])))
            ++at_;
        return at_ < text_.size() ? text_[at_] : '\0';
    }
    bool take(char expected) {
        const bool found = peek() == expected;
        at_ += found;
        return found;
    }
    void read(const std::string &path, int depth) {
        const char opening = peek(), closing = opening == '{' ? '}' : ']';
        if (opening == '{' || opening == '[') {
            require(++at_ > 0 && depth < 8, name_ + ": JSON is nested too deep");
            for (int i = 0; !take(closing); ++i) {
                require(i == 0 || take(','), name_ + ": JSON lacks a comma");
                const std::string key = opening == '{' ? string() : std::to_string(i);
                require(opening == '[' || take(':'), name_ + ": JSON lacks a colon");
                read(depth == 0 ? key : path + "/" + key, depth + 1);
            }
        } else if (opening == '"') {
            values_[path] = string();
        } else { /* a number, true, false or null */
            const size_t end = text_.find_first_not_of("+-.0123456789abcdefghijklmnopqrstuvwxyzE", at_);
            values_[path] = text_.substr(at_, end - at_);
            at_ = std::min(end, text_.size());
        }
    }
    std::string string() {
        require(take('"'), name_ + ": JSON lacks a string");
        std::string result;
        for (; at_ < text_.size() && text_[at_] != '"'; ++at_) {
            at_ += text_[at_] == '\\'; /* what is escaped here is a quote or a backslash */
            result += text_.at(at_);
        }
        require(take('"'), name_ + ": JSON lacks the end of a string");
        return result;
    }

    std::string name_, text_;
    size_t at_ = 0;
    std::map<std::string, std::string> values_;
};

/* The tensors of a safetensors file: the header's size in 8 bytes, little-endian; the header; the data. */
class Weights {
  public:
    explicit Weights(const std::string &path) : bytes_(contents(path)), header_(path, header()) {}
    const std::string &metadata(const std::string &name) const { return header_["__metadata__/" + name]; }
    Vector tensor(const std::string &name, std::initializer_list<size_t> shape) const {
        size_t elements = 1, axis = 0;
        for (const size_t extent : shape) {
            require(count(header_[name + "/shape/" + std::to_string(axis++)]) == extent,
                    name + ": wrong shape");
            elements *= extent;
        }
        const size_t start = count(header_[name + "/data_offsets/0"]);
        const size_t size = bytes_.size() - data_, bytes = elements * sizeof(uint16_t);
        require(header_[name + "/dtype"] == "F16", name + ": expected float16");
        require(start <= size && bytes <= size - start, name + ": its data are not in the file");
        Vector values(elements);
        for (size_t i = 0; i < elements; ++i) {
            uint16_t half;
            std::memcpy(&half, &bytes_[data_ + start + i * sizeof(half)], sizeof(half));
            const int exponent = half >> 10 & 31, fraction = half & 1023;
            require(exponent != 31, name + ": holds an infinity or NaN");
            const auto digits = static_cast<float>(exponent > 0 ? fraction + 1024 : fraction);
            values[i] = std::ldexp(half >> 15 ? -digits : digits, std::max(exponent, 1) - 25);
        }
        return values;
    }

  private:
    static std::string contents(const std::string &path) {
        std::ifstream file(path, std::ios::binary);
        const std::string bytes(std::istreambuf_iterator<char>(file), {});
        require(bytes.size() > sizeof(uint64_t), path + ": cannot be read, or is no safetensors file");
        return bytes;
    }
    std::string header() {
        uint64_t size;
        std::memcpy(&size, bytes_.data(), sizeof(size));
        require(size <= bytes_.size() - sizeof(size), "the file is no safetensors file, or cut off");
        data_ = sizeof(size) + size;
        return bytes_.substr(sizeof(size), size);
    }

    std::string bytes_;
    size_t data_ = 0; /* where they begin */
    Json header_;
};

/* y [T, outer], 0 where empty, plus x [T, inner] times the transpose of weight [outer, inner]. */
Vector matmul(const Vector &x, const Vector &weight, size_t inner, Vector y = {}) {
    const size_t rows = x.size() / inner, outer = weight.size() / inner;
    y.resize(rows * outer);
    for (size_t i = 0; i < y.size(); ++i) {
        const float *row = &x[i / outer * inner];
        y[i] += std::inner_product(row, row + inner, &weight[i % outer * inner], 0.0f);
    }
    return y;
}

/* What a layer attended with: q and k [heads, T, D], and the log-sum-exp of each row, [heads, T]. */
struct Attention {
    Vector q, k, lse;
};

/* attn_sampler.bundled.model.TinyMaskedLM: pre-norm blocks, rotary positions, SwiGLU, no biases. */
class Model {
  public:
    explicit Model(const Weights &weights) {
        const Json config("the model's config", weights.metadata("config"));
        const auto size = [&](const char *name) {
            const size_t value = count(config[name]);
            require(value > 0 && value < 1 << 20, std::string(name) + ": expected 1 to 2^20");
            return value;
        };
        vocab = size("vocab_size");
        heads = size("num_heads");
        width_ = size("hidden_size");
        ffn_ = size("ffn_size");
        rope_base_ = static_cast<float>(number(config["rope_base"]));
        norm_eps_ = static_cast<float>(number(config["norm_eps"]));
        require(width_ % (2 * heads) == 0, "hidden_size: expected a multiple of 2 * num_heads");
        head_dim = width_ / heads;
        symbols =
            weights.metadata("task") == "sudoku" ? "123456." : "0123456789+=."; /* the mask token last */
        require(count(config["mask_token_id"]) == vocab - 1 && symbols.size() == vocab,
                "expected a bundled model of sudoku or addition");
        embedding_ = weights.tensor("embedding.weight", {vocab, width_});
        final_norm_ = weights.tensor("final_norm.weight", {width_});
        head_ = weights.tensor("head.weight", {vocab, width_});
        for (size_t i = 0; i < size("num_layers"); ++i) {
            const auto tensor = [&](const char *name, std::initializer_list<size_t> shape) {
                return weights.tensor("blocks." + std::to_string(i) + "." + name + ".weight", shape);
            };
            layers_.push_back(
                {tensor("attention_norm", {width_}), tensor("attention.qkv", {3 * width_, width_}),
                 tensor("attention.out", {width_, width_}), tensor("ffn_norm", {width_}),
                 tensor("ffn.gate_up", {2 * ffn_, width_}), tensor("ffn.down", {width_, ffn_})});
        }
    }

    /* The logits [T, vocab], and what each layer attended with. */
    Vector forward(const std::vector<int64_t> &tokens, std::vector<Attention> &attention) const {
        Vector x(tokens.size() * width_);
        for (size_t t = 0; t < tokens.size(); ++t)
            std::copy_n(&embedding_[static_cast<size_t>(tokens[t]) * width_], width_, &x[t * width_]);
        attention.assign(layers_.size(), {});
        for (size_t l = 0; l < layers_.size(); ++l) {
            const Layer &layer = layers_[l];
            const Vector qkv = matmul(normalised(x, layer.attention_norm), layer.qkv, width_);
            x = matmul(attend(qkv, tokens.size(), attention[l]), layer.out, width_, x);
            const Vector gate_up = matmul(normalised(x, layer.ffn_norm), layer.gate_up, width_);
            Vector inner(tokens.size() * ffn_);
            for (size_t i = 0; i < inner.size(); ++i) {
                const float *gate = &gate_up[i / ffn_ * 2 * ffn_ + i % ffn_], *up = gate + ffn_;
                inner[i] = *gate / (1 + std::exp(-*gate)) * *up;
            }
            x = matmul(inner, layer.down, ffn_, x);
        }
        return matmul(normalised(x, final_norm_), head_, width_);
    }

    int64_t mask() const { return static_cast<int64_t>(vocab) - 1; }

    size_t vocab = 0, heads = 0, head_dim = 0;
    std::string symbols; /* of the tokens */

  private:
    struct Layer {
        Vector attention_norm, qkv, out, ffn_norm, gate_up, down;
    };

    Vector normalised(Vector x, const Vector &weight) const { /* by the root of the mean square */
        for (size_t start = 0; start < x.size(); start += width_) {
            const float *row = &x[start];
            const float squares = std::inner_product(row, row + width_, row, 0.0f);
            const float inverse = 1 / std::sqrt(squares / static_cast<float>(width_) + norm_eps_);
            for (size_t i = 0; i < width_; ++i)
                x[start + i] *= inverse * weight[i];
        }
        return x;
    }

    /* One of q, k and v (0, 1, 2), q and k turned by their positions: [heads, T, D]. */
    Vector part(const Vector &qkv, size_t which, size_t length) const {
        Vector result;
        const size_t half = head_dim / 2;
        for (size_t h = 0; h < heads; ++h)
            for (size_t t = 0; t < length; ++t)
                for (size_t d = 0; d < head_dim; ++d) {
                    const float *from = &qkv[(t * 3 + which) * width_ + h * head_dim];
                    const float exponent = static_cast<float>(d % half) / static_cast<float>(half);
                    const float turn = static_cast<float>(t) * std::pow(rope_base_, -exponent);
                    const float angle = which == 2 ? 0 : turn,
                                other = d < half ? -from[d + half] : from[d - half];
                    result.push_back(from[d] * std::cos(angle) + other * std::sin(angle));
                }
        return result;
    }

    /* [T, width] */
    Vector attend(const Vector &qkv, size_t length, Attention &seen) const {
        seen = {part(qkv, 0, length), part(qkv, 1, length), {}};
        const Vector v = part(qkv, 2, length);
        const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
        Vector y(length * width_), weights(length);
        for (size_t h = 0; h < heads; ++h)
            for (size_t t = 0; t < length; ++t) {
                const float *q = &seen.q[(h * length + t) * head_dim], *k = &seen.k[h * length * head_dim];
                for (size_t j = 0; j < length; ++j, k += head_dim)
                    weights[j] = scale * std::inner_product(q, q + head_dim, k, 0.0f);
                const float most = *std::max_element(weights.begin(), weights.end());
                float sum = 0;
                for (float &weight : weights)
                    sum += weight = std::exp(weight - most);
                seen.lse.push_back(most + std::log(sum));
                for (size_t j = 0; j < length; ++j)
                    for (size_t d = 0; d < head_dim; ++d)
                        y[t * width_ + h * head_dim + d] +=
                            weights[j] / sum * v[(h * length + j) * head_dim + d];
            }
        return y;
    }

    size_t width_ = 0, ffn_ = 0;
    float rope_base_ = 0, norm_eps_ = 0;
    Vector embedding_, final_norm_, head_;
    std::vector<Layer> layers_;
};

/* A dense view of what a pointer points to, a batch of one. */
template <typename T>
attn_sampler_tensor view(const T *data, std::initializer_list<size_t> shape) {
    constexpr auto dtype = std::is_same_v<T, float>     ? ATTN_SAMPLER_FLOAT32
                           : std::is_same_v<T, int64_t> ? ATTN_SAMPLER_INT64
                                                        : ATTN_SAMPLER_BOOL;
    attn_sampler_tensor result{const_cast<T *>(data), {1}, {}, 1, dtype};
    for (const size_t extent : shape)
        result.shape[result.ndim++] = static_cast<int64_t>(extent);
    int64_t stride = 1;
    for (int i = result.ndim - 1; i >= 0; stride *= result.shape[i--])
        result.stride[i] = stride;
    return result;
}

/* One forward pass, and one step of the library, which commits tokens of [start, stop). */
void step(const Model &model, std::vector<int64_t> &tokens, size_t start, size_t stop, double tau) {
    const size_t length = tokens.size(), columns = stop - start;
    std::vector<Attention> attention;
    const Vector logits = model.forward(tokens, attention);
    std::vector<attn_sampler_tensor> views; /* of all layers, which point into it */
    std::vector<attn_sampler_layer> layers;
    views.reserve(3 * attention.size());
    for (const Attention &layer : attention) {
        views.push_back(view(layer.q.data(), {model.heads, length, model.head_dim}));
        views.push_back(view(layer.k.data(), {model.heads, length, model.head_dim}));
        views.push_back(view(layer.lse.data(), {model.heads, length}));
        layers.push_back({&views.end()[-3], &views.end()[-2], &views.end()[-1], nullptr, nullptr});
    }
    attn_sampler_decode_step_params params{}; /* zeros are the defaults: greedy, all rows, sums, ... */
    params.block = params.attention.columns = {static_cast<int64_t>(start), static_cast<int64_t>(stop)};
    params.mask_token_id = model.mask();
    params.attention.softmax_scale = 1 / std::sqrt(static_cast<double>(model.head_dim));
    params.attention.diagonal = 1;
    params.attention.window_left = params.attention.window_right = -1;
    params.selection.rule = ATTN_SAMPLER_RULE_PARALLEL;
    params.selection.tau = tau;
    attn_sampler_exec exec{};
    exec.num_threads = 1;
    Vector scores(columns), confidence(columns);
    std::vector<int64_t> ids(columns);
    std::vector<uint8_t> selected(columns);
    const attn_sampler_tensor tokens_view = view(tokens.data(), {length}),
                              logits_view = view(&logits[start * model.vocab], {columns, model.vocab}),
                              scores_view = view(scores.data(), {columns}),
                              ids_view = view(ids.data(), {columns}),
                              confidence_view = view(confidence.data(), {columns}),
                              selected_view = view(selected.data(), {columns});
    const attn_sampler_status status = attn_sampler_decode_step(
        &tokens_view, &logits_view, layers.data(), static_cast<int64_t>(layers.size()), nullptr, &params,
        &scores_view, &ids_view, &confidence_view, &selected_view, nullptr, &exec);
    require(status == ATTN_SAMPLER_OK, attn_sampler_last_error());
    require(std::count(selected.begin(), selected.end(), 1) > 0, "no position could be committed");
}

/* Decode one prompt, printing the number of each pass and the text after it. */
void decode(const Model &model, const std::string &prompt, size_t block_length, double tau) {
    std::vector<int64_t> tokens;
    for (const char symbol : prompt) {
        const size_t token = model.symbols.find(symbol);
        require(token != std::string::npos, prompt + ": expected symbols of " + model.symbols);
        tokens.push_back(static_cast<int64_t>(token));
    }
    int passes = 0;
    /* Blocks are counted from the end of the prompt; the first may be shorter. */
    size_t stop = (tokens.size() + block_length - 1) % block_length + 1;
    for (size_t start = 0; start < tokens.size(); start = stop, stop += block_length)
        while (std::count(&tokens[start], &tokens[start] + (stop - start), model.mask()) > 0) {
            step(model, tokens, start, stop, tau);
            std::cout << ++passes << '\t';
            for (const int64_t token : tokens)
                std::cout << model.symbols[static_cast<size_t>(token)];
            std::cout << std::endl;
        }
}

} // namespace

int main(int argc, char **argv) try {
    require(argc > 4, "usage: decode_model MODEL.safetensors BLOCK_LENGTH TAU PROMPT...");
    const Model model{Weights(argv[1])};
    const size_t block_length = count(argv[2]);
    require(block_length > 0, "BLOCK_LENGTH: expected 1 or more");
    for (int i = 4; i < argc; ++i)
        decode(model, argv[i], block_length, number(argv[3]));
} catch (const std::exception &error) {
    std::cerr << "decode_model: " << error.what() << '\n';
    return EXIT_FAILURE;
}
