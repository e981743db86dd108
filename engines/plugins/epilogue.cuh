// Everything between two convolutions in one pass over the map:
//
//   t = filter(x)                 [1, 2, 1] ⊗ [1, 2, 1]/16 · gain on each channel, zeros around
//   t = t·scale + noise + bias    scale and bias by channel, noise by pixel
//   t = leaky_relu(t)
//   y = (t·ratio + skip)·style    ratio by pixel, skip like y, style by channel
//
// Every part but x may be missing. The arithmetic is FP32's, and each result is rounded once. A
// thread goes down kRows rows of one column and keeps what it filtered along its last rows, so that
// memory gives x about once: what neighbouring threads read too comes from the caches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"
#include "tensor_cores.cuh"

namespace mat {

constexpr int kEpilogueThreads = 128;
constexpr int kGroup = 8;  // channels that lie side by side, 16 bytes

// A side of y.
__host__ __device__ inline int grown(const MatEpilogue& p, int side) {
    return p.filter ? side + 2 * p.pad - 2 : side;
}

// Where a part of an image begins, in elements: one image's, or the same for all.
__device__ inline int64_t begin_of(const MatEpilogue& p, int part, int image, int64_t size) {
    return p.batched[part] ? image * size : 0;
}

// -- numbers in memory, as FP32 --------------------------------------------------------------------

template <typename T, int kCount>
struct Numbers {  // of 16 bits
    static_assert(kCount % 2 == 0, "pairs");
    struct __align__(2 * kCount) Words {
        uint32_t pair[kCount / 2];
    };

    __device__ static Words load(const void* from, int64_t at) {
        return *reinterpret_cast<const Words*>(static_cast<const uint16_t*>(from) + at);
    }

    __device__ static void widen(const Words& words, float (&x)[kCount]) {
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            Pair<T>::unpack(words.pair[i], x[2 * i], x[2 * i + 1]);
        }
    }

    __device__ static void read(const void* from, int64_t at, float (&x)[kCount]) {
        widen(load(from, at), x);
    }

    __device__ static void write(void* to, int64_t at, const float (&x)[kCount]) {
        Words words;
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) words.pair[i] = Pair<T>::pack(x[2 * i], x[2 * i + 1]);
        *reinterpret_cast<Words*>(static_cast<uint16_t*>(to) + at) = words;
    }
};

template <typename T>
struct Numbers<T, 1> {
    __device__ static void read(const void* from, int64_t at, float (&x)[1]) {
        float none;
        Pair<T>::unpack(static_cast<const uint16_t*>(from)[at], x[0], none);
    }

    __device__ static void write(void* to, int64_t at, const float (&x)[1]) {
        static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(Pair<T>::pack(x[0], 0.0f));
    }
};

template <int kCount>
struct Numbers<float, kCount> {
    struct __align__(4 * kCount) Words {
        float number[kCount];
    };

    __device__ static void read(const void* from, int64_t at, float (&x)[kCount]) {
        const Words words = *reinterpret_cast<const Words*>(static_cast<const float*>(from) + at);
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i] = words.number[i];
    }

    __device__ static void write(void* to, int64_t at, const float (&x)[kCount]) {
        Words words;
#pragma unroll
        for (int i = 0; i < kCount; ++i) words.number[i] = x[i];
        *reinterpret_cast<Words*>(static_cast<float*>(to) + at) = words;
    }
};

template <>
struct Numbers<float, 1> {
    __device__ static void read(const void* from, int64_t at, float (&x)[1]) {
        x[0] = static_cast<const float*>(from)[at];
    }

    __device__ static void write(void* to, int64_t at, const float (&x)[1]) {
        static_cast<float*>(to)[at] = x[0];
    }
};

// Numbers of a part that may be missing, which then are all `none`.
template <typename T, int kCount>
__device__ inline void read_part(const void* part, int64_t at, float none, float (&x)[kCount]) {
    if (part != nullptr) return Numbers<T, kCount>::read(part, at, x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = none;
}

template <typename T>
__device__ inline float read_one(const void* part, int64_t at, float none) {
    float x[1];
    read_part<T, 1>(part, at, none, x);
    return x[0];
}

// -- arithmetic ------------------------------------------------------------------------------------

// The parts of a channel; missing ones are what changes nothing.
struct Factors {
    float scale, bias, style;
};

__device__ inline float finished(float t, const Factors& own, float noise, float slope, float ratio,
                                 float skip) {
    t = fmaf(t, own.scale, noise) + own.bias;
    t = t < 0.0f ? t * slope : t;
    return fmaf(t, ratio, skip) * own.style;
}

// What the filter's taps and its gain make of a sum of 1, 2, 1 by 1, 2, 1; without it, 1.
__device__ inline float weight_of(const MatEpilogue& p) { return p.filter ? p.gain / 16.0f : 1.0f; }

// -- channels last: eight channels of a pixel side by side -----------------------------------------

// Eight channels of a part by channel; those from `inside` on are nobody's.
template <typename T>
__device__ inline void read_channels(const void* part, int64_t at, int inside, float none,
                                     float (&x)[kGroup]) {
    const auto place = reinterpret_cast<uintptr_t>(part) + at * sizeof(uint16_t);
    if (part == nullptr || (inside == kGroup && place % (kGroup * sizeof(uint16_t)) == 0)) {
        return read_part<T, kGroup>(part, at, none, x);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = i < inside ? read_one<T>(part, at + i, none) : none;
}

// What a row of a column asks of memory; zeros outside the map.
template <typename T>
struct Sides {
    typename Numbers<T, kGroup>::Words skip;
    float noise, ratio;
};
template <typename T, int kTaps>
struct Row {
    typename Numbers<T, kGroup>::Words x[kTaps];
    Sides<T> sides;
};

// Maps are [B, H, W, C], C padded to a multiple of eight; there zeros are written. A row is asked
// for before the one above it is done with.
// kBare is for the filter and no other part, which takes fewer registers.
//   grid (columns · groups of channels / kEpilogueThreads, rows / kRows, batch)
template <typename T, bool kFilter, bool kBare, int kRows>
__global__ void __launch_bounds__(kEpilogueThreads) epilogue_channels_last(const MatEpilogue p) {
    using Eight = Numbers<T, kGroup>;
    constexpr int kTaps = kFilter ? 3 : 1;
    const int height = grown(p, p.height), width = grown(p, p.width);
    const int groups = (p.channels + kGroup - 1) / kGroup;
    const int item = blockIdx.x * kEpilogueThreads + threadIdx.x;
    if (item >= groups * width) return;
    const int group = item % groups, column = item / groups;
    const int first = blockIdx.y * kRows, image = blockIdx.z;
    const int left = p.channels - group * kGroup, inside = left < kGroup ? left : kGroup;
    const int64_t whole = static_cast<int64_t>(groups) * kGroup;  // channels in memory

    const float weight = weight_of(p);
    Factors own[kGroup];
    if constexpr (!kBare) {
        float scale[kGroup], bias[kGroup], style[kGroup];
        const auto read = [&](int part, float none, float(&x)[kGroup]) {
            const int64_t at = begin_of(p, part, image, p.channels) + group * kGroup;
            read_channels<T>(p.parts[part], at, inside, none, x);
        };
        read(MAT_SCALE, 1.0f, scale);
        read(MAT_BIAS, 0.0f, bias);
        read(MAT_STYLE, 1.0f, style);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) own[i] = {scale[i] * weight, bias[i], style[i]};
    }
    const int64_t pixels = static_cast<int64_t>(height) * width;
    const int64_t noise_at = begin_of(p, MAT_NOISE, image, pixels);
    const int64_t ratio_at = begin_of(p, MAT_RATIO, image, pixels);
    const int64_t x_at = static_cast<int64_t>(image) * p.height * p.width * whole + group * kGroup;
    const int64_t y_at = image * pixels * whole + group * kGroup;
    const int64_t skip_at = begin_of(p, MAT_SKIP, image, pixels * whole) + group * kGroup;

    // The i-th row of x, and the sides of the row of y that it completes.
    const auto fetch = [&](int i) {
        Row<T, kTaps> row{};
        const int from = kFilter ? first + i - p.pad : first + i;
        const int64_t line = x_at + static_cast<int64_t>(from) * p.width * whole;
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
            const int at = kFilter ? column + tap - p.pad : column;
            if (from >= 0 && from < p.height && at >= 0 && at < p.width) {
                row.x[tap] = Eight::load(p.x, line + at * whole);
            }
        }
        const int to = first + i - (kTaps - 1);
        row.sides.ratio = 1.0f;
        if (!kBare && i >= kTaps - 1 && to < height) {
            const int64_t pixel = static_cast<int64_t>(to) * width + column;
            if (p.parts[MAT_SKIP] != nullptr) {
                row.sides.skip = Eight::load(p.parts[MAT_SKIP], skip_at + pixel * whole);
            }
            row.sides.noise = read_one<T>(p.parts[MAT_NOISE], noise_at + pixel, 0.0f);
            row.sides.ratio = read_one<T>(p.parts[MAT_RATIO], ratio_at + pixel, 1.0f);
        }
        return row;
    };

    float above[2][kGroup] = {};  // the two rows before, filtered along themselves
    Row<T, kTaps> next = fetch(0);
#pragma unroll
    for (int i = 0; i < kRows + kTaps - 1; ++i) {
        const int to = first + i - (kTaps - 1);
        if (to >= height) break;
        float t[kGroup];
        Eight::widen(next.x[0], t);
#pragma unroll
        for (int tap = 1; tap < kTaps; ++tap) {
            float x[kGroup];
            Eight::widen(next.x[tap], x);
#pragma unroll
            for (int c = 0; c < kGroup; ++c) t[c] = fmaf(tap == 1 ? 2.0f : 1.0f, x[c], t[c]);
        }
        const Sides<T> sides = next.sides;
        if (i + 1 < kRows + kTaps - 1) next = fetch(i + 1);
        if (i >= kTaps - 1) {
            float skip[kGroup], y[kGroup];
            Eight::widen(sides.skip, skip);
#pragma unroll
            for (int c = 0; c < kGroup; ++c) {
                const float sum = kFilter ? fmaf(2.0f, above[1][c], above[0][c]) + t[c] : t[c];
                y[c] = kBare ? sum * weight
                             : finished(sum, own[c], sides.noise, p.slope, sides.ratio, skip[c]);
            }
            if (inside < kGroup) {
#pragma unroll
                for (int c = 0; c < kGroup; ++c) y[c] = c < inside ? y[c] : 0.0f;
            }
            Eight::write(p.y, y_at + (static_cast<int64_t>(to) * width + column) * whole, y);
        }
#pragma unroll
        for (int c = 0; c < kGroup; ++c) {
            above[0][c] = above[1][c];
            above[1][c] = t[c];
        }
    }
}

// -- linear: kCount columns of a channel side by side ----------------------------------------------

// Maps are [B, C, H, W]. With the filter kCount is 1, or 2 where width and padding are even;
// without it 1, or what 16 bytes hold where that divides the width.
//   grid (columns / kCount · rows / kRows / kEpilogueThreads, channels, batch)
template <typename T, bool kFilter, int kCount, int kRows>
__global__ void __launch_bounds__(kEpilogueThreads) epilogue_linear(const MatEpilogue p) {
    constexpr int kTaps = kFilter ? 3 : 1;
    constexpr int kSpan = kCount + kTaps - 1;          // columns of x
    constexpr int kRead = kFilter && kCount == 2 ? 2 : kFilter ? 1 : kCount;  // at once
    const int height = grown(p, p.height), width = grown(p, p.width);
    const int across = width / kCount;
    const int item = blockIdx.x * kEpilogueThreads + threadIdx.x;
    const int column = item % across * kCount, first = item / across * kRows;
    if (first >= height) return;
    const int channel = blockIdx.y, image = blockIdx.z;

    const auto read = [&](int part, float none) {
        const int64_t at = begin_of(p, part, image, p.channels) + channel;
        return read_one<T>(p.parts[part], at, none);
    };
    const Factors own = {read(MAT_SCALE, 1.0f) * weight_of(p), read(MAT_BIAS, 0.0f),
                         read(MAT_STYLE, 1.0f)};
    const int64_t pixels = static_cast<int64_t>(height) * width;
    const int64_t noise_at = begin_of(p, MAT_NOISE, image, pixels);
    const int64_t ratio_at = begin_of(p, MAT_RATIO, image, pixels);
    const int64_t plane = static_cast<int64_t>(image) * p.channels + channel;
    const int64_t x_at = plane * p.height * p.width, y_at = plane * pixels;
    const int64_t skip_at =
        begin_of(p, MAT_SKIP, image, p.channels * pixels) + channel * pixels;

    float above[2][kCount] = {};
#pragma unroll
    for (int i = 0; i < kRows + kTaps - 1; ++i) {
        const int row = first + i - (kTaps - 1);
        if (row >= height) break;
        const int from = kFilter ? first + i - p.pad : row;
        float t[kCount] = {};
        if (from >= 0 && from < p.height) {
            const int64_t line = x_at + static_cast<int64_t>(from) * p.width;
            float x[kSpan] = {};
#pragma unroll
            for (int j = 0; j < kSpan; j += kRead) {
                const int at = kFilter ? column + j - p.pad : column + j;
                if (at < 0 || at >= p.width) continue;
                float some[kRead];
                Numbers<T, kRead>::read(p.x, line + at, some);
#pragma unroll
                for (int k = 0; k < kRead; ++k) x[j + k] = some[k];
            }
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
                t[j] = kFilter ? x[j] + 2.0f * x[j + kTaps / 2] + x[j + kTaps - 1] : x[j];
            }
        }
        if (i >= kTaps - 1) {
            const int64_t pixel = static_cast<int64_t>(row) * width + column;
            float skip[kCount], noise[kCount], ratio[kCount], y[kCount];
            read_part<T, kCount>(p.parts[MAT_SKIP], skip_at + pixel, 0.0f, skip);
            read_part<T, kCount>(p.parts[MAT_NOISE], noise_at + pixel, 0.0f, noise);
            read_part<T, kCount>(p.parts[MAT_RATIO], ratio_at + pixel, 1.0f, ratio);
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
                const float sum = kFilter ? above[0][j] + 2.0f * above[1][j] + t[j] : t[j];
                y[j] = finished(sum, own, noise[j], p.slope, ratio[j], skip[j]);
            }
            Numbers<T, kCount>::write(p.y, y_at + pixel, y);
        }
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            above[0][j] = above[1][j];
            above[1][j] = t[j];
        }
    }
}

}  // namespace mat
