// Products with weights as stored, and sparse dispatch, on CUDA.
//
// One file, no header: NVRTC compiles it without an include path, and `emulate.cpp` compiles it as C++ for the tests.
//
// Matrices are row-major. A stride `ld` counts elements. Weight rows are padded to 16 bytes, activation rows that are
// multiplied to 8 numbers, both with zeros. A pair is token * top_k + slot; a tile is up to 64 pairs of one expert:
// {expert, first, end, 0} with places in `order`. Sums are f32 and have a fixed order: no atomic additions.
//
// Each block has 128 threads.

typedef unsigned short u16;
typedef unsigned int u32;

#define THREADS 128
#define ALL 0xffffffffu
#define TILE_M 64
#define TILE_N 64
#define TILE_K 32
#define STRIDE_K (TILE_K + 8) /* of a row of 32: no two lanes of a fragment load meet in a bank */
#define STRIDE_N (TILE_N + 8)
#define MOST_EXPERTS 1024
#define MOST_TOKENS 8 /* of a product that goes row by row */

struct Bf16 { u16 bits; };
struct F16 { u16 bits; };
struct alignas(16) Vec4 { u32 x, y, z, w; };
struct alignas(16) Float4 { float x, y, z, w; };
struct alignas(8) Float2 { float x, y; };
struct Tile { u32 expert, first, end, unused; };

#ifndef MOE_EMULATED
/// c += a b: a 16x16 row-major, b 16x8 column-major, in fragments as the instruction spreads them over a warp.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// 16 bytes to shared memory, or as many zeros.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
    asm volatile("{ .reg .u64 wide; .reg .u32 narrow; cvta.to.shared.u64 wide, %0; cvt.u32.u64 narrow, wide;\n"
        "cp.async.cg.shared.global [narrow], [%1], 16, %2; }"
        :: "l"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits for all groups of copies but the last one.
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

/// Two numbers rounded to bf16, the first in the lower half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float from_f16(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#endif

__device__ __forceinline__ float widen(Bf16 w) { return __uint_as_float(u32(w.bits) << 16); }
__device__ __forceinline__ float widen(F16 w) { return from_f16(w.bits); }
__device__ __forceinline__ float widen(float w) { return w; }

/// 16 bytes of stored numbers, widened.
__device__ __forceinline__ void unpack(const Bf16* at, float (&out)[8]) {
    Vec4 v = *(const Vec4*)at;
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void unpack(const F16* at, float (&out)[8]) {
    Vec4 v = *(const Vec4*)at;
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = from_f16(u16(words[i] & 0xffffu));
        out[2 * i + 1] = from_f16(u16(words[i] >> 16));
    }
}
__device__ __forceinline__ void unpack(const float* at, float (&out)[4]) {
    Float4 v = *(const Float4*)at;
    out[0] = v.x; out[1] = v.y; out[2] = v.z; out[3] = v.w;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/// f(x) and f'(x); kind 0: silu, 1: gelu by tanh, 2: gelu by erf (Abramowitz and Stegun 7.1.26).
struct Curve { float value, slope; };
__device__ __forceinline__ Curve curve(float x, int kind) {
    // f(x) = x s(y), with the logistic function of y, or with the normal distribution.
    float y = x, dy = 1.0f;
    if (kind == 1) {
        y = 1.5957691216f * (x + 0.044715f * x * x * x);
        dy = 1.5957691216f * (1.0f + 0.134145f * x * x);
    }
    if (kind == 2) y = 0.5f * x * x;
    float e = expf(-y);
    if (kind != 2) {
        float s = 1.0f / (1.0f + e);
        return Curve{x / (1.0f + e), s + x * s * (1.0f - s) * dy};
    }
    float t = 1.0f / (1.0f + 0.2316418f * fabsf(x));
    float tail = 0.5f * e * t
        * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    float share = x >= 0.0f ? 1.0f - tail : tail;
    return Curve{x * share, share + x * 0.39894228040f * e};
}

/// The same sum in every lane.
__device__ __forceinline__ float warp_sum(float v) {
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(ALL, v, step);
    return v;
}
__device__ __forceinline__ u32 warp_sum(u32 v) {
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(ALL, v, step);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(ALL, v, step));
    return v;
}

/// Index of the largest value, the first among equals, in every lane.
__device__ __forceinline__ int warp_argmax(const float* values, int count, int lane) {
    float best = 0.0f;
    int at = 0x7fffffff;
    for (int i = lane; i < count; i += 32) {
        if (at == 0x7fffffff || values[i] > best) { best = values[i]; at = i; }
    }
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        float other = __shfl_xor_sync(ALL, best, step);
        int there = __shfl_xor_sync(ALL, at, step);
        bool take = there != 0x7fffffff
            && (at == 0x7fffffff || other > best || (other == best && there < at));
        if (take) { best = other; at = there; }
    }
    return at;
}

/* ---- routing and grouping ---- */

/// Experts of each token, one warp a token: scores over all experts, the k best, ties to the lower index, best first.
///
/// `bias` (or null) is added for the choice only. With groups > 0 only the `kept` groups with the largest best score can
/// be chosen. `bad` becomes the smallest index of a logit that is not finite; it begins as 0xffffffff.
extern "C" __global__ void __launch_bounds__(THREADS) route(
    const float* logits, int tokens, int experts, const float* bias, int k, int by_sigmoid, int renormalise, float scale,
    int groups, int kept, u32* ids, float* weights, u32* bad)
{
    __shared__ float choices[THREADS / 32][MOST_EXPERTS];
    __shared__ float bests[THREADS / 32][MOST_EXPERTS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int token = blockIdx.x * (THREADS / 32) + warp;
    if (token >= tokens) return;
    const float* z = logits + (size_t)token * experts;
    float* choice = choices[warp];
    float* best = bests[warp];
    float most = z[0];
    for (int e = lane; e < experts; e += 32) {
        if (!(fabsf(z[e]) <= 3.402823466e38f)) atomicMin(bad, (u32)token * experts + e);
        most = fmaxf(most, z[e]);
    }
    most = warp_max(most);
    float sum = 0.0f;
    for (int e = lane; e < experts; e += 32) sum += expf(z[e] - most);
    float inverse = by_sigmoid ? 0.0f : 1.0f / warp_sum(sum);
    for (int e = lane; e < experts; e += 32) {
        float score = by_sigmoid ? sigmoid(z[e]) : expf(z[e] - most) * inverse;
        choice[e] = bias ? score + bias[e] : score;
    }
    __syncwarp();
    const float ruled_out = -__uint_as_float(0x7f800000u);
    if (groups > 0) {
        int size = experts / groups;
        for (int g = lane; g < groups; g += 32) {
            float top = ruled_out;
            for (int i = 0; i < size; i++) top = fmaxf(top, choice[g * size + i]);
            best[g] = top;
        }
        __syncwarp();
        for (int i = 0; i < kept; i++) {
            int g = warp_argmax(best, groups, lane);
            __syncwarp();
            if (lane == 0) best[g] = ruled_out;
            __syncwarp();
        }
        // The groups chosen are those that have been ruled out of being chosen again.
        for (int e = lane; e < experts; e += 32) {
            if (best[e / size] != ruled_out) choice[e] = ruled_out;
        }
        __syncwarp();
    }
    float total = 0.0f;
    for (int slot = 0; slot < k; slot++) {
        int e = warp_argmax(choice, experts, lane);
        __syncwarp();
        float score = by_sigmoid ? sigmoid(z[e]) : expf(z[e] - most) * inverse;
        total += score;
        if (lane == 0) {
            choice[e] = ruled_out;
            ids[(size_t)token * k + slot] = e;
            weights[(size_t)token * k + slot] = score;
        }
        __syncwarp();
    }
    if (lane == 0) {
        total = renormalise ? fmaxf(total, 1.175494351e-38f) : 1.0f;
        for (int slot = 0; slot < k; slot++) {
            float* w = weights + (size_t)token * k + slot;
            *w = *w / total * scale;
        }
    }
}

/// Pairs of each expert, one warp an expert.
extern "C" __global__ void __launch_bounds__(THREADS) count(const u32* ids, int pairs, int experts, u32* counts) {
    int expert = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (expert >= experts) return;
    u32 found = 0;
    for (int pair = lane; pair < pairs; pair += 32) found += ids[pair] == (u32)expert;
    found = warp_sum(found);
    if (lane == 0) counts[expert] = found;
}

/// Puts the pairs in the order of their experts, one warp an expert: ballots keep the pairs of an expert in their order.
///
/// `order [pairs]`, `tiles [pairs / 64 + experts]`, `tile_count [1]`.
extern "C" __global__ void __launch_bounds__(THREADS) place(
    const u32* ids, const u32* counts, int pairs, int experts, u32* order, Tile* tiles, u32* tile_count)
{
    int expert = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (expert >= experts) return;
    u32 first = 0, tile = 0;
    for (int e = lane; e < expert; e += 32) {
        first += counts[e];
        tile += (counts[e] + TILE_M - 1) / TILE_M;
    }
    first = warp_sum(first);
    tile = warp_sum(tile);
    u32 end = first + counts[expert];
    u32 own = (end - first + TILE_M - 1) / TILE_M;
    for (u32 i = lane; i < own; i += 32) {
        u32 from = first + i * TILE_M;
        u32 to = from + TILE_M < end ? from + TILE_M : end;
        tiles[tile + i] = Tile{(u32)expert, from, to, 0};
    }
    if (expert == experts - 1 && lane == 0) *tile_count = tile + own;
    u32 at = first;
    for (int from = 0; from < pairs; from += 32) {
        int pair = from + lane;
        bool mine = pair < pairs && ids[pair] == (u32)expert;
        u32 all = __ballot_sync(ALL, mine);
        if (mine) order[at + __popc(all & ((1u << lane) - 1))] = pair;
        at += __popc(all);
    }
}

/// out[t] = sum over slots, in their order, of weights[t, slot] y[pair]; weights may be null: all 1.
extern "C" __global__ void __launch_bounds__(THREADS) combine(
    const float* y, int ldy, const float* weights, int k, int width, float* out)
{
    size_t token = blockIdx.x;
    for (int c = threadIdx.x; c < width; c += THREADS) {
        float sum = 0.0f;
        for (int slot = 0; slot < k; slot++) {
            size_t pair = token * k + slot;
            sum += (weights ? weights[pair] : 1.0f) * y[pair * ldy + c];
        }
        out[token * width + c] = sum;
    }
}

/* ---- tiles of 64 x 64 ---- */

/// Where the outputs of a thread lie in its tile: as mma leaves them, in every dtype.
__device__ __forceinline__ int out_row(int mi, int c) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return warp / 2 * 32 + mi * 16 + lane / 4 + c / 2 * 8;
}
__device__ __forceinline__ int out_col(int ni, int c) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return warp % 2 * 32 + ni * 8 + lane % 4 * 2 + c % 2;
}

/// Two copies of what a step of 32 along k needs: one is read while the other is filled.
template <int NB> struct Stages {
    alignas(16) float a[2][TILE_M * STRIDE_K];
    alignas(16) Bf16 b[2][NB][TILE_N * STRIDE_K];
};

/// acc[i] += rows b[i]^T, or with TURNED rows b[i]: b[i] is [n, k] or [k, n].
///
/// * `rows`: activation rows that this thread loads, row threadIdx.x / 8 + 16 i of the tile, null beyond its end
/// * `n0`: first of the 64 columns; columns beyond n give 0
/// * `exact`: activations as the sum of two bf16 numbers, which leaves an error of 2^-17; else as one
template <int NB, bool TURNED>
__device__ __forceinline__ void product(
    float (&acc)[NB][2][4][4], const float* const (&rows)[4], const Bf16* const (&b)[NB], int ldb, int n0, int n, int k, int exact)
{
    __shared__ Stages<NB> stages;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    auto load = [&](int step) {
        int stage = step & 1, k0 = step * TILE_K;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = thread / 8 + 16 * i, col = thread % 8 * 4;
            bool valid = rows[i] != nullptr && k0 + col < k;
            copy_async(&stages.a[stage][row * STRIDE_K + col], valid ? (const void*)(rows[i] + k0 + col) : (const void*)b[0], valid);
        }
        #pragma unroll
        for (int nb = 0; nb < NB; nb++) {
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                int row, col; // of the matrix
                Bf16* to;
                bool valid;
                if (TURNED) {
                    int r = thread / 8 + 16 * i, c = thread % 8 * 8;
                    row = k0 + r; col = n0 + c;
                    valid = row < k && col < n;
                    to = &stages.b[stage][nb][r * STRIDE_N + c];
                } else {
                    int r = thread / 4 + 32 * i, c = thread % 4 * 8;
                    row = n0 + r; col = k0 + c;
                    valid = row < n && col < k;
                    to = &stages.b[stage][nb][r * STRIDE_K + c];
                }
                copy_async(to, valid ? b[nb] + (size_t)row * ldb + col : b[nb], valid);
            }
        }
    };
    int steps = (k + TILE_K - 1) / TILE_K;
    load(0);
    copy_commit();
    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps) load(step + 1);
        copy_commit();
        copy_wait();
        __syncthreads();
        const float* a = stages.a[step & 1];
        #pragma unroll (TURNED || NB == 2 ? 1 : 2)
        for (int kk = 0; kk < TILE_K; kk += 16) {
            u32 high[2][4], low[2][4];
            #pragma unroll
            for (int mi = 0; mi < 2; mi++) {
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    int row = warp / 2 * 32 + mi * 16 + lane / 4 + i % 2 * 8, col = kk + lane % 4 * 2 + i / 2 * 8;
                    Float2 v = *(const Float2*)&a[row * STRIDE_K + col];
                    u32 rounded = pack_bf16(v.x, v.y);
                    high[mi][i] = rounded;
                    low[mi][i] = pack_bf16(v.x - __uint_as_float(rounded << 16), v.y - __uint_as_float(rounded & 0xffff0000u));
                }
            }
            #pragma unroll
            for (int nb = 0; nb < NB; nb++) {
                const Bf16* tile = stages.b[step & 1][nb];
                #pragma unroll
                for (int ni = 0; ni < 4; ni++) {
                    int col = warp % 2 * 32 + ni * 8 + lane / 4;
                    u32 part[2];
                    #pragma unroll
                    for (int i = 0; i < 2; i++) {
                        int along = kk + lane % 4 * 2 + i * 8;
                        part[i] = TURNED
                            ? u32(tile[along * STRIDE_N + col].bits) | u32(tile[(along + 1) * STRIDE_N + col].bits) << 16
                            : *(const u32*)&tile[col * STRIDE_K + along];
                    }
                    #pragma unroll
                    for (int mi = 0; mi < 2; mi++) {
                        mma_bf16(acc[nb][mi][ni], high[mi], part);
                        if (exact) mma_bf16(acc[nb][mi][ni], low[mi], part);
                    }
                }
            }
        }
        __syncthreads();
    }
}

/// As above for other dtypes, in plain f32; there is nothing to round, so `exact` changes nothing.
template <int NB, bool TURNED, class W>
__device__ __forceinline__ void product(
    float (&acc)[NB][2][4][4], const float* const (&rows)[4], const W* const (&b)[NB], int ldb, int n0, int n, int k, int)
{
    __shared__ float a_tile[TILE_M * STRIDE_K];
    __shared__ float b_tile[NB][TILE_N * (TILE_K + 1)];
    const int thread = threadIdx.x;
    for (int k0 = 0; k0 < k; k0 += TILE_K) {
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = thread / 8 + 16 * i, col = thread % 8 * 4;
            Float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
            if (rows[i] != nullptr && k0 + col < k) v = *(const Float4*)(rows[i] + k0 + col);
            *(Float4*)&a_tile[row * STRIDE_K + col] = v;
        }
        #pragma unroll
        for (int nb = 0; nb < NB; nb++) {
            #pragma unroll 1
            for (int i = thread; i < TILE_N * TILE_K; i += THREADS) {
                int r = TURNED ? i % TILE_N : i / TILE_K, c = TURNED ? i / TILE_N : i % TILE_K;
                bool valid = n0 + r < n && k0 + c < k;
                size_t at = TURNED ? (size_t)(k0 + c) * ldb + n0 + r : (size_t)(n0 + r) * ldb + k0 + c;
                b_tile[nb][r * (TILE_K + 1) + c] = valid ? widen(b[nb][at]) : 0.0f;
            }
        }
        __syncthreads();
        #pragma unroll 2
        for (int c = 0; c < TILE_K; c++) {
            #pragma unroll
            for (int nb = 0; nb < NB; nb++) {
                #pragma unroll
                for (int mi = 0; mi < 2; mi++) {
                    #pragma unroll
                    for (int ni = 0; ni < 4; ni++) {
                        #pragma unroll
                        for (int i = 0; i < 4; i++) {
                            acc[nb][mi][ni][i] += a_tile[out_row(mi, i) * STRIDE_K + c]
                                * b_tile[nb][out_col(ni, i) * (TILE_K + 1) + c];
                        }
                    }
                }
            }
        }
        __syncthreads();
    }
}

/// Calls `store(row, column, index of the accumulator)` for every output of the thread.
template <class Store> __device__ __forceinline__ void each_output(Store store) {
    #pragma unroll
    for (int mi = 0; mi < 2; mi++) {
        #pragma unroll
        for (int ni = 0; ni < 4; ni++) {
            #pragma unroll
            for (int c = 0; c < 4; c++) store(out_row(mi, c), out_col(ni, c), mi, ni, c);
        }
    }
}

/// h = f(x gate^T) x up^T in the order of the pairs; with `u` not null, g = x gate^T into h and x up^T into u.
template <class W>
__device__ __forceinline__ void gate_up(
    const float* x, int ldx, const W* gate, const W* up, int ldw, const u32* order, const Tile* tiles,
    const u32* tile_count, int k, int hidden, int inter, float* h, float* u, int ldh, int kind, int exact)
{
    if (blockIdx.x >= *tile_count) return;
    const Tile tile = tiles[blockIdx.x];
    const int n0 = blockIdx.y * TILE_N;
    const size_t whole = (size_t)tile.expert * inter * ldw;
    const float* rows[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 at = tile.first + threadIdx.x / 8 + 16 * i;
        rows[i] = at < tile.end ? x + (size_t)(order[at] / k) * ldx : nullptr;
    }
    float acc[2][2][4][4] = {};
    const W* const both[2] = {gate + whole, up + whole};
    product<2, false>(acc, rows, both, ldw, n0, inter, hidden, exact);
    each_output([&](int row, int col, int mi, int ni, int c) {
        size_t at = tile.first + row;
        if (at >= tile.end || n0 + col >= ldh) return;
        float g = acc[0][mi][ni][c], v = acc[1][mi][ni][c];
        if (u) {
            h[at * ldh + n0 + col] = g;
            u[at * ldh + n0 + col] = v;
        } else {
            h[at * ldh + n0 + col] = curve(g, kind).value * v;
        }
    });
}

/// y[pair] = h down^T.
template <class W>
__device__ __forceinline__ void down(
    const float* h, int ldh, const W* weight, int ldw, const u32* order, const Tile* tiles, const u32* tile_count,
    int hidden, int inter, float* y, int ldy, int exact)
{
    if (blockIdx.x >= *tile_count) return;
    const Tile tile = tiles[blockIdx.x];
    const int n0 = blockIdx.y * TILE_N;
    const float* rows[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 at = tile.first + threadIdx.x / 8 + 16 * i;
        rows[i] = at < tile.end ? h + (size_t)at * ldh : nullptr;
    }
    float acc[1][2][4][4] = {};
    const W* const one[1] = {weight + (size_t)tile.expert * hidden * ldw};
    product<1, false>(acc, rows, one, ldw, n0, hidden, inter, exact);
    each_output([&](int row, int col, int mi, int ni, int c) {
        u32 at = tile.first + row;
        if (at < tile.end && n0 + col < ldy) y[(size_t)order[at] * ldy + n0 + col] = acc[0][mi][ni][c];
    });
}

/// dh = d_out[token] down, in the order of the pairs.
template <class W>
__device__ __forceinline__ void down_backward(
    const float* d_out, int ldd, const W* weight, int ldw, const u32* order, const Tile* tiles, const u32* tile_count,
    int k, int hidden, int inter, float* dh, int ldh, int exact)
{
    if (blockIdx.x >= *tile_count) return;
    const Tile tile = tiles[blockIdx.x];
    const int n0 = blockIdx.y * TILE_N;
    const float* rows[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 at = tile.first + threadIdx.x / 8 + 16 * i;
        rows[i] = at < tile.end ? d_out + (size_t)(order[at] / k) * ldd : nullptr;
    }
    float acc[1][2][4][4] = {};
    const W* const one[1] = {weight + (size_t)tile.expert * hidden * ldw};
    product<1, true>(acc, rows, one, ldw, n0, inter, hidden, exact);
    each_output([&](int row, int col, int mi, int ni, int c) {
        size_t at = tile.first + row;
        if (at < tile.end && n0 + col < ldh) dh[at * ldh + n0 + col] = acc[0][mi][ni][c];
    });
}

/// dx[pair] = dg gate + du up.
template <class W>
__device__ __forceinline__ void gate_up_backward(
    const float* dg, const float* du, int ldh, const W* gate, const W* up, int ldw, const u32* order,
    const Tile* tiles, const u32* tile_count, int hidden, int inter, float* dx, int ldx, int exact)
{
    if (blockIdx.x >= *tile_count) return;
    const Tile tile = tiles[blockIdx.x];
    const int n0 = blockIdx.y * TILE_N;
    const size_t whole = (size_t)tile.expert * inter * ldw;
    float acc[1][2][4][4] = {};
    #pragma unroll 1
    for (int side = 0; side < 2; side++) {
        const float* from = side == 0 ? dg : du;
        const W* const one[1] = {(side == 0 ? gate : up) + whole};
        const float* rows[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 at = tile.first + threadIdx.x / 8 + 16 * i;
            rows[i] = at < tile.end ? from + (size_t)at * ldh : nullptr;
        }
        product<1, true>(acc, rows, one, ldw, n0, hidden, inter, exact);
    }
    each_output([&](int row, int col, int mi, int ni, int c) {
        u32 at = tile.first + row;
        if (at < tile.end && n0 + col < ldx) dx[(size_t)order[at] * ldx + n0 + col] = acc[0][mi][ni][c];
    });
}

/// out = x w^T + bias: w [n, k]; with TURNED out = x w: w [k, n]. Columns from n to ldo become 0.
template <bool TURNED, class W>
__device__ __forceinline__ void linear(
    const float* x, int ldx, const W* w, int ldw, const float* bias, int tokens, int n, int k, float* out, int ldo, int exact)
{
    const int m0 = blockIdx.x * TILE_M, n0 = blockIdx.y * TILE_N;
    const float* rows[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = m0 + threadIdx.x / 8 + 16 * i;
        rows[i] = row < tokens ? x + (size_t)row * ldx : nullptr;
    }
    float acc[1][2][4][4] = {};
    const W* const one[1] = {w};
    product<1, TURNED>(acc, rows, one, ldw, n0, n, k, exact);
    each_output([&](int row, int col, int mi, int ni, int c) {
        int at = m0 + row, column = n0 + col;
        if (at >= tokens || column >= ldo) return;
        float value = acc[0][mi][ni][c];
        if (bias && column < n) value += bias[column];
        out[(size_t)at * ldo + column] = value;
    });
}

/* ---- few tokens: one warp a weight row, the row read once ---- */

/// sum of this lane's share of row . x; both padded with zeros.
template <class W> __device__ __forceinline__ float share(const W* row, const float* x, int k, int lane) {
    const int each = 16 / sizeof(W);
    float sum = 0.0f;
    #pragma unroll 2
    for (int at = lane * each; at < k; at += 32 * each) {
        float w[16 / sizeof(W)];
        unpack(row + at, w);
        #pragma unroll
        for (int i = 0; i < each; i += 4) {
            Float4 v = *(const Float4*)(x + at + i);
            sum += w[i] * v.x + w[i + 1] * v.y + w[i + 2] * v.z + w[i + 3] * v.w;
        }
    }
    return sum;
}

/// out = x w^T + bias for at most MOST_TOKENS tokens.
template <class W>
__device__ __forceinline__ void gemv(
    const float* x, int ldx, const W* w, int ldw, const float* bias, int tokens, int n, int k, float* out, int ldo)
{
    const int each = 16 / sizeof(W);
    int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= n) return;
    const W* weights = w + (size_t)row * ldw;
    float sums[MOST_TOKENS] = {};
    #pragma unroll 2
    for (int at = lane * each; at < k; at += 32 * each) {
        float wide[16 / sizeof(W)];
        unpack(weights + at, wide);
        #pragma unroll
        for (int t = 0; t < MOST_TOKENS; t++) {
            if (t >= tokens) break;
            #pragma unroll
            for (int i = 0; i < each; i += 4) {
                Float4 v = *(const Float4*)(x + (size_t)t * ldx + at + i);
                sums[t] += wide[i] * v.x + wide[i + 1] * v.y + wide[i + 2] * v.z + wide[i + 3] * v.w;
            }
        }
    }
    #pragma unroll
    for (int t = 0; t < MOST_TOKENS; t++) {
        if (t >= tokens) break;
        float sum = warp_sum(sums[t]);
        if (lane == 0) out[(size_t)t * ldo + row] = sum + (bias ? bias[row] : 0.0f);
    }
}

/// h[pair] = f(gate x) up x for pair blockIdx.y: no sorting.
template <class W>
__device__ __forceinline__ void decode_gate_up(
    const float* x, int ldx, const W* gate, const W* up, int ldw, const u32* ids, int k, int hidden, int inter, float* h,
    int ldh, int kind)
{
    int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    size_t pair = blockIdx.y;
    if (row >= ldh) return;
    float out = 0.0f;
    if (row < inter) {
        size_t at = ((size_t)ids[pair] * inter + row) * ldw;
        const float* token = x + pair / k * ldx;
        float g = warp_sum(share(gate + at, token, hidden, lane));
        float u = warp_sum(share(up + at, token, hidden, lane));
        out = curve(g, kind).value * u;
    }
    if (lane == 0) h[pair * ldh + row] = out;
}

/// out[token] = sum over slots of weight times down h, for token blockIdx.y: the sum is part of the product.
template <class W>
__device__ __forceinline__ void decode_down(
    const float* h, int ldh, const W* weight, int ldw, const u32* ids, const float* weights, int k, int hidden, int inter,
    float* out)
{
    int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    size_t token = blockIdx.y;
    if (row >= hidden) return;
    float sum = 0.0f;
    for (int slot = 0; slot < k; slot++) {
        size_t pair = token * k + slot;
        size_t at = ((size_t)ids[pair] * hidden + row) * ldw;
        sum += weights[pair] * warp_sum(share(weight + at, h + pair * ldh, inter, lane));
    }
    if (lane == 0) out[token * hidden + row] = sum;
}

/* ---- backward, beside the products ---- */

/// From g, u and dh, in the order of the pairs, one warp a pair: d_weights[pair] = dh f(g) . u, then g = w dh u f'(g) and
/// u = w dh f(g), in place.
extern "C" __global__ void __launch_bounds__(THREADS) gate_backward(
    float* g, float* u, const float* dh, int ldh, const u32* order, const float* weights, int pairs, int inter,
    float* d_weights, int kind)
{
    int at = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (at >= pairs) return;
    u32 pair = order[at];
    float weight = weights[pair], sum = 0.0f;
    for (int i = lane; i < inter; i += 32) {
        size_t place = (size_t)at * ldh + i;
        Curve f = curve(g[place], kind);
        float up = u[place], d = dh[place], du = d * f.value;
        sum += du * up;
        g[place] = weight * (d * up * f.slope);
        u[place] = weight * du;
    }
    sum = warp_sum(sum);
    if (lane == 0) d_weights[pair] = sum;
}

/// out[i step_i + j step_j] = scale sum over n of a[n, i] b[n, j]: gradients of LoRA factors. i is blockIdx.y.
extern "C" __global__ void __launch_bounds__(THREADS) outer(
    const float* a, int lda, const float* b, int ldb, int count, int columns, float scale, float* out, int step_i,
    int step_j)
{
    int i = blockIdx.y, j = blockIdx.x * THREADS + threadIdx.x;
    if (j >= columns) return;
    float sum = 0.0f;
    #pragma unroll 4
    for (int n = 0; n < count; n++) sum += a[(size_t)n * lda + i] * b[(size_t)n * ldb + j];
    out[(size_t)i * step_i + (size_t)j * step_j] = scale * sum;
}

#define KERNELS(NAME, W)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) gate_up_##NAME(const float* x, int ldx, const W* gate,         \
        const W* up, int ldw, const u32* order, const Tile* tiles, const u32* tile_count, int k, int hidden, int inter,  \
        float* h, float* u, int ldh, int kind, int exact)                                                               \
    { gate_up<W>(x, ldx, gate, up, ldw, order, tiles, tile_count, k, hidden, inter, h, u, ldh, kind, exact); }           \
    extern "C" __global__ void __launch_bounds__(THREADS) down_##NAME(const float* h, int ldh, const W* weight, int ldw, \
        const u32* order, const Tile* tiles, const u32* tile_count, int hidden, int inter, float* y, int ldy, int exact) \
    { down<W>(h, ldh, weight, ldw, order, tiles, tile_count, hidden, inter, y, ldy, exact); }                            \
    extern "C" __global__ void __launch_bounds__(THREADS) down_backward_##NAME(const float* d_out, int ldd,             \
        const W* weight, int ldw, const u32* order, const Tile* tiles, const u32* tile_count, int k, int hidden,         \
        int inter, float* dh, int ldh, int exact)                                                                       \
    { down_backward<W>(d_out, ldd, weight, ldw, order, tiles, tile_count, k, hidden, inter, dh, ldh, exact); }           \
    extern "C" __global__ void __launch_bounds__(THREADS) gate_up_backward_##NAME(const float* dg, const float* du,     \
        int ldh, const W* gate, const W* up, int ldw, const u32* order, const Tile* tiles, const u32* tile_count,        \
        int hidden, int inter, float* dx, int ldx, int exact)                                                           \
    { gate_up_backward<W>(dg, du, ldh, gate, up, ldw, order, tiles, tile_count, hidden, inter, dx, ldx, exact); }        \
    extern "C" __global__ void __launch_bounds__(THREADS) linear_##NAME(const float* x, int ldx, const W* w, int ldw,    \
        const float* bias, int tokens, int n, int k, float* out, int ldo, int exact)                                    \
    { linear<false, W>(x, ldx, w, ldw, bias, tokens, n, k, out, ldo, exact); }                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) linear_backward_##NAME(const float* dy, int ldd, const W* w,   \
        int ldw, int tokens, int n, int k, float* dx, int ldx, int exact)                                               \
    { linear<true, W>(dy, ldd, w, ldw, nullptr, tokens, n, k, dx, ldx, exact); }                                         \
    extern "C" __global__ void __launch_bounds__(THREADS) gemv_##NAME(const float* x, int ldx, const W* w, int ldw,      \
        const float* bias, int tokens, int n, int k, float* out, int ldo)                                               \
    { gemv<W>(x, ldx, w, ldw, bias, tokens, n, k, out, ldo); }                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) decode_gate_up_##NAME(const float* x, int ldx, const W* gate,  \
        const W* up, int ldw, const u32* ids, int k, int hidden, int inter, float* h, int ldh, int kind)                \
    { decode_gate_up<W>(x, ldx, gate, up, ldw, ids, k, hidden, inter, h, ldh, kind); }                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) decode_down_##NAME(const float* h, int ldh, const W* weight,   \
        int ldw, const u32* ids, const float* weights, int k, int hidden, int inter, float* out)                        \
    { decode_down<W>(h, ldh, weight, ldw, ids, weights, k, hidden, inter, out); }

KERNELS(bf16, Bf16)
KERNELS(f16, F16)
KERNELS(f32, float)
