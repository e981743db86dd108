// What the operators' nodes say, checked once for every version of TensorRT.
//
//   mat::MaskedWindowAttention(q, k, v, mask; window, shift, heads) → y
//   mat::WindowAttention(q, k, v; window, shift, heads) → y
//   mat::MaskPropagation(mask; window, shift) → mask
//
// q, k, v, y: [B, H, W, heads·head_size]; mask: INT32 [B, 1, H, W], 0 where a token is not valid,
// since plugins have no bools (NvInferRuntimePlugin.h, PluginTensorDesc).
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace mat {

enum class Operator : int32_t { kMaskedAttention = 0, kAttention = 1, kPropagation = 2 };

constexpr char const* kNames[] = {"MaskedWindowAttention", "WindowAttention", "MaskPropagation"};
constexpr char const* kVersion = "1";
constexpr int kLargestSide = 1 << 15;  // of any axis, so that no product overflows

// One node's attributes; also what a serialized engine holds of them, so its layout stays.
struct Attributes {
    int32_t format = 1;  // of this struct
    Operator kind = Operator::kMaskedAttention;
    int32_t window = 0, shift = 0;
    int32_t heads = 0;  // of an attention

    int inputs() const {
        return kind == Operator::kMaskedAttention ? 4 : kind == Operator::kAttention ? 3 : 1;
    }

    // Whether a tensor of the node, counted from its first input on to its output, is a mask.
    bool is_mask(int position) const {
        return kind == Operator::kPropagation ||
               (kind == Operator::kMaskedAttention && position == 3);
    }

    // A sentence on what is wrong, or null.
    char const* problem() const {
        if (format != 1) return "the engine's plugin is of another version: build the engine again";
        if (kind < Operator::kMaskedAttention || kind > Operator::kPropagation) {
            return "the engine names an operator that this library does not have";
        }
        if (window != 8 && window != 16) return "attribute 'window' is 8 or 16";
        if (shift < 0 || shift >= window) return "attribute 'shift' is from 0 to below the window";
        if (kind != Operator::kPropagation && heads < 1) return "attribute 'heads' is from 1 up";
        return nullptr;
    }

    // Where an attribute of a node goes, or null: others (the grid's size) say nothing new.
    int32_t* find(char const* name) {
        if (std::strcmp(name, "window") == 0) return &window;
        if (std::strcmp(name, "shift") == 0) return &shift;
        if (std::strcmp(name, "heads") == 0) return &heads;
        return nullptr;
    }
};

static_assert(sizeof(Attributes) == 5 * sizeof(int32_t), "engines hold it as five numbers");

// A call on tensors [B, H, W, C], densely packed.
template <typename Shape>
MatAttention call_of(Attributes const& attributes, Shape const& q, int32_t type) {
    MatAttention call{};
    call.batch = static_cast<int32_t>(q.d[0]);
    call.height = static_cast<int32_t>(q.d[1]);
    call.width = static_cast<int32_t>(q.d[2]);
    call.heads = attributes.heads;
    const int32_t channels = static_cast<int32_t>(q.d[3]);
    call.head_size = channels / attributes.heads;
    call.window = attributes.window;
    call.shift = attributes.shift;
    call.q_stride = call.k_stride = call.v_stride = call.y_stride = channels;
    call.type = type;
    call.mask_type = MAT_MASK_INT32;
    return call;
}

// Why the shapes of a node's inputs do not fit each other or the kernels, in a sentence, or null.
template <typename Shape>
char const* shapes_problem(Attributes const& attributes, Shape const* shapes, int count) {
    if (count != attributes.inputs()) return "it has another number of inputs than its operator";
    for (int i = 0; i < count; ++i) {
        if (shapes[i].nbDims != 4) return "an input has not four axes";
        for (int j = 0; j < 4; ++j) {
            if (shapes[i].d[j] < 1) return "an input is empty";
            if (shapes[i].d[j] > kLargestSide) return "an axis of an input is above 32768";
        }
    }
    Shape const& first = shapes[0];
    if (attributes.kind == Operator::kPropagation) {
        if (first.d[1] != 1) return "the mask is [B, 1, H, W]";
        const bool tiled = first.d[2] % attributes.window == 0 &&
                           first.d[3] % attributes.window == 0;
        return tiled ? nullptr : "the window does not tile the grid";
    }
    for (int i = 1; i < 3; ++i) {
        for (int j = 0; j < 4; ++j) {
            if (shapes[i].d[j] != first.d[j]) return "q, k and v differ in shape";
        }
    }
    if (first.d[3] % attributes.heads) return "the features are no multiple of the heads";
    if (attributes.kind == Operator::kMaskedAttention) {
        Shape const& mask = shapes[3];
        if (mask.d[0] != first.d[0] || mask.d[1] != 1 || mask.d[2] != first.d[1] ||
            mask.d[3] != first.d[2]) {
            return "the mask is not [B, 1, H, W] of the grid of q";
        }
    }
    const MatAttention call = call_of(attributes, first, MAT_FLOAT);
    return mat_attention_problem(&call);
}

}  // namespace mat
