// moe.cu as C++, for tests on machines without a GPU.
//
// A block runs as fibers, one for each CUDA thread, on the calling thread: a fiber runs until it meets a barrier, so what
// one thread reads before another has written it, or overwrites before another has read it, comes out wrong every time;
// running the fibers in both orders finds either side. Copies to shared memory happen when they are waited for, no sooner.
// Buffers end at a page that cannot be touched. Threads that meet different barriers end the program.

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#define MOE_EMULATED
#define __global__
#define __device__ static inline
#define __forceinline__
#define __shared__ static
#define __launch_bounds__(threads)

namespace {

struct Dim { unsigned x, y, z; };
Dim threadIdx, blockIdx;

const int WIDTH = 128;
const size_t STACK = 64 << 10;

enum Waits { NOTHING, WARP, BLOCK, END };

struct Pending { void* to; const void* from; bool valid; };

struct Fiber {
    ucontext_t context;
    Waits waits;
    unsigned exchanges;
    std::vector<std::vector<Pending>> groups;
};

Fiber fibers[WIDTH];
ucontext_t scheduler;
int current;
void (*body)(void*);
void* body_data;
/// What lanes give each other; two copies, so that a lane cannot overwrite what another has yet to read.
unsigned slots[WIDTH / 32][2][32][12];

void wait_for(Waits what) {
    fibers[current].waits = what;
    swapcontext(&fibers[current].context, &scheduler);
}

void start() {
    body(body_data);
    fibers[current].waits = END;
    swapcontext(&fibers[current].context, &scheduler);
}

/// Gives `words` to the other lanes and returns what all of them gave.
const unsigned (*exchange(const unsigned* words, int count))[12] {
    unsigned (*all)[12] = slots[current / 32][fibers[current].exchanges++ & 1];
    memcpy(all[current % 32], words, count * sizeof *words);
    wait_for(WARP);
    return all;
}

[[noreturn]] void fail(const char* why) {
    fprintf(stderr, "emulator: %s, block %u %u thread %d\n", why, blockIdx.x, blockIdx.y, current);
    abort();
}

void resume(int thread) {
    current = thread;
    threadIdx = {unsigned(thread), 0, 0};
    fibers[thread].waits = NOTHING;
    swapcontext(&scheduler, &fibers[thread].context);
}

/// Runs the lanes of a warp until all wait for the block, or have ended.
void run_warp(int warp, bool reversed) {
    for (;;) {
        int waits[4] = {};
        for (int i = 0; i < 32; i++) {
            int thread = warp * 32 + (reversed ? 31 - i : i);
            if (fibers[thread].waits != END) resume(thread);
            waits[fibers[thread].waits]++;
        }
        if (waits[END] == 32 || waits[BLOCK] == 32) return;
        if (waits[WARP] != 32) fail("lanes of a warp do not meet");
    }
}

void run_block(char* stacks, bool reversed) {
    for (int i = 0; i < WIDTH; i++) {
        Fiber& f = fibers[i];
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = stacks + i * STACK;
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        f.waits = NOTHING;
        f.exchanges = 0;
        f.groups.assign(1, {});
        makecontext(&f.context, start, 0);
    }
    for (int ended = 0; ended < WIDTH / 32;) {
        ended = 0;
        for (int i = 0; i < WIDTH / 32; i++) {
            int warp = reversed ? WIDTH / 32 - 1 - i : i;
            if (fibers[warp * 32].waits != END) run_warp(warp, reversed);
            ended += fibers[warp * 32].waits == END;
        }
        // A warp that has ended counts as arrived, as it does on the device.
    }
}

void __syncthreads() { wait_for(BLOCK); }
void __syncwarp() { wait_for(WARP); }

unsigned __float_as_uint(float v) { unsigned u; memcpy(&u, &v, 4); return u; }
float __uint_as_float(unsigned u) { float v; memcpy(&v, &u, 4); return v; }
int __popc(unsigned v) { return __builtin_popcount(v); }
unsigned atomicMin(unsigned* at, unsigned v) { unsigned old = *at; if (v < old) *at = v; return old; }

unsigned shuffled(unsigned v, int mask) { return exchange(&v, 1)[(current % 32) ^ mask][0]; }
float __shfl_xor_sync(unsigned, float v, int mask) { return __uint_as_float(shuffled(__float_as_uint(v), mask)); }
unsigned __shfl_xor_sync(unsigned, unsigned v, int mask) { return shuffled(v, mask); }
int __shfl_xor_sync(unsigned, int v, int mask) { return int(shuffled(unsigned(v), mask)); }
unsigned __ballot_sync(unsigned, bool yes) {
    unsigned word = yes, found = 0;
    const unsigned (*all)[12] = exchange(&word, 1);
    for (int lane = 0; lane < 32; lane++) found |= all[lane][0] << lane;
    return found;
}

float bf16(unsigned half) { return __uint_as_float(half << 16); }

/// Fragments as the PTX manual spreads m16n8k16 over the lanes, group = lane / 4, quad = lane % 4:
/// a[i]: row group + 8 (i % 2), columns 2 quad + 8 (i / 2) and the next; b[i]: column group, rows 2 quad + 8 i and the
/// next; c[i]: row group + 8 (i / 2), column 2 quad + i % 2.
void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    unsigned words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const unsigned (*all)[12] = exchange(words, 6);
    auto at_a = [&](int row, int col) {
        unsigned word = all[row % 8 * 4 + col % 8 / 2][row / 8 + col / 8 * 2];
        return bf16(col % 2 ? word >> 16 : word & 0xffff);
    };
    auto at_b = [&](int row, int col) {
        unsigned word = all[col * 4 + row % 8 / 2][4 + row / 8];
        return bf16(row % 2 ? word >> 16 : word & 0xffff);
    };
    int lane = current % 32;
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) c[i] += at_a(row, k) * at_b(k, col);
    }
}

void copy_async(void* to, const void* from, bool valid) {
    if (size_t(to) % 16 || (valid && size_t(from) % 16)) fail("a copy is not aligned");
    fibers[current].groups.back().push_back({to, from, valid});
}
void copy_commit() { fibers[current].groups.push_back({}); }
void copy_wait() {
    auto& groups = fibers[current].groups;
    while (groups.size() > 2) {
        for (const Pending& p : groups.front()) {
            if (p.valid) memcpy(p.to, p.from, 16);
            else memset(p.to, 0, 16);
        }
        groups.erase(groups.begin());
    }
}

unsigned rounded(float v) {
    unsigned u = __float_as_uint(v);
    if (v != v) return 0x7fff;
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
unsigned pack_bf16(float low, float high) { return rounded(low) | rounded(high) << 16; }

float from_f16(unsigned short bits) {
    unsigned sign = unsigned(bits >> 15) << 31, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    float v = exponent ? ldexpf(1024 + mantissa, int(exponent) - 25) : ldexpf(mantissa, -24);
    return sign ? -v : v;
}

}  // namespace

#pragma GCC diagnostic ignored "-Wunknown-pragmas"
#include "moe.cu"

namespace {

template <class... A> struct Call {
    void (*kernel)(A...);
    std::tuple<A...> args;
    static void run(void* self) {
        auto* call = static_cast<Call*>(self);
        std::apply(call->kernel, call->args);
    }
};

struct Request { unsigned across, down; const void* const* args; const size_t* sizes; size_t given; bool reversed; };

/// 0, or 2 if the arguments do not have the number and sizes of the kernel's.
template <class... A, size_t... I>
int launch_with(void (*kernel)(A...), const Request& r, std::index_sequence<I...>) {
    const size_t sizes[] = {sizeof(A)...};
    if (r.given != sizeof...(A)) return 2;
    for (size_t i = 0; i < r.given; i++) {
        if (sizes[i] != r.sizes[i]) return 2;
    }
    Call<A...> call{kernel, {*static_cast<const A*>(r.args[I])...}};
    body = Call<A...>::run;
    body_data = &call;
    static char* stacks = static_cast<char*>(malloc(WIDTH * STACK));
    unsigned blocks = r.across * r.down;
    for (unsigned i = 0; i < blocks; i++) {
        unsigned block = r.reversed ? blocks - 1 - i : i;
        blockIdx = {block % r.across, block / r.across, 0};
        run_block(stacks, r.reversed);
    }
    return 0;
}

template <class... A> int launch(void (*kernel)(A...), const Request& r) {
    return launch_with(kernel, r, std::index_sequence_for<A...>{});
}

}  // namespace

/// Runs a kernel: 0, 1 if there is none of this name, 2 if the arguments are not its own.
extern "C" int emulate_launch(
    const char* name, unsigned blocks_x, unsigned blocks_y, const void* const* args, const size_t* sizes, size_t given, int reversed)
{
    Request r{blocks_x, blocks_y, args, sizes, given, reversed != 0};
#define TRY(kernel) if (!strcmp(name, #kernel)) return launch(kernel, r);
#define TRY_EACH(kernel) TRY(kernel##_bf16) TRY(kernel##_f16) TRY(kernel##_f32)
    TRY(route) TRY(count) TRY(place) TRY(combine) TRY(gate_backward) TRY(outer)
    TRY_EACH(gate_up) TRY_EACH(down) TRY_EACH(down_backward) TRY_EACH(gate_up_backward)
    TRY_EACH(linear) TRY_EACH(linear_backward) TRY_EACH(gemv) TRY_EACH(decode_gate_up) TRY_EACH(decode_down)
    return 1;
}

/// `bytes` (a multiple of 16) that begin at a multiple of 16 and end where memory ends; filled with NaN.
extern "C" void* emulate_alloc(size_t bytes) {
    size_t page = size_t(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page;
    void* at = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    mprotect(static_cast<char*>(at) + whole, page, PROT_NONE);
    memset(at, 0xff, whole);
    return static_cast<char*>(at) + (whole - bytes);
}

extern "C" void emulate_free(void* at, size_t bytes) {
    size_t page = size_t(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page;
    munmap(static_cast<char*>(at) - (whole - bytes), whole + page);
}
