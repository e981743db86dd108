// What the kernels are called by: plain C, for plugins, PyTorch and tests alike.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum MatType { MAT_FLOAT = 0, MAT_HALF = 1, MAT_BFLOAT16 = 2 };

// The elements of masks: bytes, as PyTorch's bools are, or 32-bit integers. Any number but 0 is
// valid; what is written is 0 or 1.
enum MatMaskType { MAT_MASK_BYTE = 0, MAT_MASK_INT32 = 1 };

// Where things lie, in memory of the GPU. Strides are in elements, from token to token.
struct MatAttention {
    const void* q;             // [batch, height·width, heads·head_size], scaled by 1/√head_size
    const void* k;
    const void* v;
    const void* valid;         // [batch, height·width], a mask; NULL: all are valid
    void* y;                   // like q
    void* propagated;          // like valid: the mask behind the block; NULL: not wanted
    int32_t batch, height, width;
    int32_t heads, head_size;  // head_size even and at most 32
    int32_t window, shift;     // 8 or 16, dividing height and width; shift from 0 below window,
                               // and taken as 0 where one side is the window
    int32_t q_stride, k_stride, v_stride, y_stride;
    int32_t type;              // of q, k, v and y: a MatType
    int32_t mask_type;         // of valid and propagated: a MatMaskType
    int32_t y_padding;         // elements behind a token's heads in y that are set to 0, even; not
                               // of FP32
};

// Why a launch would be refused, in a sentence, or NULL if it would not.
const char* mat_attention_problem(const struct MatAttention* attention);

// Masked window attention on a stream. Returns a cudaError_t: cudaErrorInvalidValue for what
// mat_attention_problem names, else that of the launch. Allocates nothing and waits for nothing.
int mat_attention(const struct MatAttention* attention, cudaStream_t stream);

// Mask propagation alone: `out` (not `mask` itself) gets 1 for every token of a window that has a
// valid one. `mask_type` is a MatMaskType, of both.
int mat_propagate(const void* mask, void* out, int32_t batch, int32_t height, int32_t width,
                  int32_t window, int32_t shift, int32_t mask_type, cudaStream_t stream);

// The parts of an epilogue beside its map, in the order they come in; epilogue.cuh has the formula.
enum MatEpiloguePart {
    MAT_SCALE = 0,  // [batch or 1, channels]
    MAT_NOISE = 1,  // [batch or 1, height of y, width of y]
    MAT_BIAS = 2,   // like scale
    MAT_RATIO = 3,  // like noise
    MAT_SKIP = 4,   // like y, of a batch or one image
    MAT_STYLE = 5,  // like scale
    MAT_PARTS = 6
};

// How maps lie: [batch, channels, height, width], or [batch, height, width, channels] with the
// channels padded to a multiple of 8 (of FP16 and BF16 alone, on multiples of 16 bytes).
enum MatLayout { MAT_LINEAR = 0, MAT_CHANNELS_LAST = 1 };

// What stands between two convolutions. Everything is of one type.
struct MatEpilogue {
    const void* x;                 // a map
    const void* parts[MAT_PARTS];  // by MatEpiloguePart; NULL: not there
    void* y;                       // a map; a filter makes each side longer by 2·pad − 2
    int32_t batched[MAT_PARTS];    // whether a part has an entry for each image
    int32_t batch, channels, height, width;  // of x
    int32_t filter, pad;  // 1: [1, 2, 1] ⊗ [1, 2, 1]/16 on each channel, with up to 2 zeros around
    float gain, slope;    // of the filter; of negative numbers, where 1 leaves them
    int32_t type;         // a MatType
    int32_t layout;       // a MatLayout, of x, skip and y
};

// Tokens of length one, of maps with their channels last.
struct MatTokenNorm {
    const void* x;  // a map
    void* y;        // like x
    int32_t batch, channels, height, width;
    float floor;    // of the norm
    int32_t type;   // MAT_HALF or MAT_BFLOAT16
};

// Why a launch would be refused, in a sentence, or NULL if it would not.
const char* mat_token_norm_problem(const struct MatTokenNorm* norm);

// x/max(‖x‖₂, floor) on a stream, as mat_attention.
int mat_token_norm(const struct MatTokenNorm* norm, cudaStream_t stream);

// Why a launch would be refused, in a sentence, or NULL if it would not.
const char* mat_epilogue_problem(const struct MatEpilogue* epilogue);

// The epilogue on a stream, as mat_attention.
int mat_epilogue(const struct MatEpilogue* epilogue, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
