// What the kernels ask of half precision and of tensor cores, from compute capability 7.5 on. No
// more of CUDA's assembly stands anywhere else, so that tests can run the kernels on a CPU with
// another form of this file.
#ifndef MAT_TENSOR_CORES
#define MAT_TENSOR_CORES

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace mat {

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
    __device__ static uint32_t pack(float a, float b) {
        const __half2 pair = __floats2half2_rn(a, b);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
    __device__ static void unpack(uint32_t pair, float& a, float& b) {
        const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
        a = both.x;
        b = both.y;
    }
};
template <>
struct Pair<__nv_bfloat16> {
    __device__ static uint32_t pack(float a, float b) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
    __device__ static void unpack(uint32_t pair, float& a, float& b) {
        a = __uint_as_float(pair << 16);
        b = __uint_as_float(pair & 0xffff0000u);
    }
};

// d += a·b: a [16, 16] by rows, b [16, 8] by columns, d [16, 8] in FP32.
template <typename T>
__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void multiply<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    // Turing multiplies eight deep.
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

template <>
__device__ inline void multiply<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    __trap();  // no such instruction before Ampere: the launcher refuses
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four 8×8 matrices of 16-bit numbers from shared memory: b of products. Eight lanes each give the
// addresses of a matrix's rows; a lane gets numbers 2c and 2c + 1 of row r, where c = lane mod 4 and
// r = lane / 4, or, transposed, of column r.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&b)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(address)
                     : "memory");
    }
}

// 2ˣ to two units in the last place, 0 where it is below FP32's normal numbers.
__device__ inline float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace mat

#endif
