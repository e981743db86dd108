// Masked window attention and mask propagation: one kernel each, nothing materialised.
//
// Tokens of a feature grid lie as [B, H·W, heads·head_size]. The roll, the cut into windows, the
// region mask, the validity mask and the way back are index arithmetic:
//
//   y = softmax(q·kᵀ − 100·[regions differ] − 100·[key invalid]) · v      (window by window)
//
// The scale 1/√d is in q. A window without any valid token gets −100 on every key, so it attends to
// all of them alike. Source: "MAT: Mask-Aware Transformer for Large Hole Image Inpainting"
// (arXiv 2203.15270), section 3.3; the arithmetic follows mat_torch/attention.py.
#pragma once

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "tensor_cores.cuh"

namespace mat {

constexpr int kHeadRoom = 32;         // features of a head, padded with zeros inside the kernel
constexpr int kChunk = 64;            // keys between two rescalings of the running softmax
constexpr float kMaskedLogit = -100.0f;

// Where things lie and how the grid is cut. Strides are in elements, from token to token.
struct WindowAttention {
    const void* q;
    const void* k;
    const void* v;
    const void* valid;  // [B, H·W], not 0 where valid; null where every token is
    void* y;
    void* propagated;   // [B, H·W], any valid token of the window; null where not wanted
    int batch, height, width;
    int heads, head_size;  // head_size even, at most kHeadRoom
    int window, shift;     // 8 or 16; 0 or half of it
    int q_stride, k_stride, v_stride, y_stride;
    bool int_masks;  // masks are of int32_t, not of bytes
    int y_padding;   // elements behind a token's heads that are set to 0, even

    __device__ bool is_valid(int64_t token) const {
        if (valid == nullptr) return true;
        return int_masks ? static_cast<const int32_t*>(valid)[token] != 0
                         : static_cast<const uint8_t*>(valid)[token] != 0;
    }

    __device__ void propagate(int64_t token, bool any) const {
        if (int_masks) {
            static_cast<int32_t*>(propagated)[token] = any;
        } else {
            static_cast<uint8_t*>(propagated)[token] = any;
        }
    }
};

// The window a block works on, in the rolled grid.
template <int kSide>
struct Window {
    int top, left, height, width, shift;

    __device__ Window(const WindowAttention& p, int index)
        : top(index / (p.width / kSide) * kSide),
          left(index % (p.width / kSide) * kSide),
          height(p.height),
          width(p.width),
          shift(p.shift) {}

    // Token of the unrolled grid at a place of the window: rolled[i] is token (i + shift) mod side.
    __device__ int token(int place) const { return token(place / kSide, place % kSide); }

    __device__ int token(int down, int right) const {
        return wrapped(top + down, height) * width + wrapped(left + right, width);
    }

    __device__ int wrapped(int i, int length) const {
        i += shift;
        return i >= length ? i - length : i;
    }

    // Tokens attend within a region: rows are split at height − kSide and height − shift, columns
    // alike, since what was rolled in from the other border is no neighbour.
    __device__ int region(int place) const {
        const int row = top + place / kSide, column = left + place % kSide;
        return 3 * part(row, height) + part(column, width);
    }

    __device__ int part(int i, int length) const {
        return (i >= length - kSide) + (i >= length - shift);
    }

    // Whether it holds tokens of more than one region.
    __device__ bool crosses() const {
        return shift != 0 && (top + kSide == height || left + kSide == width);
    }
};

// A product that does not overflow, by one instruction.
__device__ inline int64_t wide(int a, int b) { return static_cast<int64_t>(a) * b; }

// -- half and bfloat16: on tensor cores ------------------------------------------------------------

// One head of one window's tokens, as 16 pairs a token, the last ones zero. Rows are 80 bytes
// apart: eight of them touch every bank once, and each begins on 16 bytes, as ldmatrix asks.
constexpr int kPairs = kHeadRoom / 2;
constexpr int kRowPairs = kPairs + 4;
constexpr float kLog2E = 1.4426950408889634f;

// What two neighbouring keys' logits are biased by, and the regions of those keys.
struct __align__(16) Marks {
    float bias[2], region[2];
};

// What one of the warps that share a tile's keys has at the end, by lane.
struct Part {
    float largest[2][32], sum[2][32], mixed[kHeadRoom / 8][4][32];
};

// One block: a window, a head and 16 queries for each of its kTiles. The keys of a tile's queries
// are shared out among kSplits warps, which put their parts together at the end.
//   grid (windows · kTokens / (16·kTiles), heads, batch), block 32·kTiles·kSplits
template <typename T, int kSide, int kTiles, int kSplits>
__global__ void __launch_bounds__(32 * kTiles * kSplits)
    window_attention_mma(const WindowAttention p) {
    constexpr int kTokens = kSide * kSide;
    constexpr int kBlocks = kTokens / (16 * kTiles);
    constexpr int kThreads = 32 * kTiles * kSplits;
    constexpr int kShare = kTokens / kSplits;  // keys of a warp
    static_assert(kTokens % (16 * kTiles) == 0 && kShare % kChunk == 0, "whole tiles and chunks");
    static_assert(kThreads == kPairs * kSide && kThreads >= kTokens, "threads load as below");
    __shared__ __align__(16) uint32_t keys[kTokens][kRowPairs];
    __shared__ __align__(16) uint32_t values[kTokens][kRowPairs];
    __shared__ Marks marks[kTokens / 2];

    const int block = blockIdx.x % kBlocks, head = blockIdx.y, image = blockIdx.z;
    const Window<kSide> window(p, blockIdx.x / kBlocks);
    const int pairs = p.head_size / 2;
    const int64_t first = static_cast<int64_t>(image) * p.height * p.width;
    const auto bytes_of = [&](const void* tensor, int stride) {  // of the image and the head
        return static_cast<const char*>(tensor) + 2 * (first * stride + head * p.head_size);
    };

    // Everything is asked for before anything is waited for. First keys and values, on their way to
    // shared memory: a thread has one pair of one column of the window. What is copied beyond the
    // head repeats its last pair: there the queries are zero and the results dropped.
    {
        const int pair = threadIdx.x % kPairs, right = threadIdx.x / kPairs;
        const int from = 4 * (pair < pairs ? pair : pairs - 1);
        const char* key = bytes_of(p.k, p.k_stride) + from;
        const char* value = bytes_of(p.v, p.v_stride) + from;
#pragma unroll 8
        for (int down = 0; down < kSide; ++down) {
            const int place = down * kSide + right, token = window.token(down, right);
            __pipeline_memcpy_async(&keys[place][pair], key + wide(token, 2 * p.k_stride), 4);
            __pipeline_memcpy_async(&values[place][pair], value + wide(token, 2 * p.v_stride), 4);
        }
        __pipeline_commit();
    }

    // Then the queries: 16 a warp, and a lane holds pairs of their rows `row` and `row + 8`.
    const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
    const int tile = threadIdx.x / (32 * kSplits), split = threadIdx.x / 32 % kSplits;
    const int query = (block * kTiles + tile) * 16 + row;
    const int token[2] = {window.token(query), window.token(query + 8)};
    uint32_t q[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const char* from = bytes_of(p.q, p.q_stride) + wide(token[i], 2 * p.q_stride) + 4 * column;
#pragma unroll
        for (int n = 0; n < kHeadRoom / 8; ++n) {
            const bool inside = 4 * n + column < pairs;
            q[n / 2][n % 2 * 2 + i] =
                inside ? __ldg(reinterpret_cast<const uint32_t*>(from + 16 * n)) : 0u;
        }
    }

    // And the mask.
    const int place = threadIdx.x;
    int any = 0;
    if (place < kTokens) {
        any = p.is_valid(first + window.token(place));
        marks[place / 2].bias[place % 2] = any ? 0.0f : kMaskedLogit;
        marks[place / 2].region[place % 2] = static_cast<float>(window.region(place));
    }
    __pipeline_wait_prior(0);
    any = __syncthreads_or(any);
    if (p.propagated != nullptr && head == 0 && block == 0 && place < kTokens) {
        p.propagate(first + window.token(place), any);
    }

    // Softmax as it goes: the largest logit so far, the sum, and the weighted values.
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    float mixed[kHeadRoom / 8][4] = {};
#pragma unroll 1
    for (int start = split * kShare; start < (split + 1) * kShare; start += kChunk) {
        float logits[kChunk / 8][4];
#pragma unroll
        for (int j = 0; j < kChunk / 8; ++j) {
            const Marks& mark = marks[start / 2 + 4 * j + column];
#pragma unroll
            for (int i = 0; i < 4; ++i) logits[j][i] = mark.bias[i % 2];
        }
        if (window.crosses()) {
            const float region[2] = {static_cast<float>(window.region(query)),
                                     static_cast<float>(window.region(query + 8))};
#pragma unroll
            for (int j = 0; j < kChunk / 8; ++j) {
                const Marks& mark = marks[start / 2 + 4 * j + column];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    logits[j][i] += mark.region[i % 2] != region[i / 2] ? kMaskedLogit : 0.0f;
                }
            }
        }
#pragma unroll
        for (int j = 0; j < kChunk / 8; ++j) {
            uint32_t key[4];
            load_matrices<false>(key, &keys[start + 8 * j + lane % 8][4 * (lane / 8)]);
            multiply<T>(logits[j], q[0], key[0], key[1]);
            multiply<T>(logits[j], q[1], key[2], key[3]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float peak = largest[i];
#pragma unroll
            for (int j = 0; j < kChunk / 8; ++j) {
                peak = fmaxf(peak, fmaxf(logits[j][2 * i], logits[j][2 * i + 1]));
            }
            peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));  // the four lanes of a row
            peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
            if constexpr (kShare > kChunk) {
                const float rescale = exp2_of((largest[i] - peak) * kLog2E);  // 0 at first
                sum[i] *= rescale;
#pragma unroll
                for (int n = 0; n < kHeadRoom / 8; ++n) {
                    mixed[n][2 * i] *= rescale;
                    mixed[n][2 * i + 1] *= rescale;
                }
            }
            largest[i] = peak;
            const float base = -peak * kLog2E;
#pragma unroll
            for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
                for (int c = 2 * i; c < 2 * i + 2; ++c) {
                    logits[j][c] = exp2_of(fmaf(logits[j][c], kLog2E, base));
                    sum[i] += logits[j][c];
                }
            }
        }
#pragma unroll
        for (int j = 0; j < kChunk / 16; ++j) {
            const uint32_t weights[4] = {Pair<T>::pack(logits[2 * j][0], logits[2 * j][1]),
                                         Pair<T>::pack(logits[2 * j][2], logits[2 * j][3]),
                                         Pair<T>::pack(logits[2 * j + 1][0], logits[2 * j + 1][1]),
                                         Pair<T>::pack(logits[2 * j + 1][2], logits[2 * j + 1][3])};
#pragma unroll
            for (int n = 0; n < kHeadRoom / 8; n += 2) {
                uint32_t value[4];
                load_matrices<true>(value,
                                    &values[start + 16 * j + lane % 16][4 * (n + lane / 16)]);
                multiply<T>(mixed[n], weights, value[0], value[1]);
                multiply<T>(mixed[n + 1], weights, value[2], value[3]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
    }

    // Warps that share keys show each other what they have, where the keys were; then each puts eight
    // features together.
    Part* parts = reinterpret_cast<Part*>(keys) + tile * kSplits;
    if constexpr (kSplits > 1) {
        static_assert(kSplits == kHeadRoom / 8, "eight features a warp");
        static_assert(kTiles * kSplits * sizeof(Part) <= sizeof(keys), "the parts fit there");
        __syncthreads();
        Part& part = parts[split];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            part.largest[i][lane] = largest[i];
            part.sum[i][lane] = sum[i];
        }
#pragma unroll
        for (int n = 0; n < kHeadRoom / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) part.mixed[n][i][lane] = mixed[n][i];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        char* to = const_cast<char*>(bytes_of(p.y, p.y_stride)) + wide(token[i], 2 * p.y_stride) +
                   4 * column;
        const auto write = [&](int n, float a, float b) {
            if (4 * n + column < pairs) {
                *reinterpret_cast<uint32_t*>(to + 16 * n) = Pair<T>::pack(a, b);
            }
        };
        if constexpr (kSplits == 1) {
            const float scale = __fdividef(1.0f, sum[i]);
#pragma unroll
            for (int n = 0; n < kHeadRoom / 8; ++n) {
                write(n, mixed[n][2 * i] * scale, mixed[n][2 * i + 1] * scale);
            }
        } else {
            float peak = parts[0].largest[i][lane];
#pragma unroll
            for (int s = 1; s < kSplits; ++s) peak = fmaxf(peak, parts[s].largest[i][lane]);
            float total = 0.0f, a = 0.0f, b = 0.0f;
#pragma unroll
            for (int s = 0; s < kSplits; ++s) {
                const Part& part = parts[s];
                const float weight = exp2_of((part.largest[i][lane] - peak) * kLog2E);
                total = fmaf(part.sum[i][lane], weight, total);
                a = fmaf(part.mixed[split][2 * i][lane], weight, a);
                b = fmaf(part.mixed[split][2 * i + 1][lane], weight, b);
            }
            write(split, __fdividef(a, total), __fdividef(b, total));
        }
        if (head == p.heads - 1 && split == 0) {
            char* behind = to + 2 * p.head_size;
            for (int c = 2 * column; c < p.y_padding; c += 8) {
                *reinterpret_cast<uint32_t*>(behind + 2 * (c - 2 * column)) = 0;
            }
        }
    }
}

// -- FP32: one thread a query ----------------------------------------------------------------------

//   grid (windows · query tiles, heads, batch), block kQueries
template <int kSide, int kQueries>
__global__ void __launch_bounds__(kQueries) window_attention_fp32(const WindowAttention p) {
    constexpr int kTokens = kSide * kSide;
    constexpr int kTiles = kTokens / kQueries;
    __shared__ float keys[kChunk][kHeadRoom];
    __shared__ float values[kChunk][kHeadRoom];
    __shared__ float bias[kChunk];
    __shared__ int regions[kChunk];

    const int tile = blockIdx.x % kTiles, head = blockIdx.y, image = blockIdx.z;
    const Window<kSide> window(p, blockIdx.x / kTiles);
    const int tokens = p.height * p.width, place = tile * kQueries + threadIdx.x;
    const int64_t first = static_cast<int64_t>(image) * tokens;
    const int64_t own = first + window.token(place);
    const float* q_of = static_cast<const float*>(p.q) + own * p.q_stride + head * p.head_size;
    const int region = p.shift ? window.region(place) : 0;

    float q[kHeadRoom], mixed[kHeadRoom];
#pragma unroll
    for (int i = 0; i < kHeadRoom; ++i) {
        q[i] = i < p.head_size ? q_of[i] : 0.0f;
        mixed[i] = 0.0f;
    }
    float largest = -INFINITY, sum = 0.0f;
    int any = 0;
    for (int start = 0; start < kTokens; start += kChunk) {
        __syncthreads();
        for (int i = threadIdx.x; i < kChunk * kHeadRoom; i += kQueries) {
            const int key = i / kHeadRoom, feature = i % kHeadRoom;
            const int64_t token = first + window.token(start + key);
            const int own = feature < p.head_size ? feature : p.head_size - 1;
            const int64_t at = head * p.head_size + own;  // what is beyond the head, q is zero for
            const float *k = static_cast<const float*>(p.k), *v = static_cast<const float*>(p.v);
            __pipeline_memcpy_async(&keys[key][feature], k + token * p.k_stride + at, 4);
            __pipeline_memcpy_async(&values[key][feature], v + token * p.v_stride + at, 4);
        }
        __pipeline_commit();
        for (int key = threadIdx.x; key < kChunk; key += kQueries) {
            const int64_t token = first + window.token(start + key);
            const bool valid = p.is_valid(token);
            bias[key] = valid ? 0.0f : kMaskedLogit;
            regions[key] = p.shift ? window.region(start + key) : 0;
            any |= valid;
        }
        __pipeline_wait_prior(0);
        __syncthreads();
        for (int key = 0; key < kChunk; ++key) {
            float logit = 0.0f;
#pragma unroll
            for (int i = 0; i < kHeadRoom; ++i) logit = fmaf(q[i], keys[key][i], logit);
            logit += bias[key];
            if (regions[key] != region) logit += kMaskedLogit;
            const float peak = fmaxf(largest, logit);
            const float rescale = expf(largest - peak), weight = expf(logit - peak);
            largest = peak;
            sum = fmaf(sum, rescale, weight);
#pragma unroll
            for (int i = 0; i < kHeadRoom; ++i) {
                mixed[i] = fmaf(mixed[i], rescale, weight * values[key][i]);
            }
        }
    }
    float* y = static_cast<float*>(p.y) + own * p.y_stride + head * p.head_size;
#pragma unroll
    for (int i = 0; i < kHeadRoom; ++i) {
        if (i < p.head_size) y[i] = mixed[i] / sum;
    }
    any = __syncthreads_or(any);
    if (p.propagated != nullptr && head == 0) p.propagate(own, any);
}

// -- mask propagation alone ------------------------------------------------------------------------

// After a block, every token of a window is valid if any token of it was.
//   grid (windows, batch), block kSide²
template <int kSide, typename Mask>
__global__ void __launch_bounds__(kSide * kSide)
    propagate_mask(const Mask* __restrict__ mask, Mask* __restrict__ out, const WindowAttention p) {
    const Window<kSide> window(p, blockIdx.x);
    const int64_t token =
        static_cast<int64_t>(blockIdx.y) * p.height * p.width + window.token(threadIdx.x);
    const int any = __syncthreads_or(mask[token] != 0);
    out[token] = any ? 1 : 0;
}

}  // namespace mat
