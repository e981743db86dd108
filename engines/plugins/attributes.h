// What the operators' nodes say, checked once for every version of TensorRT.
//
//   mat::MaskedWindowAttention(q, k, v, mask; window, shift, heads) → y
//   mat::WindowAttention(q, k, v; window, shift, heads) → y
//   mat::MaskPropagation(mask; window, shift) → mask
//
// q, k, v, y: [B, H, W, heads·head_size]; mask: bool [B, 1, H, W].
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace mat {

enum class Operator : int32_t { kMaskedAttention = 0, kAttention = 1, kPropagation = 2 };

constexpr char const* kNames[] = {"MaskedWindowAttention", "WindowAttention", "MaskPropagation"};
constexpr char const* kVersion = "1";

// One node's attributes; also what a serialized engine holds of them, so its layout stays.
struct Attributes {
    int32_t format = 1;  // of this struct
    Operator kind = Operator::kMaskedAttention;
    int32_t window = 0, shift = 0, heads = 1;

    int inputs() const {
        return kind == Operator::kMaskedAttention ? 4 : kind == Operator::kAttention ? 3 : 1;
    }

    // A sentence on what is wrong, or null.
    char const* problem() const {
        if (format != 1) return "the engine's plugin is of another version: build the engine again";
        if (kind < Operator::kMaskedAttention || kind > Operator::kPropagation) {
            return "the engine names an operator that this library does not have";
        }
        if (window != 8 && window != 16) return "attribute 'window' is 8 or 16";
        if (shift < 0 || shift >= window) return "attribute 'shift' is from 0 to below the window";
        if (heads < 1) return "attribute 'heads' is from 1 up";
        return nullptr;
    }

    // Takes an attribute of a node by its name; others (the grid's size) say nothing new.
    void take(char const* name, int32_t value) {
        if (std::strcmp(name, "window") == 0) window = value;
        if (std::strcmp(name, "shift") == 0) shift = value;
        if (std::strcmp(name, "heads") == 0) heads = value;
    }
};

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
    return call;
}

// Whether the shapes of a node's inputs fit each other and the kernels.
template <typename Shape>
bool shapes_fit(Attributes const& attributes, Shape const* shapes, int count) {
    if (count != attributes.inputs()) return false;
    for (int i = 0; i < count; ++i) {
        if (shapes[i].nbDims != 4) return false;
    }
    if (attributes.kind == Operator::kPropagation) {
        return shapes[0].d[1] == 1 && shapes[0].d[2] % attributes.window == 0 &&
               shapes[0].d[3] % attributes.window == 0;
    }
    for (int i = 1; i < 3; ++i) {
        for (int j = 0; j < 4; ++j) {
            if (shapes[i].d[j] != shapes[0].d[j]) return false;
        }
    }
    if (shapes[0].d[3] % attributes.heads) return false;
    if (attributes.kind == Operator::kMaskedAttention) {
        Shape const& mask = shapes[3];
        if (mask.d[0] != shapes[0].d[0] || mask.d[1] != 1 || mask.d[2] != shapes[0].d[1] ||
            mask.d[3] != shapes[0].d[2]) {
            return false;
        }
    }
    const MatAttention call = call_of(attributes, shapes[0], MAT_FLOAT);
    return mat_attention_problem(&call) == nullptr;
}

}  // namespace mat
