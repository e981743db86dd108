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
// else of one type.
inline bool supports(Attributes const& attributes, int32_t position,
                     nvinfer1::PluginTensorDesc const& own,
                     nvinfer1::PluginTensorDesc const& first) {
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
        collection_.nbFields = kind == Operator::kPropagation ? 2 : 3;
        collection_.fields = fields_.data();
    }
    FieldNames(FieldNames const&) = delete;
    FieldNames& operator=(FieldNames const&) = delete;

    nvinfer1::PluginFieldCollection const* get() const { return &collection_; }

   private:
    std::array<nvinfer1::PluginField, 3> fields_ = {
        nvinfer1::PluginField("window"), nvinfer1::PluginField("shift"),
        nvinfer1::PluginField("heads")};
    nvinfer1::PluginFieldCollection collection_{};
};

// Whether a node's fields are attributes of an operator, which then are in `attributes`; otherwise
// TensorRT's logger hears why.
inline bool read_node(Operator kind, nvinfer1::PluginFieldCollection const* given,
                      Attributes& attributes) noexcept {
    attributes = Attributes{};
    attributes.kind = kind;
    char const* problem = given == nullptr ? "it has no attributes" : nullptr;
    for (int32_t i = 0; problem == nullptr && i < given->nbFields; ++i) {
        nvinfer1::PluginField const& field = given->fields[i];
        int32_t* place = attributes.find(field.name);
        if (place == nullptr) continue;
        if (field.type != nvinfer1::PluginFieldType::kINT32 || field.length != 1 ||
            field.data == nullptr) {
            problem = "its attributes are one INT32 each";
        } else {
            *place = *static_cast<int32_t const*>(field.data);
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

// -- running

// Launches a node's kernel: nothing is allocated, and nothing waited for. Returns a cudaError_t.
inline int32_t launch(Attributes const& attributes, nvinfer1::PluginTensorDesc const& first,
                      void const* const* inputs, void* const* outputs,
                      cudaStream_t stream) noexcept {
    nvinfer1::Dims const& shape = first.dims;
    int32_t status = 0;
    if (attributes.kind == Operator::kPropagation) {
        status = mat_propagate(inputs[0], outputs[0], static_cast<int32_t>(shape.d[0]),
                               static_cast<int32_t>(shape.d[2]), static_cast<int32_t>(shape.d[3]),
                               attributes.window, attributes.shift, MAT_MASK_INT32, stream);
    } else {
        MatAttention call = call_of(attributes, shape, type_of(first.type));
        call.q = inputs[0];
        call.k = inputs[1];
        call.v = inputs[2];
        call.y = outputs[0];
        if (attributes.kind == Operator::kMaskedAttention) call.valid = inputs[3];
        status = mat_attention(&call, stream);
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
