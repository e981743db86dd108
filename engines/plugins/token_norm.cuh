// Tokens of length one, where the channels of a pixel lie side by side:
//
//   y = x / max(‖x‖₂, floor)      over the channels, in FP32
//
// A warp has a token, and reads it twice; the second time it comes from the cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"
#include "tensor_cores.cuh"

namespace mat {

constexpr int kNormThreads = 128;

//   grid ceil(tokens / warps), block kNormThreads
template <typename T>
__global__ void __launch_bounds__(kNormThreads) token_norm(const MatTokenNorm p) {
    const int64_t tokens = static_cast<int64_t>(p.batch) * p.height * p.width;
    const int64_t token =
        static_cast<int64_t>(blockIdx.x) * (kNormThreads / 32) + threadIdx.x / 32;
    if (token >= tokens) return;
    const int lane = threadIdx.x % 32, words = (p.channels + 7) / 8 * 4;
    const uint32_t* x = static_cast<const uint32_t*>(p.x) + token * words;
    uint32_t* y = static_cast<uint32_t*>(p.y) + token * words;
    // What lies behind the channels may be anything, and is 0 in the result.
    const auto read = [&](int word, float& a, float& b) {
        Pair<T>::unpack(x[word], a, b);
        if (2 * word >= p.channels) a = 0.0f;
        if (2 * word + 1 >= p.channels) b = 0.0f;
    };
    float sum = 0.0f;
    for (int word = lane; word < words; word += 32) {
        float a, b;
        read(word, a, b);
        sum = fmaf(a, a, fmaf(b, b, sum));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    const float norm = fmaxf(sqrtf(sum), p.floor);
    for (int word = lane; word < words; word += 32) {
        float a, b;
        read(word, a, b);
        y[word] = Pair<T>::pack(__fdividef(a, norm), __fdividef(b, norm));
    }
}

}  // namespace mat
