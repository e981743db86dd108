// One kernel for one kind of node, as TensorRT launches it by itself: a quickly deployable plugin
// (`quick.py`) is a name, PTX and a grid. Its parameters are the inputs, then 32-bit integers, then
// the output. Masks are of 32-bit integers too.
//
// Compiled once for each kind: MAT_OPERATOR is 0 (masked attention), 1 (attention) or 2 (mask
// propagation), MAT_WINDOW is 8 or 16, and MAT_TYPE is the element type of an attention.

// The kernels are called from others here, so they are device functions.
#include <type_traits>

#include "tensor_cores.cuh"
#pragma push_macro("__global__")
#pragma push_macro("__launch_bounds__")
#undef __global__
#undef __launch_bounds__
#define __global__ __device__
#define __launch_bounds__(...)
#include "window_attention.cuh"
#pragma pop_macro("__launch_bounds__")
#pragma pop_macro("__global__")

namespace {

// A grid of one row or column of windows is not shifted.
__device__ int shift_of(int height, int width, int shift) {
    return height == MAT_WINDOW || width == MAT_WINDOW ? 0 : shift;
}

}  // namespace

#if MAT_OPERATOR == 2

//   grid (windows, batch), block MAT_WINDOW²
extern "C" __global__ void __launch_bounds__(MAT_WINDOW * MAT_WINDOW)
    mat_quick(const int32_t* mask, int height, int width, int shift, int32_t* out) {
    mat::WindowAttention p{};
    p.height = height;
    p.width = width;
    p.window = MAT_WINDOW;
    p.shift = shift_of(height, width, shift);
    mat::propagate_mask<MAT_WINDOW, int32_t>(mask, out, p);
}

#else

namespace {

constexpr bool kSingle = std::is_same_v<MAT_TYPE, float>;
constexpr int kThreads = kSingle ? 64 : MAT_WINDOW == 8 ? 128 : 256;

// A window of 16 takes eight blocks a head, as small grids ask.
template <typename T>
__device__ void attend(const mat::WindowAttention& p) {
    if constexpr (kSingle) {
        mat::window_attention_fp32<MAT_WINDOW, 64>(p);
    } else if constexpr (MAT_WINDOW == 8) {
        mat::window_attention_mma<T, 8, 4, 1>(p);
    } else {
        mat::window_attention_mma<T, 16, 2, 4>(p);
    }
}

}  // namespace

//   FP32: grid (windows · MAT_WINDOW²/64, heads, batch)
//   else: grid (windows · 1 or 8, heads, batch)
extern "C" __global__ void __launch_bounds__(kThreads)
    mat_quick(const MAT_TYPE* q, const MAT_TYPE* k, const MAT_TYPE* v,
#if MAT_OPERATOR == 0
              const int32_t* valid,
#endif
              int height, int width, int heads, int head_size, int shift, MAT_TYPE* y) {
    mat::WindowAttention p{};
    p.q = q;
    p.k = k;
    p.v = v;
#if MAT_OPERATOR == 0
    p.valid = valid;
    p.int_masks = true;
#endif
    p.y = y;
    p.height = height;
    p.width = width;
    p.heads = heads;
    p.head_size = head_size;
    p.window = MAT_WINDOW;
    p.shift = shift_of(height, width, shift);
    p.q_stride = p.k_stride = p.v_stride = p.y_stride = heads * head_size;
    attend<MAT_TYPE>(p);
}

#endif
