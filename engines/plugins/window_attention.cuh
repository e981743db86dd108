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
    const uint8_t* valid;  // [B, H·W], 1 valid; null where every token is
    void* y;
    uint8_t* propagated;   // [B, H·W], any valid token of the window; null where not wanted
    int batch, height, width;
    int heads, head_size;  // head_size even, at most kHeadRoom
    int window, shift;     // 8 or 16; 0 or half of it
    int q_stride, k_stride, v_stride, y_stride;
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
    __device__ int token(int place) const {
        int row = top + place / kSide + shift, column = left + place % kSide + shift;
        row -= row >= height ? height : 0;
        column -= column >= width ? width : 0;
        return row * width + column;
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
};

// -- half and bfloat16: on tensor cores ------------------------------------------------------------

// One head of one window's tokens, as 16 pairs a token, the last ones zero. Rows are 80 bytes
// apart: eight of them touch every bank once, and each begins on 16 bytes, as ldmatrix asks.
constexpr int kRowPairs = kHeadRoom / 2 + 4;

__device__ inline uint32_t pair_of(const void* tensor, int64_t element) {
    return __ldg(reinterpret_cast<const uint32_t*>(tensor) + element / 2);
}

// One block: a window, a head and 16 queries for each of its warps.
//   grid (windows · query tiles, heads, batch), block 32·kWarps
template <typename T, int kSide, int kWarps>
__global__ void __launch_bounds__(32 * kWarps) window_attention_mma(const WindowAttention p) {
    constexpr int kTokens = kSide * kSide;
    constexpr int kTiles = kTokens / (16 * kWarps);
    constexpr int kThreads = 32 * kWarps;
    __shared__ __align__(16) uint32_t keys[kTokens][kRowPairs];
    __shared__ __align__(16) uint32_t values[kTokens][kRowPairs];
    __shared__ float bias[kTokens];
    __shared__ uint8_t regions[kTokens];

    const int tile = blockIdx.x % kTiles, head = blockIdx.y, image = blockIdx.z;
    const Window<kSide> window(p, blockIdx.x / kTiles);
    const int tokens = p.height * p.width, pairs = p.head_size / 2;
    const int64_t first = static_cast<int64_t>(image) * tokens;

    // Keys, values, and what is added to their logits.
    for (int i = threadIdx.x; i < kTokens * (kHeadRoom / 2); i += kThreads) {
        const int place = i / (kHeadRoom / 2), pair = i % (kHeadRoom / 2);
        const int64_t token = first + window.token(place);
        const int64_t feature = head * p.head_size + 2 * pair;
        const bool inside = pair < pairs;
        keys[place][pair] = inside ? pair_of(p.k, token * p.k_stride + feature) : 0u;
        values[place][pair] = inside ? pair_of(p.v, token * p.v_stride + feature) : 0u;
    }
    int any = 0;
    for (int place = threadIdx.x; place < kTokens; place += kThreads) {
        const bool valid = p.valid == nullptr || p.valid[first + window.token(place)] != 0;
        bias[place] = valid ? 0.0f : kMaskedLogit;
        regions[place] = p.shift ? window.region(place) : 0;
        any |= valid;
    }
    any = __syncthreads_or(any);
    if (p.propagated != nullptr && head == 0 && tile == 0) {
        for (int place = threadIdx.x; place < kTokens; place += kThreads) {
            p.propagated[first + window.token(place)] = any ? 1 : 0;
        }
    }

    // Sixteen queries a warp; a lane holds pairs of rows `row` and `row + 8`.
    const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
    const int query = (tile * kWarps + threadIdx.x / 32) * 16 + row;
    const int64_t upper = first + window.token(query), lower = first + window.token(query + 8);
    uint32_t q[2][4];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int pair = 8 * step + 4 * half + column;
            const int64_t feature = head * p.head_size + 2 * pair;
            const bool inside = pair < pairs;
            q[step][2 * half] = inside ? pair_of(p.q, upper * p.q_stride + feature) : 0u;
            q[step][2 * half + 1] = inside ? pair_of(p.q, lower * p.q_stride + feature) : 0u;
        }
    }
    const int own[2] = {regions[query], regions[query + 8]};

    // Softmax as it goes: the largest logit so far, the sum, and the weighted values.
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    float mixed[kHeadRoom / 8][4] = {};
    for (int start = 0; start < kTokens; start += kChunk) {
        float logits[kChunk / 8][4];
#pragma unroll
        for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
            for (float& logit : logits[j]) logit = 0.0f;
            const uint32_t* key = keys[start + 8 * j + row];
            multiply<T>(logits[j], q[0], key[column], key[4 + column]);
            multiply<T>(logits[j], q[1], key[8 + column], key[12 + column]);
        }
        float peak[2] = {largest[0], largest[1]};
#pragma unroll
        for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int place = start + 8 * j + 2 * column + i % 2;
                logits[j][i] += bias[place];
                if (p.shift) logits[j][i] += regions[place] == own[i / 2] ? 0.0f : kMaskedLogit;
                peak[i / 2] = fmaxf(peak[i / 2], logits[j][i]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // the four lanes of a row
            peak[i] = fmaxf(peak[i], __shfl_xor_sync(0xffffffffu, peak[i], 1));
            peak[i] = fmaxf(peak[i], __shfl_xor_sync(0xffffffffu, peak[i], 2));
            const float rescale = __expf(largest[i] - peak[i]);  // 0 at first
            largest[i] = peak[i];
            sum[i] *= rescale;
#pragma unroll
            for (int n = 0; n < kHeadRoom / 8; ++n) {
                mixed[n][2 * i] *= rescale;
                mixed[n][2 * i + 1] *= rescale;
            }
        }
#pragma unroll
        for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                logits[j][i] = __expf(logits[j][i] - largest[i / 2]);
                sum[i / 2] += logits[j][i];
            }
        }
#pragma unroll
        for (int j = 0; j < kChunk / 16; ++j) {
            const uint32_t weights[4] = {Pair<T>::pack(logits[2 * j][0], logits[2 * j][1]),
                                         Pair<T>::pack(logits[2 * j][2], logits[2 * j][3]),
                                         Pair<T>::pack(logits[2 * j + 1][0], logits[2 * j + 1][1]),
                                         Pair<T>::pack(logits[2 * j + 1][2], logits[2 * j + 1][3])};
#pragma unroll
            for (int n = 0; n < kHeadRoom / 8; ++n) {
                uint32_t b0, b1;
                load_transposed(b0, b1, &values[start + 16 * j + lane % 16][4 * n]);
                multiply<T>(mixed[n], weights, b0, b1);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
        const float scale = 1.0f / sum[i];
        uint32_t* out = reinterpret_cast<uint32_t*>(p.y);
        const int64_t begin = (i ? lower : upper) * p.y_stride + head * p.head_size;
#pragma unroll
        for (int n = 0; n < kHeadRoom / 8; ++n) {
            const int pair = 4 * n + column;
            if (pair < pairs) {
                out[begin / 2 + pair] =
                    Pair<T>::pack(mixed[n][2 * i] * scale, mixed[n][2 * i + 1] * scale);
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
            const int64_t at = head * p.head_size + feature;
            const bool inside = feature < p.head_size;
            keys[key][feature] =
                inside ? static_cast<const float*>(p.k)[token * p.k_stride + at] : 0.0f;
            values[key][feature] =
                inside ? static_cast<const float*>(p.v)[token * p.v_stride + at] : 0.0f;
        }
        for (int key = threadIdx.x; key < kChunk; key += kQueries) {
            const int64_t token = first + window.token(start + key);
            const bool valid = p.valid == nullptr || p.valid[token] != 0;
            bias[key] = valid ? 0.0f : kMaskedLogit;
            regions[key] = p.shift ? window.region(start + key) : 0;
            any |= valid;
        }
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
    if (p.propagated != nullptr && head == 0) p.propagated[own] = any ? 1 : 0;
}

// -- mask propagation alone ------------------------------------------------------------------------

// After a block, every token of a window is valid if any token of it was.
//   grid (windows, batch), block kSide²
template <int kSide>
__global__ void __launch_bounds__(kSide * kSide) propagate_mask(const uint8_t* __restrict__ mask, uint8_t* __restrict__ out,
                               const WindowAttention p) {
    const Window<kSide> window(p, blockIdx.x);
    const int64_t token =
        static_cast<int64_t>(blockIdx.y) * p.height * p.width + window.token(threadIdx.x);
    const int any = __syncthreads_or(mask[token] != 0);
    out[token] = any ? 1 : 0;
}

}  // namespace mat
