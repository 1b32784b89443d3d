/* The AMX emulator against values worked out by hand: each instruction, its addressing, what it refuses. */
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

namespace {

struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    Config &tile(int number, int tile_rows, int tile_row_bytes) {
        rows[number] = static_cast<uint8_t>(tile_rows);
        row_bytes[number] = static_cast<uint16_t>(tile_row_bytes);
        return *this;
    }
};

const Config kFull = [] {
    Config config;
    for (int i = 0; i < 8; ++i)
        config.tile(i, 16, 64);
    return config;
}();

void configure(const Config &config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
void release() { asm volatile("tilerelease"); }

#define LOAD(number, data, stride)                                                                           \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #number::"r"(data), "r"(int64_t{stride}) : "memory")
#define STORE(number, data, stride)                                                                          \
    asm volatile("tilestored %%tmm" #number ", (%0,%1,1)" ::"r"(data), "r"(int64_t{stride}) : "memory")

std::atomic<int> num_checks{0};

void check(bool right, const std::string &what) {
    ++num_checks;
    if (!right) {
        fprintf(stderr, "wrong: %s\n", what.c_str());
        exit(1);
    }
}

/* What the whole of tile 0 holds. */
struct Words {
    uint32_t word[16][16];

    Words() { STORE(0, word, 64); }
};

/* Functions (data, stride) that load tile 0 with a register as base and another as index, for all registers
 * but the stack's. */
#define FOR_EACH_ADDRESSING(_)                                                                               \
    _(rax, rbx, 1, 0)                                                                                        \
    _(rbx, rcx, 2, 8)                                                                                        \
    _(rcx, rdx, 4, -64)                                                                                      \
    _(rdx, rsi, 8, 1000)                                                                                     \
    _(rsi, rdi, 1, -1000)                                                                                    \
    _(rdi, rbp, 2, 127)                                                                                      \
    _(rbp, r8, 4, 0)                                                                                         \
    _(r8, r9, 8, -128)                                                                                       \
    _(r9, r10, 1, 128)                                                                                       \
    _(r10, r11, 2, 0)                                                                                        \
    _(r11, r12, 4, 64)                                                                                       \
    _(r12, r13, 8, 0)                                                                                        \
    _(r13, r14, 1, 0)                                                                                        \
    _(r14, r15, 2, -1)                                                                                       \
    _(r15, rax, 4, 2000)

#define DEFINE_LOAD(base, index, scale, displacement)                                                        \
    extern "C" void load_by_##base(const void *data, int64_t stride);                                        \
    asm(".pushsection .text\nload_by_" #base ":\n"                                                           \
        "push %" #base "\npush %" #index "\npush %rdi\npush %rsi\npop %" #index "\npop %" #base "\n"         \
        "tileloadd " #displacement "(%" #base ",%" #index "," #scale "), %tmm0\n"                            \
        "pop %" #index "\npop %" #base "\nret\n.popsection");
FOR_EACH_ADDRESSING(DEFINE_LOAD)

void check_addressing() {
    static unsigned char bytes[8192];
    for (size_t i = 0; i < sizeof(bytes); ++i)
        bytes[i] = static_cast<unsigned char>(i * 131 + (i >> 8) * 7);
    const auto is_loaded = [](const unsigned char *from, int64_t stride) {
        const Words loaded;
        for (int r = 0; r < 16; ++r)
            if (memcmp(loaded.word[r], from + r * stride, 64) != 0)
                return false;
        return true;
    };
    configure(kFull);
    const unsigned char *const from = bytes + 4003;
    constexpr int64_t kStride = 24;
#define CHECK_LOAD(base, index, scale, displacement)                                                         \
    load_by_##base(from - (displacement), kStride);                                                          \
    check(is_loaded(from, kStride *scale), "load by " #base ", " #index);                                    \
    load_by_##base(from - (displacement), -kStride);                                                         \
    check(is_loaded(from, -kStride *scale), "load backwards by " #base ", " #index);
    FOR_EACH_ADDRESSING(CHECK_LOAD)

    static unsigned char stack[65536]; /* the signal's frame comes to lie in it */
    unsigned char *const above = stack + sizeof(stack) - 1024;
    memcpy(above, bytes, 1024);
    asm volatile(
        "mov %%rsp, %%r8\nmov %0, %%rsp\ntileloadd 64(%%rsp,%1,1), %%tmm0\nmov %%r8, %%rsp" ::"r"(above),
        "r"(kStride)
        : "r8", "memory");
    check(is_loaded(above + 64, kStride), "load by rsp");
    asm volatile("tileloadd (%0), %%tmm0" ::"r"(from) : "memory");
    check(is_loaded(from, 0), "load without index");
    constexpr size_t kLow = 0x10000000; /* must agree with the displacement below */
    void *const low = mmap(reinterpret_cast<void *>(kLow), 4096, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    check(low == reinterpret_cast<void *>(kLow), "memory at a low address");
    memcpy(low, bytes, 4096);
    asm volatile("tileloadd 0x10000010(,%0,2), %%tmm0" ::"r"(kStride) : "memory");
    check(is_loaded(bytes + 16, 2 * kStride), "load without base");

    unsigned char stored[8192] = {};
    LOAD(0, from, kStride);
    asm volatile("tilestored %%tmm0, -72(%0,%1,4)" ::"r"(stored + 72), "r"(int64_t{20}) : "memory");
    for (int i = 0; i < 8192; ++i) {
        const bool written = i < 16 * 80 && i % 80 < 64;
        check(stored[i] == (written ? from[i / 80 * kStride + i % 80] : 0), "what a store writes");
    }

    static Config two[3];
    two[0] = Config{}.tile(0, 2, 8);
    two[2] = Config{}.tile(0, 3, 12);
    asm volatile("ldtilecfg 1f(%rip)\n.pushsection .data\n1: .byte 1\n.zero 15\n.word 4\n.zero 30\n"
                 ".byte 1\n.zero 15\n.popsection");
    uint32_t word[16] = {};
    LOAD(0, from, kStride);
    STORE(0, word, 4);
    check(memcmp(word, from, 4) == 0 && word[1] == 0, "configuration by rip");
    register int64_t index asm("r9") = 32;
    asm volatile("ldtilecfg 64(%0,%1,2)" ::"r"(two), "r"(index), "m"(two));
    LOAD(0, from, kStride);
    STORE(0, word, 12);
    check(memcmp(word + 6, from + 2 * kStride, 12) == 0 && word[9] == 0, "configuration by base and index");
    release();
}

void check_state() {
    uint32_t ones[16][16];
    memset(ones, 0xFF, sizeof(ones));
    configure(kFull);
    LOAD(0, ones, 64);
    LOAD(7, ones, 64);
    asm volatile("tilezero %tmm0");
    check(Words().word[15][15] == 0, "tilezero");
    uint32_t stored[16][16];
    STORE(7, stored, 64);
    check(memcmp(stored, ones, sizeof(ones)) == 0, "tilezero leaves the others");
    configure(kFull);
    STORE(7, stored, 64);
    check(stored[0][0] == 0 && stored[15][15] == 0, "ldtilecfg zeroes tiles");

    Config late = kFull;
    late.start_row = 14;
    configure(late);
    LOAD(0, ones, 64);
    const Words loaded;
    check(loaded.word[13][0] == 0 && loaded.word[14][0] == ~0u, "the start row");
    LOAD(0, ones, 64);
    check(Words().word[0][0] == ~0u, "the start row, only once");
    release();
}

uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

uint32_t pair(float low, float high) { return bits_of(low) >> 16 | (bits_of(high) & 0xFFFF0000u); }

/* Integers, so that all sums are exact: c (3 x 7) += a (3 x 5 pairs) b (5 pairs x 7). */
void check_product(int seed) {
    configure(Config{}.tile(1, 3, 28).tile(2, 3, 20).tile(6, 5, 28));
    const auto a = [&](int m, int k) { return (m * 10 + k + seed) % 17 - 8; };
    const auto b = [&](int k, int n) { return (k * 7 + n * 3 + seed) % 13 - 6; };
    uint32_t a_words[3][5], b_words[5][7];
    float c[3][9];
    for (int m = 0; m < 3; ++m)
        for (int k = 0; k < 5; ++k)
            a_words[m][k] = pair(float(a(m, 2 * k)), float(a(m, 2 * k + 1)));
    for (int k = 0; k < 5; ++k)
        for (int n = 0; n < 7; ++n)
            b_words[k][n] = pair(float(b(2 * k, n)), float(b(2 * k + 1, n)));
    for (int m = 0; m < 3; ++m)
        for (int n = 0; n < 9; ++n)
            c[m][n] = float(100 * m + n);
    LOAD(1, c, 36);
    LOAD(2, a_words, 20);
    LOAD(6, b_words, 28);
    asm volatile("tdpbf16ps %tmm6, %tmm2, %tmm1"); /* b, a, c */
    STORE(1, c, 36);
    release();
    for (int m = 0; m < 3; ++m)
        for (int n = 0; n < 9; ++n) {
            int expected = 100 * m + n;
            for (int k = 0; k < 10 && n < 7; ++k)
                expected += a(m, k) * b(k, n);
            check(c[m][n] == float(expected), "the product of tiles");
        }
}

/* c + (x0 y0 + x2 y2) + (x1 y1 + x3 y3) for numbers that bfloat16 holds. */
float product(float c, float x0, float y0, float x1, float y1, float x2, float y2, float x3, float y3) {
    configure(Config{}.tile(3, 1, 4).tile(4, 1, 8).tile(5, 2, 4));
    const uint32_t x[2] = {pair(x0, x1), pair(x2, x3)}, y[2] = {pair(y0, y1), pair(y2, y3)};
    LOAD(3, &c, 4);
    LOAD(4, x, 8);
    LOAD(5, y, 4);
    asm volatile("tdpbf16ps %tmm5, %tmm4, %tmm3");
    STORE(3, &c, 4);
    release();
    return c;
}

void check_arithmetic() {
    const float big = 16777216.0f; /* 2^24: the next float32 is 2 more */
    check(product(0, big, 1, 1, 1, 1, 1, 1, 1) == big + 2, "even and odd products are summed apart");
    check(product(-big, big, 1, 1, 1, 1, 1, 1, 1) == 2, "c is added last");
    check(product(0, big, 1, 0, 0, 3, 1, 0, 0) == big + 4, "rounding to nearest, ties to even");
    const float large = std::ldexp(1.0f, 127), small = std::ldexp(1.0f, -100);
    check(product(0, -large, 1, 0, 0, large, 2, 0, 0) == large,
          "a product is not rounded before it is added");
    check(std::isinf(product(0, large, 2, 0, 0, 0, 0, 0, 0)), "overflow");
    const float denormal = std::ldexp(1.0f, -130);
    check(bits_of(product(0, denormal, large, 0, 0, 0, 0, 0, 0)) == 0, "denormal factors are zero");
    check(bits_of(product(0, small, std::ldexp(1.0f, -30), 0, 0, 0, 0, 0, 0)) == 0, "denormal sums are zero");
    check(bits_of(product(denormal, 0, 0, 0, 0, 0, 0, 0, 0)) == 0, "a denormal c is zero");
    check(bits_of(product(0, small, std::ldexp(1.0f, -26), 0, 0, 0, 0, 0, 0)) == 0x00800000u,
          "the least float");
    check(std::isnan(product(0, INFINITY, 0, 1, 1, 1, 1, 1, 1)), "infinity times zero");
    check(product(0, -INFINITY, 2, 1, 1, 1, 1, 1, 1) == -INFINITY, "infinity");
    volatile float least = std::ldexp(1.0f, -149);
    check(least / 2 == 0 && least * 2 > 0, "the program's own denormals are as before");
}

/* The action ends a child process by this signal, or with this status, after a message with these words. */
template <typename Action>
void check_ends(int signal, int status, const char *message, Action action) {
    int ends[2];
    check(pipe(ends) == 0, "pipe");
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        action();
        _exit(0);
    }
    close(ends[1]);
    std::string text;
    char letter;
    while (read(ends[0], &letter, 1) == 1)
        text += letter;
    close(ends[0]);
    int result = 0;
    waitpid(child, &result, 0);
    const bool as_expected = signal != 0 ? WIFSIGNALED(result) && WTERMSIG(result) == signal
                                         : WIFEXITED(result) && WEXITSTATUS(result) == status;
    check(as_expected && text.find(message) != std::string::npos,
          std::string("expected \"") + message + "\", got \"" + text + "\"");
}

template <typename Action>
void check_refused(const char *message, Action action) {
    check_ends(SIGABRT, 0, message, action);
}

void check_refused_configurations() {
    const auto refused = [](const char *message, const Config &config) {
        check_refused(message, [=] { configure(config); });
    };
    Config config = kFull;
    config.palette = 2;
    refused("ldtilecfg: #GP, palette above 1", config);
    for (int byte : {2, 15, 32, 47, 56, 63}) {
        config = kFull;
        reinterpret_cast<uint8_t *>(&config)[byte] = 1;
        refused("ldtilecfg: #GP, a reserved byte is not 0", config);
    }
    refused("ldtilecfg: #GP, more than 16 rows", Config{}.tile(7, 17, 64));
    refused("ldtilecfg: #GP, more than 64 bytes in a row", Config{}.tile(7, 16, 65));
    refused("ldtilecfg: #GP, more than 64 bytes in a row", Config{}.tile(0, 16, 256));
    refused("ldtilecfg: #GP, rows without bytes", Config{}.tile(3, 16, 0));
    refused("ldtilecfg: #GP, rows without bytes", Config{}.tile(3, 0, 64));
}

void check_refused_instructions() {
    static char memory[1024];
    const auto with = [](const Config &config, auto action) {
        return [=] {
            configure(config);
            action();
        };
    };
    const auto load = [] { LOAD(1, memory, 64); };
    const auto multiply = [] { asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); };
    check_refused("tileloadd: #UD, tiles are not configured", load);
    check_refused("tilestored: #UD, tiles are not configured", [] { STORE(1, memory, 64); });
    check_refused("tilezero: #UD, tiles are not configured", [] { asm volatile("tilezero %tmm0"); });
    check_refused("tdpbf16ps: #UD, tiles are not configured", multiply);
    check_refused("tileloadd: #UD, tiles are not configured", with(kFull, [=] {
                      release();
                      load();
                  }));
    Config none = kFull;
    none.palette = 0;
    check_refused("tileloadd: #UD, tiles are not configured", with(kFull, [=] {
                      configure(none);
                      load();
                  }));
    check_refused("tileloadd: #UD, the configuration leaves this tile out",
                  with(Config{}.tile(0, 1, 4), load));
    check_refused("tileloadd: #UD, a row is not of whole words", with(Config{}.tile(1, 1, 6), load));
    Config late = kFull;
    late.start_row = 16;
    check_refused("tileloadd: #UD, the start row is beyond the tile", with(late, load));
    check_refused("tilezero: #UD, no tile has this number", /* tmm8 */
                  with(kFull, [] { asm volatile(".byte 0xC4, 0x62, 0x7B, 0x49, 0xC0"); }));
    check_refused("tileloadd: #UD, no SIB byte", /* of (rax) */
                  with(kFull, [] { asm volatile(".byte 0xC4, 0xE2, 0x7B, 0x4B, 0x00"); }));
    check_refused("tdpbf16ps: #UD, the same tile twice", /* tmm1 twice, which an assembler warns of */
                  with(kFull, [] { asm volatile(".byte 0xC4, 0xE2, 0x72, 0x5C, 0xC1"); }));
    const char *const shapes = "tdpbf16ps: #UD, the shapes do not match";
    check_refused(shapes, with(Config{}.tile(0, 4, 64).tile(1, 5, 64).tile(2, 16, 64), multiply));
    check_refused(shapes, with(Config{}.tile(0, 4, 60).tile(1, 4, 64).tile(2, 16, 64), multiply));
    check_refused(shapes, with(Config{}.tile(0, 4, 64).tile(1, 4, 60).tile(2, 16, 64), multiply));
}

/* Has the signal before the emulator. */
__attribute__((constructor(101))) void install_previous() {
    signal(SIGILL, [](int) {
        const char text[] = "the previous handler";
        _exit(write(STDERR_FILENO, text, sizeof(text)) > 0 ? 3 : 4);
    });
}

} // namespace

int main() {
    check_addressing();
    check_state();
    check_arithmetic();
    std::thread threads[4];
    for (int i = 0; i < 4; ++i)
        threads[i] = std::thread([i] {
            for (int seed = 0; seed < 300; ++seed)
                check_product(1000 * i + seed);
        });
    for (std::thread &thread : threads)
        thread.join();
    check_refused_configurations();
    check_refused_instructions();
    check_ends(0, 3, "the previous handler", [] { asm volatile("ud2"); });
    check_ends(0, 3, "the previous handler", [] { raise(SIGILL); });
    printf("%d checks\n", num_checks.load());
}
