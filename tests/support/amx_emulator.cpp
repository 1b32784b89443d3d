/* Runs programs compiled for AMX on a processor without the unit.
 *
 * There each tile instruction raises SIGILL. The handler decodes it, does to tiles of the thread what Intel's
 * manual (Software Developer's Manual, volume 2) says it does, and continues behind it. What the manual has
 * refused, with #UD or #GP, ends the process with a message. Any other SIGILL goes to who had the signal
 * before, for good. Python's faulthandler would take the signal away: leave it off.
 *
 * Its two functions tell a test that there were products, and that no thread has kept its tiles.
 */
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <immintrin.h>

namespace {

struct Tile {
    int rows, row_bytes; /* 0 where the configuration leaves the tile out */
    uint32_t word[16][16];
};

/* The tiles of one thread, from a table: a shared library's large thread-local objects are allocated on first
 * use, which a signal handler must not do. */
struct Unit {
    std::atomic<bool> taken{false};
    int start_row;
    Tile tiles[8];
};

constexpr int kMaxThreads = 256;
Unit units[kMaxThreads] = {};
__attribute__((tls_model("initial-exec"))) thread_local Unit *unit = nullptr; /* null: not configured */
std::atomic<uint64_t> products{0};
struct sigaction previous;

void print(const char *text) {
    if (write(STDERR_FILENO, text, strlen(text)) < 0)
        abort();
}

[[noreturn]] void refuse(const char *instruction, const char *why) {
    print("amx_emulator: ");
    print(instruction);
    print(": ");
    print(why);
    print("\n");
    abort();
}

struct Instruction {
    const uint8_t *next;
    int opcode, prefix; /* prefix: 0, or 1 to 3 for 66, F3, F2 */
    int reg, rm, vvvv;
    bool memory, sib;
    char *address; /* without the index */
    int64_t index; /* scaled */
};

/* False where these bytes are none of the instructions (opcodes 49, 4B and 5C of VEX map 2). */
bool decode(const uint8_t *at, const greg_t *gregs, Instruction *result) {
    static const int kNumber[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    if (at[0] != 0xC4 || (at[1] & 0x1F) != 2 || (at[2] & 0x84) != 0) /* VEX.W and VEX.L are 0 */
        return false;
    if (at[3] != 0x49 && at[3] != 0x4B && at[3] != 0x5C)
        return false;
    /* The four register bits in the prefix are inverted. */
    const int r = ~at[1] >> 4 & 8, x = ~at[1] >> 3 & 8, b = ~at[1] >> 2 & 8;
    const int mod = at[4] >> 6, low = at[4] & 7;
    *result = {at + 5, at[3], at[2] & 3, (at[4] >> 3 & 7) | r, low | b, ~at[2] >> 3 & 15, mod != 3,
               false,  0,     0};
    if (mod == 3)
        return true;

    const uint8_t *&next = result->next;
    int base = low;
    if (low == 4) {
        const int sib = *next++, index = (sib >> 3 & 7) | x;
        result->sib = true;
        result->index = index == 4 ? 0 : static_cast<int64_t>(gregs[kNumber[index]]) << (sib >> 6);
        base = sib & 7;
    }
    const bool no_base = mod == 0 && base == 5; /* a 32-bit displacement instead; without SIB from the next */
    int64_t address = no_base ? 0 : gregs[kNumber[base | b]];
    if (mod == 1) {
        address += static_cast<int8_t>(*next++);
    } else if (mod == 2 || no_base) {
        int32_t displacement;
        memcpy(&displacement, next, 4);
        next += 4;
        address += displacement;
    }
    if (no_base && !result->sib)
        address += reinterpret_cast<int64_t>(next);
    result->address = reinterpret_cast<char *>(address);
    return true;
}

void release() {
    if (unit != nullptr)
        unit->taken.store(false, std::memory_order_release);
    unit = nullptr;
}

void configure(const char *address) {
    const auto fail = [](const char *why) { refuse("ldtilecfg", why); };
    uint8_t config[64];
    memcpy(config, address, 64);
    if (config[0] > 1)
        fail("#GP, palette above 1");
    release();
    if (config[0] == 0)
        return;
    for (int i = 0; unit == nullptr; ++i) {
        if (i == kMaxThreads)
            fail("too many threads have tiles");
        if (!units[i].taken.exchange(true, std::memory_order_acquire))
            unit = &units[i];
    }
    memset(unit->tiles, 0, sizeof(unit->tiles));
    unit->start_row = config[1];
    for (int i = 2; i < 64; ++i)
        if (config[i] != 0 && (i < 16 || (i >= 32 && i < 48) || i >= 56))
            fail("#GP, a reserved byte is not 0");
    for (int i = 0; i < 8; ++i) {
        Tile &tile = unit->tiles[i];
        tile.rows = config[48 + i];
        tile.row_bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8;
        if (tile.rows > 16)
            fail("#GP, more than 16 rows");
        if (tile.row_bytes > 64)
            fail("#GP, more than 64 bytes in a row");
        if ((tile.rows == 0) != (tile.row_bytes == 0))
            fail("#GP, rows without bytes or bytes without rows");
    }
}

Tile &get_tile(const char *instruction, int number) {
    if (unit == nullptr)
        refuse(instruction, "#UD, tiles are not configured");
    if (number >= 8)
        refuse(instruction, "#UD, no tile has this number");
    if (unit->tiles[number].rows == 0)
        refuse(instruction, "#UD, the configuration leaves this tile out");
    return unit->tiles[number];
}

/* Both directions between a tile and memory, from the start row on. */
template <typename Move>
void move_rows(const char *instruction, const Instruction &at, Move move) {
    Tile &tile = get_tile(instruction, at.reg);
    if (!at.sib)
        refuse(instruction, "#UD, no SIB byte");
    if (tile.row_bytes % 4 != 0)
        refuse(instruction, "#UD, a row is not of whole words");
    if (unit->start_row >= tile.rows)
        refuse(instruction, "#UD, the start row is beyond the tile");
    for (int r = unit->start_row; r < tile.rows; ++r)
        move(tile.word[r], at.address + r * at.index, static_cast<size_t>(tile.row_bytes));
    unit->start_row = 0;
}

void zero_tile(const Instruction &at) {
    memset(get_tile("tilezero", at.reg).word, 0, sizeof(Tile::word));
    unit->start_row = 0;
}

float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* c[m][n] += the even products' sum over k + the odd ones', all float32. Not inlined, so that no operation
 * leaves the rounding mode that its caller sets. */
__attribute__((noinline)) void multiply(Tile &c, const Tile &a, const Tile &b) {
    for (int m = 0; m < c.rows; ++m) {
        float even[16] = {}, odd[16] = {};
        for (int k = 0; k < b.rows; ++k)
            for (int n = 0; n < 16; ++n) {
                const uint32_t x = a.word[m][k], y = b.word[k][n], high = 0xFFFF0000u;
                even[n] = std::fma(as_float(x << 16), as_float(y << 16), even[n]);
                odd[n] = std::fma(as_float(x & high), as_float(y & high), odd[n]);
            }
        for (int n = 0; n < c.row_bytes / 4; ++n) {
            const float sum = as_float(c.word[m][n]) + (even[n] + odd[n]);
            memcpy(&c.word[m][n], &sum, 4);
        }
    }
}

void multiply_tiles(const Instruction &at) {
    const char *const name = "tdpbf16ps";
    Tile &c = get_tile(name, at.reg);
    const Tile &a = get_tile(name, at.rm), &b = get_tile(name, at.vvvv);
    if (&a == &b || &a == &c || &b == &c)
        refuse(name, "#UD, the same tile twice");
    if (a.row_bytes % 4 != 0 || b.row_bytes % 4 != 0 || c.row_bytes % 4 != 0)
        refuse(name, "#UD, a row is not of whole words");
    if (c.rows != a.rows || c.row_bytes != b.row_bytes || a.row_bytes / 4 != b.rows)
        refuse(name, "#UD, the shapes do not match");
    _mm_setcsr(0x9FC0); /* to nearest, denormals to zero; the handler's end restores the program's */
    multiply(c, a, b);
    unit->start_row = 0;
    products.fetch_add(1, std::memory_order_relaxed);
}

/* False where this is none of the seven instructions. */
bool execute(const Instruction &at) {
    const bool no_vvvv = at.vvvv == 0;
    if (at.opcode == 0x5C && at.prefix == 2 && !at.memory)
        multiply_tiles(at);
    else if (at.opcode == 0x4B && at.prefix == 3 && at.memory && no_vvvv)
        move_rows("tileloadd", at, [](void *row, char *p, size_t bytes) { memcpy(row, p, bytes); });
    else if (at.opcode == 0x4B && at.prefix == 2 && at.memory && no_vvvv)
        move_rows("tilestored", at, [](void *row, char *p, size_t bytes) { memcpy(p, row, bytes); });
    else if (at.opcode == 0x49 && at.prefix == 3 && !at.memory && at.rm == 0 && no_vvvv)
        zero_tile(at);
    else if (at.opcode == 0x49 && at.prefix == 0 && at.memory && at.reg == 0 && no_vvvv)
        configure(at.address + at.index);
    else if (at.opcode == 0x49 && at.prefix == 0 && !at.memory && at.reg == 0 && at.rm == 0 && no_vvvv)
        release();
    else
        return false;
    return true;
}

void on_illegal_instruction(int, siginfo_t *info, void *context) {
    greg_t *const gregs = static_cast<ucontext_t *>(context)->uc_mcontext.gregs;
    Instruction at;
    const bool raised_by_processor = info->si_code > 0;
    if (raised_by_processor && decode(reinterpret_cast<const uint8_t *>(gregs[REG_RIP]), gregs, &at) &&
        execute(at)) {
        gregs[REG_RIP] = reinterpret_cast<greg_t>(at.next);
        return;
    }
    sigaction(SIGILL, &previous, nullptr);
    if (!raised_by_processor)
        raise(SIGILL);
}

__attribute__((constructor)) void install() {
    struct sigaction action = {};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &previous);
}

} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT uint64_t amx_emulator_products() { return products.load(); }

EXPORT int amx_emulator_threads_with_tiles() {
    int threads = 0;
    for (const Unit &each : units)
        threads += each.taken.load();
    return threads;
}
