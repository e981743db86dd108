// Tensor cores of paper: the fragments of mma.m16n8k16 and ldmatrix, as PTX lays them out over the
// 32 lanes of a warp (PTX ISA, "Matrix fragments for mma.m16n8k16").
#pragma once
#define MAT_TENSOR_CORES

#include "cuda_runtime.h"

struct __half {};
struct __nv_bfloat16 {};

namespace mat {

template <typename T>
uint16_t rounded(float value);
template <typename T>
float widened(uint16_t bits);

template <>
inline uint16_t rounded<__half>(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
template <>
inline float widened<__half>(uint16_t bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
}
template <>
inline uint16_t rounded<__nv_bfloat16>(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest even
}
template <>
inline float widened<__nv_bfloat16>(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

template <typename T>
struct Pair {
    static uint32_t pack(float a, float b) {
        return rounded<T>(a) | static_cast<uint32_t>(rounded<T>(b)) << 16;
    }
    static void unpack(uint32_t pair, float& a, float& b) {
        a = widened<T>(static_cast<uint16_t>(pair));
        b = widened<T>(static_cast<uint16_t>(pair >> 16));
    }
};

// A number of a fragment that lane `lane` showed in word `word`, the lower or the upper half.
template <typename T>
float number(unsigned lane, int word, int upper) {
    const uint32_t pair = paper::shown(paper::warp() + lane, word);
    return widened<T>(static_cast<uint16_t>(upper ? pair >> 16 : pair));
}

template <typename T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    for (int i = 0; i < 4; ++i) paper::show(i, a[i]);
    paper::show(4, b0);
    paper::show(5, b1);
    paper::yield();
    const unsigned lane = paper::block.current % 32;
    for (int i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        for (unsigned k = 0; k < 16; ++k) {
            // a: word 0 holds rows 0–7 of the first eight columns, 1 rows 8–15, 2 and 3 the rest.
            const float x = number<T>(4 * (row % 8) + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2);
            const float y = number<T>(4 * column + k % 8 / 2, 4 + k / 8, k % 2);
            d[i] += x * y;
        }
    }
    paper::yield();
}

template <bool kTransposed>
void load_matrices(uint32_t (&b)[4], const void* row) {
    const uint64_t address = reinterpret_cast<uint64_t>(row);
    paper::show(0, static_cast<uint32_t>(address));
    paper::show(1, static_cast<uint32_t>(address >> 32));
    paper::yield();
    const unsigned lane = paper::block.current % 32;
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
        uint16_t halves[2];
        for (unsigned i = 0; i < 2; ++i) {
            const unsigned near = lane / 4, far = 2 * (lane % 4) + i;
            const unsigned from = paper::warp() + 8 * matrix + (kTransposed ? far : near);
            const uint64_t at =
                paper::shown(from, 0) | static_cast<uint64_t>(paper::shown(from, 1)) << 32;
            halves[i] = reinterpret_cast<const uint16_t*>(at)[kTransposed ? near : far];
        }
        b[matrix] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
    }
    paper::yield();
}

inline float exp2_of(float x) { return std::exp2(x); }

}  // namespace mat
