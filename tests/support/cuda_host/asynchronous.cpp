/* Copies and products that happen at once or when they are waited for, at random. */
#include <algorithm>
#include <cmath>

#include "fibers.h"

namespace cuda_host {

namespace {

constexpr uint32_t kSharedStart = 1024; /* address of the launch's shared memory */

size_t vector_index(const void *p) {
    return static_cast<size_t>(static_cast<const unsigned char *>(p) - block->shared) / 16;
}

} // namespace

void arrive(const Copy &copy) { *copy.to = copy.from != nullptr ? *copy.from : uint4{0, 0, 0, 0}; }

void copy_later(uint4 *to, const void *from) {
    const Copy copy = {to, static_cast<const uint4 *>(from), thread->open_group};
    if (random_order() % 2 == 0)
        arrive(copy);
    else
        thread->copies.push_back(copy);
    thread->unpublished.push_back(copy);
    block->unpublished[vector_index(to)] = true;
}

void close_copy_group() { ++thread->open_group; }

void await_copies(int pending_groups) {
    std::vector<Copy> &copies = thread->copies;
    size_t n = 0;
    for (; n < copies.size() && copies[n].group < thread->open_group - pending_groups; ++n)
        arrive(copies[n]);
    copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(n));
    thread->closed_groups = thread->open_group - pending_groups;
}

uint32_t shared_address(const void *p) {
    return kSharedStart + static_cast<uint32_t>(static_cast<const unsigned char *>(p) - block->shared);
}

void publish_copies() {
    std::vector<Copy> &copies = thread->unpublished;
    size_t n = 0;
    for (; n < copies.size() && copies[n].group < thread->closed_groups; ++n)
        block->unpublished[vector_index(copies[n].to)] = false;
    copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(n));
}

namespace {

/* Element k of column n. PTX ISA, "Matrix Descriptor Format": bits 0 to 13 are the start address, 16 to 29
 * the leading and 32 to 45 the stride dimension's byte offset, all without their lowest four bits, and 62 to
 * 63 the swizzle, 0 for none. Without one, 8 columns times 16 bytes are 128 bytes in a row, column by column;
 * where elements are contiguous along k, the leading offset is from 16 bytes of a column to its next, and the
 * stride offset from 8 columns to the next. */
float matrix_element(const Product &product, int n, int k) {
    const uint64_t b = product.b;
    auto field = [b](int bit) { return static_cast<uint32_t>(b >> bit & 0x3FFF) << 4; };
    if (b >> 46 != 0)
        fail("a matrix descriptor with a swizzle or a base offset");
    const int64_t offset = int64_t{field(0)} + n / 8 * int64_t{field(32)} + k / 8 * int64_t{field(16)} +
                           n % 8 * 16 + k % 8 * 2 - int64_t{kSharedStart};
    if (offset < 0 || offset + 2 > static_cast<int64_t>(current->shared_bytes))
        fail("a product reads beyond the shared memory");
    if (block->unpublished[static_cast<size_t>(offset) / 16])
        fail("a product reads what was not published");
    uint16_t bits;
    memcpy(&bits, block->shared + offset, 2);
    return product.to_float(bits);
}

void multiply_now() {
    for (const Product &product : thread->products)
        for (int i = 0; i < kAccumulators; ++i)
            for (int k = 0; k < 16; ++k)
                thread->in_flight[i] +=
                    product.a[i / 2 % 2][k] *
                    matrix_element(product, 8 * (i / 4) + 2 * (static_cast<int>(thread->index) % 4) + i % 2,
                                   k);
    thread->products.clear();
}

} // namespace

void fence_products() { thread->fenced = true; }

void multiply_later(float *c, const Product &product) {
    if (!thread->fenced)
        fail("a product without a fence before it");
    if (thread->accumulators == nullptr) {
        thread->accumulators = c;
        std::copy_n(c, kAccumulators, thread->in_flight);
        std::fill_n(c, kAccumulators, NAN);
    } else if (thread->accumulators != c) {
        fail("products with different accumulators in flight");
    }
    const size_t n = thread->n_products++;
    if (n == block->matrices.size()) {
        block->matrices.push_back(product.b);
        ++products;
    } else if (block->matrices[n] != product.b) {
        fail("warps multiply by different matrices");
    }
    thread->products.push_back(product);
    if (random_order() % 2 == 0)
        multiply_now();
}

void await_products(float *c) {
    if (thread->accumulators != c)
        fail("products are waited for in other accumulators");
    multiply_now();
    std::copy_n(thread->in_flight, kAccumulators, c);
    thread->accumulators = nullptr;
    thread->fenced = false;
}

} // namespace cuda_host
