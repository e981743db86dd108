// Launches the kernels of window_attention.cuh, after a look at what they are asked for.
#include "kernels.h"
#include "window_attention.cuh"

namespace {

using mat::WindowAttention;

#ifdef __CUDACC__
template <typename... Arguments>
void start(void (*kernel)(Arguments...), dim3 grid, int block, cudaStream_t stream,
           Arguments... arguments) {
    kernel<<<grid, block, 0, stream>>>(arguments...);
}
#endif  // a test runs the kernels on a CPU, with a `start` of its own

// A grid of one row or column of windows is not shifted.
int shift_of(int32_t height, int32_t width, int32_t window, int32_t shift) {
    return height == window || width == window ? 0 : shift;
}

WindowAttention of(const MatAttention& a) {
    const int shift = shift_of(a.height, a.width, a.window, a.shift);
    return {a.q,      a.k,         a.v,      a.valid, a.y,        a.propagated, a.batch,   a.height,
            a.width,  a.heads,     a.head_size, a.window, shift, a.q_stride,  a.k_stride,
            a.v_stride, a.y_stride};
}

const char* grid_problem(int32_t batch, int32_t height, int32_t width, int32_t window,
                         int32_t shift) {
    if (window != 8 && window != 16) return "the window is 8 or 16";
    if (batch < 1 || batch > 65535) return "the batch is from 1 to 65535";
    if (height < window || width < window || height % window || width % window) {
        return "the window does not tile the grid";
    }
    if (shift < 0 || shift >= window) return "the shift is from 0 to below the window";
    return nullptr;
}

// Few windows are cut finer, so that there are enough blocks to fill a GPU.
template <typename T, int kSide>
void launch_mma(const WindowAttention& p, cudaStream_t stream) {
    constexpr int kWarps = kSide == 8 ? 4 : 2;
    constexpr int kTiles = kSide * kSide / (16 * kWarps);
    const int windows = (p.height / kSide) * (p.width / kSide);
    const dim3 grid(windows * kTiles, p.heads, p.batch);
    start(mat::window_attention_mma<T, kSide, kWarps>, grid, 32 * kWarps, stream, p);
}

template <int kSide>
void launch(const WindowAttention& p, int type, cudaStream_t stream) {
    if (type == MAT_HALF) {
        launch_mma<__half, kSide>(p, stream);
    } else if (type == MAT_BFLOAT16) {
        launch_mma<__nv_bfloat16, kSide>(p, stream);
    } else {
        constexpr int kQueries = 64;
        const int windows = (p.height / kSide) * (p.width / kSide);
        const dim3 grid(windows * (kSide * kSide / kQueries), p.heads, p.batch);
        start(mat::window_attention_fp32<kSide, kQueries>, grid, kQueries, stream, p);
    }
}

bool before_ampere() {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
               cudaSuccess &&
           major < 8;
}

}  // namespace

extern "C" const char* mat_attention_problem(const MatAttention* a) {
    const char* problem = grid_problem(a->batch, a->height, a->width, a->window, a->shift);
    if (problem != nullptr) return problem;
    if (a->heads < 1 || a->heads > 65535) return "the heads are from 1 to 65535";
    if (a->head_size < 2 || a->head_size > mat::kHeadRoom || a->head_size % 2) {
        return "the head size is even and at most 32";
    }
    if (a->type != MAT_FLOAT && a->type != MAT_HALF && a->type != MAT_BFLOAT16) {
        return "the type is FP32, FP16 or BF16";
    }
    const int32_t least = a->heads * a->head_size;
    if (a->q_stride < least || a->k_stride < least || a->v_stride < least || a->y_stride < least) {
        return "a token's stride is at least heads times head size";
    }
    if ((a->q_stride | a->k_stride | a->v_stride | a->y_stride) % 2) {
        return "the strides of tokens are even";
    }
    return nullptr;
}

extern "C" int mat_attention(const MatAttention* a, cudaStream_t stream) {
    if (mat_attention_problem(a) != nullptr) return cudaErrorInvalidValue;
    if (a->type == MAT_BFLOAT16 && before_ampere()) return cudaErrorNotSupported;
    const WindowAttention p = of(*a);
    if (a->window == 8) {
        launch<8>(p, a->type, stream);
    } else {
        launch<16>(p, a->type, stream);
    }
    return cudaGetLastError();
}

extern "C" int mat_propagate(const uint8_t* mask, uint8_t* out, int32_t batch, int32_t height,
                             int32_t width, int32_t window, int32_t shift, cudaStream_t stream) {
    if (grid_problem(batch, height, width, window, shift) != nullptr || mask == out) {
        return cudaErrorInvalidValue;
    }
    WindowAttention p{};
    p.height = height;
    p.width = width;
    p.window = window;
    p.shift = shift_of(height, width, window, shift);
    const dim3 grid((height / window) * (width / window), batch);
    if (window == 8) {
        start(mat::propagate_mask<8>, grid, 64, stream, mask, out, p);
    } else {
        start(mat::propagate_mask<16>, grid, 256, stream, mask, out, p);
    }
    return cudaGetLastError();
}
