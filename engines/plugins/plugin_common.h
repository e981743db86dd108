// What the plugins of every TensorRT share: types, fields, the call of the kernels, the registry.
//
// The library is not linked with TensorRT, so that it opens without one; it finds the one that the
// process has loaded.
#pragma once

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>

#include "attributes.h"

#define MAT_EXPORT extern "C" __attribute__((visibility("default")))

#define MAT_TEXT_OF(x) #x
#define MAT_TEXT(x) MAT_TEXT_OF(x)

namespace mat {

inline char const* name_of(Operator kind) { return kNames[static_cast<int32_t>(kind)]; }

// -- the TensorRT of this process

// A symbol of the TensorRT that this process has loaded, or null. Its classes are laid out anew in
// every major version, so that only the one of our headers will do.
template <typename Function>
Function tensorrt_symbol(char const* name) noexcept {
    void* const places[] = {
        RTLD_DEFAULT, dlopen("libnvinfer.so." MAT_TEXT(NV_TENSORRT_MAJOR), RTLD_LAZY | RTLD_NOLOAD),
        dlopen("libnvinfer_lean.so." MAT_TEXT(NV_TENSORRT_MAJOR), RTLD_LAZY | RTLD_NOLOAD)};
    for (void* place : places) {  // a library that is not loaded is null, which is RTLD_DEFAULT
        auto version = reinterpret_cast<int32_t (*)()>(dlsym(place, "getInferLibVersion"));
        if (version == nullptr) continue;
        const int32_t number = version();  // 8601 and before, 101401 since
        const int32_t major = number / (number < 10000 ? 1000 : 10000);
        if (major == NV_TENSORRT_MAJOR) return reinterpret_cast<Function>(dlsym(place, name));
    }
    return nullptr;
}

// -- what goes wrong

// Finds the logger of whatever TensorRT is doing, once TensorRT has handed it over.
inline std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

// TensorRT's logger, or null: of the engine that asks if TensorRT opened this library, else the one
// of the process.
inline nvinfer1::ILogger* find_logger() noexcept {
    nvinfer1::ILoggerFinder* finder = logger_finder.load();
    if (finder != nullptr) return finder->findLogger();
    auto find = tensorrt_symbol<nvinfer1::ILogger* (*)()>("getLogger");
    return find == nullptr ? nullptr : find();
}

// A sentence to TensorRT's logger, if there is one. Allocates nothing.
inline void complain(Operator kind, char const* problem) noexcept {
    nvinfer1::ILogger* logger = find_logger();
    if (logger == nullptr) return;
    char line[256];
    std::snprintf(line, sizeof line, "mat::%s: %s", name_of(kind), problem);
    logger->log(nvinfer1::ILogger::Severity::kERROR, line);
}

// -- types

// A MatType, or -1 where the kernels do not have it.
inline int32_t type_of(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kFLOAT: return MAT_FLOAT;
        case nvinfer1::DataType::kHALF: return MAT_HALF;
#if NV_TENSORRT_MAJOR >= 10
        case nvinfer1::DataType::kBF16: return MAT_BFLOAT16;
#endif
        default: return -1;
    }
}

// Whether a tensor of a node may be so, given the first one: packed, masks of INT32, and everything
// else of one type. Maps of an epilogue may all have eight channels of a pixel side by side, as
// convolutions in half precision like it; where maps stand for tokens they must.
inline bool supports(Attributes const& attributes, int32_t position,
                     nvinfer1::PluginTensorDesc const& own,
                     nvinfer1::PluginTensorDesc const& first) {
    if (attributes.is_epilogue() && attributes.is_map(position)) {
        const bool last = own.format == nvinfer1::TensorFormat::kHWC8 && type_of(own.type) > 0;
        if (own.format != nvinfer1::TensorFormat::kLINEAR && !last) return false;
        return type_of(own.type) >= 0 && own.type == first.type && own.format == first.format;
    }
    if (attributes.is_channels_last() && !attributes.is_mask(position)) {
        return own.format == nvinfer1::TensorFormat::kHWC8 && type_of(own.type) > 0 &&
               own.type == first.type;
    }
    if (own.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (attributes.is_mask(position)) return own.type == nvinfer1::DataType::kINT32;
    return type_of(own.type) >= 0 && own.type == first.type;
}

// -- a node's attributes

// The names that a creator asks for.
class FieldNames {
   public:
    explicit FieldNames(Operator kind) {
        for (nvinfer1::PluginField& field : fields_) {
            field.type = nvinfer1::PluginFieldType::kINT32;
            field.length = 1;
        }
        for (int i = 0; i < MAT_PARTS; ++i) fields_[kParts + i].name = kPartNames[i];
        fields_[kFloor].name = "floor";
        for (int i : {kGain, kSlope, kFloor}) {
            fields_[i].type = nvinfer1::PluginFieldType::kFLOAT32;
        }
        const bool epilogue = kind == Operator::kEpilogue, norm = kind == Operator::kTokenNorm;
        collection_.nbFields = epilogue                         ? kFloor - kFilter
                               : norm                           ? 1
                               : kind == Operator::kPropagation ? 2
                                                                : 3;
        collection_.fields = fields_.data() + (epilogue ? kFilter : norm ? kFloor : 0);
    }
    FieldNames(FieldNames const&) = delete;
    FieldNames& operator=(FieldNames const&) = delete;

    nvinfer1::PluginFieldCollection const* get() const { return &collection_; }

   private:
    static constexpr int kFilter = 3, kGain = 5, kSlope = 6, kParts = 7, kFloor = kParts + MAT_PARTS;
    std::array<nvinfer1::PluginField, kFloor + 1> fields_ = {
        nvinfer1::PluginField("window"), nvinfer1::PluginField("shift"),
        nvinfer1::PluginField("heads"),  nvinfer1::PluginField("filter"),
        nvinfer1::PluginField("pad"),    nvinfer1::PluginField("gain"),
        nvinfer1::PluginField("slope")};
    nvinfer1::PluginFieldCollection collection_{};
};

// One number of a field; or a sentence on why it is none.
template <typename Number>
char const* read_field(nvinfer1::PluginField const& field, nvinfer1::PluginFieldType type,
                       Number* place) noexcept {
    if (field.type != type || field.length != 1 || field.data == nullptr) {
        return "its attributes are one INT32 each, 'gain', 'slope' and 'floor' one FLOAT32";
    }
    *place = *static_cast<Number const*>(field.data);
    return nullptr;
}

// Whether a node's fields are attributes of an operator, which then are in `attributes`; otherwise
// TensorRT's logger hears why.
inline bool read_node(Operator kind, nvinfer1::PluginFieldCollection const* given,
                      Attributes& attributes) noexcept {
    attributes = Attributes{};
    attributes.kind = kind;
    char const* problem = given == nullptr ? "it has no attributes" : nullptr;
    for (int32_t i = 0; problem == nullptr && i < given->nbFields; ++i) {
        nvinfer1::PluginField const& field = given->fields[i];
        if (int32_t* place = attributes.find(field.name)) {
            problem = read_field(field, nvinfer1::PluginFieldType::kINT32, place);
        } else if (float* place = attributes.find_float(field.name)) {
            problem = read_field(field, nvinfer1::PluginFieldType::kFLOAT32, place);
        }
    }
    if (problem == nullptr) problem = attributes.problem();
    if (problem != nullptr) complain(kind, problem);
    return problem == nullptr;
}

// Likewise for what an engine holds of a node.
inline bool read_engine(Operator kind, void const* data, size_t size,
                        Attributes& attributes) noexcept {
    char const* problem = nullptr;
    if (data == nullptr || size != sizeof(Attributes)) {
        problem = "the engine was built with another version of this library: build it again";
    } else {
        std::memcpy(&attributes, data, size);
        problem = attributes.kind == kind ? attributes.problem()
                                          : "the engine names another operator";
    }
    if (problem != nullptr) complain(kind, problem);
    return problem == nullptr;
}

// -- shapes

// The output's: the first input's, or that of the values, but for what a filter's padding and reach
// make of an epilogue's.
inline nvinfer1::DimsExprs output_shape(Attributes const& attributes,
                                        nvinfer1::DimsExprs const* inputs,
                                        nvinfer1::IExprBuilder& builder) {
    nvinfer1::DimsExprs const& first = inputs[attributes.is_map_attention() ? 1 : 0];
    nvinfer1::DimsExprs shape = first;
    if (!attributes.is_epilogue() || attributes.filter == 0 || attributes.pad == 1) return shape;
    auto const* more = builder.constant(2 * attributes.pad - 2);
    for (int i = 2; i < 4; ++i) {
        shape.d[i] = builder.operation(nvinfer1::DimensionOperation::kSUM, *first.d[i], *more);
    }
    return shape;
}

// -- words

// What tells a node's plugin from others, in words.
inline void write_text(Attributes const& a, char* text, size_t size) noexcept {
    if (a.kind == Operator::kTokenNorm) {
        std::snprintf(text, size, "%s %s: floor %g", name_of(a.kind), kVersion, a.floor);
        return;
    }
    if (!a.is_epilogue()) {
        std::snprintf(text, size, "%s %s: window %d, shift %d, heads %d", name_of(a.kind), kVersion,
                      a.window, a.shift, a.heads);
        return;
    }
    int length = std::snprintf(text, size, "%s %s: filter %d, pad %d, gain %g, slope %g",
                               name_of(a.kind), kVersion, a.filter, a.pad, a.gain, a.slope);
    for (int i = 0; i < MAT_PARTS; ++i) {
        if (a.parts[i] == 0) continue;
        length += std::snprintf(text + length, size - length, ", %s", kPartNames[i]);
    }
}

// -- running

// An epilogue on the tensors of a node.
inline int32_t launch_epilogue(Attributes const& attributes, nvinfer1::PluginTensorDesc const* in,
                               void const* const* inputs, void* output, cudaStream_t stream) {
    nvinfer1::Dims shapes[kMostInputs];
    for (int i = 0; i < attributes.inputs(); ++i) shapes[i] = in[i].dims;
    const bool last = in[0].format == nvinfer1::TensorFormat::kHWC8;
    MatEpilogue call = epilogue_of(attributes, shapes, type_of(in[0].type),
                                   last ? MAT_CHANNELS_LAST : MAT_LINEAR);
    call.x = inputs[0];
    for (int i = 1; i < attributes.inputs(); ++i) call.parts[attributes.part_at(i)] = inputs[i];
    call.y = output;
    return mat_epilogue(&call, stream);
}

// Attention on the tensors of a node.
inline int32_t launch_attention(Attributes const& attributes, nvinfer1::PluginTensorDesc const* in,
                                void const* const* inputs, void* output, cudaStream_t stream) {
    const int32_t type = type_of(in[0].type);
    const int last = attributes.inputs() - 1;  // the mask, where there is one
    MatAttention call{};
    if (attributes.is_map_attention()) {
        nvinfer1::Dims const shapes[] = {in[0].dims, in[1].dims};
        call = map_call_of(attributes, shapes, type);
        call.q = inputs[0];
        call.k = static_cast<uint16_t const*>(inputs[0]) + shapes[1].d[1];
        call.v = inputs[1];
    } else {
        call = token_call_of(attributes, in[0].dims, type);
        call.q = inputs[0];
        call.k = inputs[1];
        call.v = inputs[2];
    }
    if (attributes.is_mask(last)) call.valid = inputs[last];
    call.y = output;
    return mat_attention(&call, stream);
}

inline int32_t launch_norm(Attributes const& attributes, nvinfer1::PluginTensorDesc const& x,
                           void const* input, void* output, cudaStream_t stream) {
    MatTokenNorm call{};
    call.x = input;
    call.y = output;
    call.batch = static_cast<int32_t>(x.dims.d[0]);
    call.channels = static_cast<int32_t>(x.dims.d[1]);
    call.height = static_cast<int32_t>(x.dims.d[2]);
    call.width = static_cast<int32_t>(x.dims.d[3]);
    call.floor = attributes.floor;
    call.type = type_of(x.type);
    return mat_token_norm(&call, stream);
}

// Launches a node's kernel: nothing is allocated, and nothing waited for. Returns a cudaError_t.
inline int32_t launch(Attributes const& attributes, nvinfer1::PluginTensorDesc const* in,
                      void const* const* inputs, void* const* outputs,
                      cudaStream_t stream) noexcept {
    nvinfer1::Dims const& shape = in[0].dims;
    int32_t status = 0;
    if (attributes.is_epilogue()) {
        status = launch_epilogue(attributes, in, inputs, outputs[0], stream);
    } else if (attributes.kind == Operator::kPropagation) {
        status = mat_propagate(inputs[0], outputs[0], static_cast<int32_t>(shape.d[0]),
                               static_cast<int32_t>(shape.d[2]), static_cast<int32_t>(shape.d[3]),
                               attributes.window, attributes.shift, MAT_MASK_INT32, stream);
    } else if (attributes.kind == Operator::kTokenNorm) {
        status = launch_norm(attributes, in[0], inputs[0], outputs[0], stream);
    } else {
        status = launch_attention(attributes, in, inputs, outputs[0], stream);
    }
    if (status != 0) {
        char line[64];
        std::snprintf(line, sizeof line, "its kernel was not launched: CUDA error %d", status);
        complain(attributes.kind, line);
    }
    return status;
}

// -- the registry

inline nvinfer1::IPluginRegistry* registry() noexcept {
    auto find = tensorrt_symbol<nvinfer1::IPluginRegistry* (*)()>("getPluginRegistry");
    return find == nullptr ? nullptr : find();
}

// Lets TensorRT know the creators, if there is one yet.
template <typename Creators>
void enroll(Creators const& creators) noexcept {
    nvinfer1::IPluginRegistry* all = registry();
    if (all == nullptr) return;
    for (auto* creator : creators) all->registerCreator(*creator, "");
}

// Undoes `enroll`, for a TensorRT that is about to register the creators itself.
template <typename Creators>
void withdraw(Creators const& creators) noexcept {
    nvinfer1::IPluginRegistry* all = registry();
    if (all == nullptr) return;
    for (auto* creator : creators) all->deregisterCreator(*creator);
}

}  // namespace mat
