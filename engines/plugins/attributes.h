// What the operators' nodes say, checked once for every version of TensorRT.
//
//   mat::MaskedWindowAttention(q, k, v, mask; window, shift, heads) → y
//   mat::WindowAttention(q, k, v; window, shift, heads) → y
//   mat::MaskPropagation(mask; window, shift) → mask
//   mat::FusedEpilogue(x, parts…; filter, pad, gain, slope, scale, noise, bias, ratio, skip,
//                      style) → y
//
//   mat::MaskedMapAttention(query_key, value, mask; window, shift, heads) → y
//   mat::MapAttention(query_key, value; window, shift, heads) → y
//   mat::TokenNorm(x; floor) → y
//
// q, k, v, y: [B, H, W, heads·head_size]; mask: INT32 [B, 1, H, W], 0 where a token is not valid,
// since plugins have no bools (NvInferRuntimePlugin.h, PluginTensorDesc). The last three take and give
// maps [B, C, H, W], with twice the channels for queries and keys together. An epilogue's last six
// attributes are 0 or 1 each and say which parts follow x [B, C, H, W], in that order: skip
// [B or 1, C, H, W] like y, noise and ratio [B or 1, 1, H, W], the others [B or 1, C, 1, 1].
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace mat {

enum class Operator : int32_t {
    kMaskedAttention = 0,
    kAttention = 1,
    kPropagation = 2,
    kEpilogue = 3,
    kMaskedMapAttention = 4,
    kMapAttention = 5,
    kTokenNorm = 6
};

constexpr char const* kNames[] = {"MaskedWindowAttention", "WindowAttention", "MaskPropagation",
                                  "FusedEpilogue", "MaskedMapAttention", "MapAttention",
                                  "TokenNorm"};
constexpr char const* kPartNames[MAT_PARTS] = {"scale", "noise", "bias", "ratio", "skip", "style"};
constexpr int kMostInputs = 1 + MAT_PARTS;
constexpr char const* kVersion = "1";
constexpr int kLargestSide = 1 << 15;  // of any axis, so that no product overflows

// One node's attributes; also what a serialized engine holds of them, so its layout stays.
struct Attributes {
    int32_t format = 3;  // of this struct
    Operator kind = Operator::kMaskedAttention;
    int32_t window = 0, shift = -1;  // neither will do: a node has to give both
    int32_t heads = 0;              // of an attention; from here on of an epilogue
    int32_t filter = 0, pad = 0;
    int32_t parts[MAT_PARTS] = {};  // whether it has each, by MatEpiloguePart
    float gain = 1.0f, slope = 1.0f;
    float floor = 0.0f;             // of a norm

    bool is_epilogue() const { return kind == Operator::kEpilogue; }

    bool is_map_attention() const {
        return kind == Operator::kMaskedMapAttention || kind == Operator::kMapAttention;
    }

    // Whether its maps have their channels last, whatever else TensorRT would like.
    bool is_channels_last() const { return is_map_attention() || kind == Operator::kTokenNorm; }

    int inputs() const {
        switch (kind) {
            case Operator::kMaskedAttention: return 4;
            case Operator::kAttention: return 3;
            case Operator::kPropagation: return 1;
            case Operator::kMaskedMapAttention: return 3;
            case Operator::kMapAttention: return 2;
            case Operator::kTokenNorm: return 1;
            case Operator::kEpilogue: break;
        }
        int count = 1;
        for (const int32_t part : parts) count += part != 0;
        return count;
    }

    // Which part an input of an epilogue is, counted from the first behind x; MAT_PARTS for the
    // output.
    int part_at(int position) const {
        int part = 0;
        for (; part < MAT_PARTS; ++part) {
            if (parts[part] != 0 && --position == 0) break;
        }
        return part;
    }

    // Whether a tensor of an epilogue is a map, in the format of x.
    bool is_map(int position) const {
        const int part = part_at(position);
        return position == 0 || part == MAT_SKIP || part == MAT_PARTS;
    }

    // Whether a tensor of the node, counted from its first input on to its output, is a mask.
    bool is_mask(int position) const {
        return kind == Operator::kPropagation ||
               (kind == Operator::kMaskedAttention && position == 3) ||
               (kind == Operator::kMaskedMapAttention && position == 2);
    }

    // A sentence on what is wrong, or null.
    char const* problem() const {
        if (format != 3) return "the engine's plugin is of another version: build the engine again";
        if (kind < Operator::kMaskedAttention || kind > Operator::kTokenNorm) {
            return "the engine names an operator that this library does not have";
        }
        if (is_epilogue()) return epilogue_problem();
        if (kind == Operator::kTokenNorm) {
            return floor > 0.0f && std::isfinite(floor) ? nullptr : "attribute 'floor' is above 0";
        }
        if (window != 8 && window != 16) return "attribute 'window' is 8 or 16";
        if (shift < 0 || shift >= window) return "attribute 'shift' is from 0 to below the window";
        if (kind != Operator::kPropagation && heads < 1) return "attribute 'heads' is from 1 up";
        return nullptr;
    }

    char const* epilogue_problem() const {
        if (filter != 0 && filter != 1) return "attribute 'filter' is 0 or 1";
        if (pad < 0 || pad > 2 * filter) return "attribute 'pad' is from 0 to 2, of a filter";
        for (const int32_t part : parts) {
            if (part != 0 && part != 1) return "attributes that name a part are 0 or 1";
        }
        if (!std::isfinite(gain) || !std::isfinite(slope)) {
            return "attributes 'gain' and 'slope' are finite";
        }
        return nullptr;
    }

    // Where an attribute of a node goes, or null: others (the grid's size) say nothing new.
    int32_t* find(char const* name) {
        if (std::strcmp(name, "window") == 0) return &window;
        if (std::strcmp(name, "shift") == 0) return &shift;
        if (std::strcmp(name, "heads") == 0) return &heads;
        if (std::strcmp(name, "filter") == 0) return &filter;
        if (std::strcmp(name, "pad") == 0) return &pad;
        for (int i = 0; i < MAT_PARTS; ++i) {
            if (std::strcmp(name, kPartNames[i]) == 0) return &parts[i];
        }
        return nullptr;
    }

    // Likewise those that are no whole numbers.
    float* find_float(char const* name) {
        if (std::strcmp(name, "gain") == 0) return &gain;
        if (std::strcmp(name, "slope") == 0) return &slope;
        if (std::strcmp(name, "floor") == 0) return &floor;
        return nullptr;
    }
};

static_assert(sizeof(Attributes) == 16 * sizeof(int32_t), "engines hold it as sixteen words");

// A call on a grid of tokens, densely packed.
inline MatAttention call_of(Attributes const& attributes, int64_t batch, int64_t height,
                            int64_t width, int64_t channels, int32_t type) {
    MatAttention call{};
    call.batch = static_cast<int32_t>(batch);
    call.height = static_cast<int32_t>(height);
    call.width = static_cast<int32_t>(width);
    call.heads = attributes.heads;
    call.head_size = static_cast<int32_t>(channels) / attributes.heads;
    call.window = attributes.window;
    call.shift = attributes.shift;
    call.q_stride = call.k_stride = call.v_stride = call.y_stride = static_cast<int32_t>(channels);
    call.type = type;
    call.mask_type = MAT_MASK_INT32;
    return call;
}

// Whether a mask is [B, 1, H, W] of a grid.
template <typename Shape>
bool is_mask_of(Shape const& mask, int64_t batch, int64_t height, int64_t width) {
    return mask.d[0] == batch && mask.d[1] == 1 && mask.d[2] == height && mask.d[3] == width;
}

// On tensors [B, H, W, C].
template <typename Shape>
MatAttention token_call_of(Attributes const& attributes, Shape const& q, int32_t type) {
    return call_of(attributes, q.d[0], q.d[1], q.d[2], q.d[3], type);
}

// Channels that a pixel of a map has in memory where they come last.
inline int32_t padded(int64_t channels) { return static_cast<int32_t>((channels + 7) / 8 * 8); }

// A call on maps with their channels last: queries and keys together, and values.
template <typename Shape>
MatAttention map_call_of(Attributes const& attributes, Shape const* shapes, int32_t type) {
    Shape const& value = shapes[1];
    const int32_t channels = static_cast<int32_t>(value.d[1]);
    MatAttention call =
        call_of(attributes, value.d[0], value.d[2], value.d[3], channels, type);
    call.q_stride = call.k_stride = padded(2 * channels);
    call.v_stride = call.y_stride = padded(channels);
    call.y_padding = padded(channels) - channels;
    return call;
}

template <typename Shape>
char const* map_shapes_problem(Attributes const& attributes, Shape const* shapes) {
    Shape const &both = shapes[0], &value = shapes[1];
    if (both.d[0] != value.d[0] || both.d[1] != 2 * value.d[1] || both.d[2] != value.d[2] ||
        both.d[3] != value.d[3]) {
        return "queries and keys are not [B, 2C, H, W] of the values' [B, C, H, W]";
    }
    if (value.d[1] % attributes.heads) return "the features are no multiple of the heads";
    if (attributes.kind == Operator::kMaskedMapAttention) {
        if (!is_mask_of(shapes[2], value.d[0], value.d[2], value.d[3])) {
            return "the mask is not [B, 1, H, W] of the values' grid";
        }
    }
    const MatAttention call = map_call_of(attributes, shapes, MAT_HALF);
    return mat_attention_problem(&call);
}

// An epilogue on tensors of these shapes, none of which it has the address of.
template <typename Shape>
MatEpilogue epilogue_of(Attributes const& attributes, Shape const* shapes, int32_t type,
                        int32_t layout) {
    MatEpilogue call{};
    call.batch = static_cast<int32_t>(shapes[0].d[0]);
    call.channels = static_cast<int32_t>(shapes[0].d[1]);
    call.height = static_cast<int32_t>(shapes[0].d[2]);
    call.width = static_cast<int32_t>(shapes[0].d[3]);
    call.filter = attributes.filter;
    call.pad = attributes.pad;
    call.gain = attributes.gain;
    call.slope = attributes.slope;
    call.type = type;
    call.layout = layout;
    for (int i = 1; i < attributes.inputs(); ++i) {
        call.batched[attributes.part_at(i)] = shapes[i].d[0] == shapes[0].d[0];
    }
    return call;
}

template <typename Shape>
char const* epilogue_shapes_problem(Attributes const& attributes, Shape const* shapes) {
    const MatEpilogue call = epilogue_of(attributes, shapes, MAT_FLOAT, MAT_LINEAR);
    char const* problem = mat_epilogue_problem(&call);
    if (problem != nullptr) return problem;
    const int more = attributes.filter ? 2 * attributes.pad - 2 : 0;
    for (int i = 1; i < attributes.inputs(); ++i) {
        const int part = attributes.part_at(i);
        const bool by_pixel = part == MAT_NOISE || part == MAT_RATIO, map = part == MAT_SKIP;
        Shape const& own = shapes[i];
        if ((own.d[0] != 1 && own.d[0] != shapes[0].d[0]) ||
            own.d[1] != (by_pixel ? 1 : shapes[0].d[1]) ||
            own.d[2] != (by_pixel || map ? shapes[0].d[2] + more : 1) ||
            own.d[3] != (by_pixel || map ? shapes[0].d[3] + more : 1)) {
            return map        ? "skip is not [B or 1, C, H, W] of the result"
                   : by_pixel ? "noise or ratio is not [B or 1, 1, H, W] of the result"
                              : "scale, bias or style is not [B or 1, C, 1, 1]";
        }
    }
    return nullptr;
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
    if (attributes.is_epilogue()) return epilogue_shapes_problem(attributes, shapes);
    if (attributes.is_map_attention()) return map_shapes_problem(attributes, shapes);
    if (attributes.kind == Operator::kTokenNorm) return nullptr;
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
        if (!is_mask_of(shapes[3], first.d[0], first.d[1], first.d[2])) {
            return "the mask is not [B, 1, H, W] of the grid of q";
        }
    }
    const MatAttention call = token_call_of(attributes, first, MAT_FLOAT);
    return mat_attention_problem(&call);
}

}  // namespace mat
