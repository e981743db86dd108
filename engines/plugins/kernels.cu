// Launches the kernels of the .cuh files beside this one, after a look at what they are asked for.
#include "epilogue.cuh"
#include "kernels.h"
#include "token_norm.cuh"
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
            a.v_stride, a.y_stride, a.mask_type == MAT_MASK_INT32,
            a.y_padding};
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

// 0 if CUDA does not say.
int attribute_of_gpu(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    const bool known = cudaGetDevice(&device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
    return known ? value : 0;
}

bool is_mask_type(int32_t type) { return type == MAT_MASK_BYTE || type == MAT_MASK_INT32; }

bool before_ampere() {
    const int major = attribute_of_gpu(cudaDevAttrComputeCapabilityMajor);
    return major > 0 && major < 8;
}

int windows_of(const WindowAttention& p) { return (p.height / p.window) * (p.width / p.window); }

template <typename T, int kSide, int kTiles, int kSplits>
void launch_mma(const WindowAttention& p, cudaStream_t stream) {
    const dim3 grid(windows_of(p) * (kSide * kSide / (16 * kTiles)), p.heads, p.batch);
    constexpr int kThreads = 32 * kTiles * kSplits;
    start(mat::window_attention_mma<T, kSide, kTiles, kSplits>, grid, kThreads, stream, p);
}

// A window of 16 takes two blocks a head; where these would leave the GPU idle, it takes eight, whose
// warps share the keys.
template <typename T>
void launch_tensor_cores(const WindowAttention& p, cudaStream_t stream) {
    if (p.window == 8) return launch_mma<T, 8, 4, 1>(p, stream);
    const int64_t blocks = int64_t{2} * windows_of(p) * p.heads * p.batch;
    if (blocks < 2 * attribute_of_gpu(cudaDevAttrMultiProcessorCount)) {
        launch_mma<T, 16, 2, 4>(p, stream);
    } else {
        launch_mma<T, 16, 8, 1>(p, stream);
    }
}

template <int kSide>
void launch_fp32(const WindowAttention& p, cudaStream_t stream) {
    constexpr int kQueries = 64;
    const dim3 grid(windows_of(p) * (kSide * kSide / kQueries), p.heads, p.batch);
    start(mat::window_attention_fp32<kSide, kQueries>, grid, kQueries, stream, p);
}

template <typename Mask>
void launch_propagation(const void* from, void* to, int32_t batch, const WindowAttention& p,
                        cudaStream_t stream) {
    const auto* mask = static_cast<const Mask*>(from);
    auto* out = static_cast<Mask*>(to);
    const dim3 grid(windows_of(p), batch);
    if (p.window == 8) {
        start(mat::propagate_mask<8, Mask>, grid, 64, stream, mask, out, p);
    } else {
        start(mat::propagate_mask<16, Mask>, grid, 256, stream, mask, out, p);
    }
}

int ceiling(int a, int b) { return (a + b - 1) / b; }

bool lies_on(const void* place, int bytes) {
    return reinterpret_cast<uintptr_t>(place) % bytes == 0;
}

// Whether every map and every part by pixel lies on a multiple of bytes.
bool maps_lie_on(const MatEpilogue& p, int bytes) {
    return lies_on(p.x, bytes) && lies_on(p.y, bytes) && lies_on(p.parts[MAT_SKIP], bytes) &&
           lies_on(p.parts[MAT_NOISE], bytes) && lies_on(p.parts[MAT_RATIO], bytes);
}

dim3 channels_last_grid(const MatEpilogue& p, int rows) {
    const int items = ceiling(p.channels, mat::kGroup) * mat::grown(p, p.width);
    return dim3(ceiling(items, mat::kEpilogueThreads), ceiling(mat::grown(p, p.height), rows),
                p.batch);
}

// Long columns share more of what the filter reads; short ones are for maps that would leave the
// GPU idle.
template <typename T, bool kFilter, bool kBare>
void launch_channels_last(const MatEpilogue& p, cudaStream_t stream) {
    constexpr int kLong = 8, kShort = 2;
    const dim3 grid = channels_last_grid(p, kLong);
    const int64_t blocks = int64_t{1} * grid.x * grid.y * grid.z;
    if (blocks >= 8 * attribute_of_gpu(cudaDevAttrMultiProcessorCount)) {
        start(mat::epilogue_channels_last<T, kFilter, kBare, kLong>, grid, mat::kEpilogueThreads,
              stream, p);
    } else {
        start(mat::epilogue_channels_last<T, kFilter, kBare, kShort>,
              channels_last_grid(p, kShort), mat::kEpilogueThreads, stream, p);
    }
}

template <typename T, bool kFilter, int kCount>
void launch_linear(const MatEpilogue& p, cudaStream_t stream) {
    constexpr int kRows = 4;
    const int items = mat::grown(p, p.width) / kCount * ceiling(mat::grown(p, p.height), kRows);
    const dim3 grid(ceiling(items, mat::kEpilogueThreads), p.channels, p.batch);
    start(mat::epilogue_linear<T, kFilter, kCount, kRows>, grid, mat::kEpilogueThreads, stream, p);
}

// As many columns at once as the map's rows allow.
template <typename T, int kBytes>
void launch_linear(const MatEpilogue& p, cudaStream_t stream) {
    constexpr int kMost = 16 / kBytes;
    if (p.filter) {
        const bool pairs = (p.width | p.pad) % 2 == 0 && maps_lie_on(p, 2 * kBytes);
        return pairs ? launch_linear<T, true, 2>(p, stream) : launch_linear<T, true, 1>(p, stream);
    }
    const bool wide = p.width % kMost == 0 && maps_lie_on(p, 16);
    return wide ? launch_linear<T, false, kMost>(p, stream)
                : launch_linear<T, false, 1>(p, stream);
}

template <typename T>
void launch_half(const MatEpilogue& p, cudaStream_t stream) {
    if (p.layout == MAT_LINEAR) return launch_linear<T, 2>(p, stream);
    bool bare = p.filter && p.slope == 1.0f;
    for (const void* part : p.parts) bare = bare && part == nullptr;
    return bare       ? launch_channels_last<T, true, true>(p, stream)
           : p.filter ? launch_channels_last<T, true, false>(p, stream)
                      : launch_channels_last<T, false, false>(p, stream);
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
    if (!is_mask_type(a->mask_type)) return "masks are of bytes or of INT32";
    const int32_t least = a->heads * a->head_size;
    if (a->q_stride < least || a->k_stride < least || a->v_stride < least || a->y_stride < least) {
        return "a token's stride is at least heads times head size";
    }
    if ((a->q_stride | a->k_stride | a->v_stride | a->y_stride) % 2) {
        return "the strides of tokens are even";
    }
    if (a->y_padding < 0 || a->y_padding % 2 || a->y_padding > a->y_stride - least) {
        return "what is set to 0 behind a token is even and lies before the next one";
    }
    if (a->y_padding > 0 && a->type == MAT_FLOAT) return "FP32 sets nothing to 0 behind a token";
    return nullptr;
}

extern "C" int mat_attention(const MatAttention* a, cudaStream_t stream) {
    if (mat_attention_problem(a) != nullptr) return cudaErrorInvalidValue;
    if (a->type == MAT_BFLOAT16 && before_ampere()) return cudaErrorNotSupported;
    const WindowAttention p = of(*a);
    if (a->type == MAT_HALF) {
        launch_tensor_cores<__half>(p, stream);
    } else if (a->type == MAT_BFLOAT16) {
        launch_tensor_cores<__nv_bfloat16>(p, stream);
    } else if (a->window == 8) {
        launch_fp32<8>(p, stream);
    } else {
        launch_fp32<16>(p, stream);
    }
    return cudaGetLastError();
}

extern "C" int mat_propagate(const void* mask, void* out, int32_t batch, int32_t height,
                             int32_t width, int32_t window, int32_t shift, int32_t mask_type,
                             cudaStream_t stream) {
    if (grid_problem(batch, height, width, window, shift) != nullptr || mask == out ||
        !is_mask_type(mask_type)) {
        return cudaErrorInvalidValue;
    }
    WindowAttention p{};
    p.height = height;
    p.width = width;
    p.window = window;
    p.shift = shift_of(height, width, window, shift);
    if (mask_type == MAT_MASK_INT32) {
        launch_propagation<int32_t>(mask, out, batch, p, stream);
    } else {
        launch_propagation<uint8_t>(mask, out, batch, p, stream);
    }
    return cudaGetLastError();
}

extern "C" const char* mat_epilogue_problem(const MatEpilogue* e) {
    constexpr int kLargest = 32768;
    if (e->batch < 1 || e->batch > kLargest || e->channels < 1 || e->channels > kLargest) {
        return "batch and channels are from 1 to 32768";
    }
    if (e->filter != 0 && e->filter != 1) return "the filter is 0 or 1";
    if (e->pad < 0 || e->pad > 2 * e->filter) return "the filter's padding is from 0 to 2";
    for (const int side : {e->height, e->width}) {
        if (side < 1 || side > kLargest || mat::grown(*e, side) < 1) {
            return "a map's sides are from 1 to 32768, and the filter leaves some of them";
        }
    }
    if (e->type != MAT_FLOAT && e->type != MAT_HALF && e->type != MAT_BFLOAT16) {
        return "the type is FP32, FP16 or BF16";
    }
    if (e->layout != MAT_LINEAR && e->layout != MAT_CHANNELS_LAST) {
        return "maps are linear or have their channels last";
    }
    if (e->layout == MAT_CHANNELS_LAST) {
        if (e->type == MAT_FLOAT) return "maps with their channels last are of FP16 or BF16";
        if (!lies_on(e->x, 16) || !lies_on(e->y, 16) || !lies_on(e->parts[MAT_SKIP], 16)) {
            return "maps with their channels last lie on multiples of 16 bytes";
        }
    }
    return nullptr;
}

extern "C" int mat_epilogue(const MatEpilogue* e, cudaStream_t stream) {
    if (mat_epilogue_problem(e) != nullptr) return cudaErrorInvalidValue;
    if (e->type == MAT_HALF) {
        launch_half<__half>(*e, stream);
    } else if (e->type == MAT_BFLOAT16) {
        launch_half<__nv_bfloat16>(*e, stream);
    } else {
        launch_linear<float, 4>(*e, stream);
    }
    return cudaGetLastError();
}

extern "C" const char* mat_token_norm_problem(const MatTokenNorm* n) {
    constexpr int kLargest = 32768;
    for (const int side : {n->batch, n->channels, n->height, n->width}) {
        if (side < 1 || side > kLargest) return "the axes of a map are from 1 to 32768";
    }
    if (n->type != MAT_HALF && n->type != MAT_BFLOAT16) return "the type is FP16 or BF16";
    if (!(n->floor > 0.0f)) return "the norm's floor is above 0";
    if (!lies_on(n->x, 4) || !lies_on(n->y, 4)) return "maps lie on multiples of 4 bytes";
    return nullptr;
}

extern "C" int mat_token_norm(const MatTokenNorm* n, cudaStream_t stream) {
    if (mat_token_norm_problem(n) != nullptr) return cudaErrorInvalidValue;
    const int64_t tokens = int64_t{1} * n->batch * n->height * n->width;
    constexpr int kWarps = mat::kNormThreads / 32;
    const int64_t blocks = (tokens + kWarps - 1) / kWarps;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(blocks));
    if (n->type == MAT_HALF) {
        start(mat::token_norm<__half>, grid, mat::kNormThreads, stream, *n);
    } else {
        start(mat::token_norm<__nv_bfloat16>, grid, mat::kNormThreads, stream, *n);
    }
    return cudaGetLastError();
}
