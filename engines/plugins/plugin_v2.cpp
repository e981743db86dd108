// The operators as IPluginV2DynamicExt, for TensorRT 8.6. Thin: the kernels do the work.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <array>
#include <cstring>
#include <memory>
#include <string>

#include "attributes.h"

namespace {

using namespace nvinfer1;
using mat::Attributes;
using mat::Operator;

// TensorRT's logger, once a program has handed us one.
ILoggerFinder* logger_finder = nullptr;

void complain(char const* what, char const* problem) noexcept {
    ILogger* logger = logger_finder == nullptr ? nullptr : logger_finder->findLogger();
    if (logger == nullptr) return;
    logger->log(ILogger::Severity::kERROR, (std::string("mat::") + what + ": " + problem).c_str());
}

class Plugin final : public IPluginV2DynamicExt {
   public:
    explicit Plugin(Attributes const& attributes) : attributes_(attributes) {}

    // -- what TensorRT asks while it builds

    DimsExprs getOutputDimensions(int32_t, DimsExprs const* inputs, int32_t,
                                  IExprBuilder&) noexcept override {
        return inputs[0];
    }

    DataType getOutputDataType(int32_t, DataType const* types, int32_t) const noexcept override {
        return types[0];
    }

    bool supportsFormatCombination(int32_t position, PluginTensorDesc const* all, int32_t inputs,
                                   int32_t) noexcept override {
        PluginTensorDesc const& own = all[position];
        if (own.format != TensorFormat::kLINEAR) return false;
        const bool mask = attributes_.kind == Operator::kPropagation || position == 3;
        if (mask && position < attributes_.inputs()) return own.type == DataType::kBOOL;
        if (attributes_.kind == Operator::kPropagation) return own.type == DataType::kBOOL;
        if (inputs != attributes_.inputs()) return false;
        return position == 0 ? own.type == DataType::kFLOAT || own.type == DataType::kHALF
                             : own.type == all[0].type;
    }

    void configurePlugin(DynamicPluginTensorDesc const* in, int32_t inputs,
                         DynamicPluginTensorDesc const*, int32_t) noexcept override {
        std::array<Dims, 4> shapes{};
        if (inputs > 4) return;
        for (int32_t i = 0; i < inputs; ++i) shapes[i] = in[i].max;
        if (!mat::shapes_fit(attributes_, shapes.data(), inputs)) {
            complain(getPluginType(), "the shapes of its inputs do not fit");
        }
    }

    size_t getWorkspaceSize(PluginTensorDesc const*, int32_t, PluginTensorDesc const*,
                            int32_t) const noexcept override {
        return 0;
    }

    // -- and while the engine runs: nothing is allocated, and nothing waited for

    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void*, cudaStream_t stream) noexcept override {
        Dims const& first = in[0].dims;
        if (attributes_.kind == Operator::kPropagation) {
            return mat_propagate(static_cast<uint8_t const*>(inputs[0]),
                                 static_cast<uint8_t*>(outputs[0]), first.d[0], first.d[2],
                                 first.d[3], attributes_.window, attributes_.shift, stream);
        }
        const int32_t type = in[0].type == DataType::kHALF ? MAT_HALF : MAT_FLOAT;
        MatAttention call = mat::call_of(attributes_, first, type);
        call.q = inputs[0];
        call.k = inputs[1];
        call.v = inputs[2];
        call.y = outputs[0];
        if (attributes_.kind == Operator::kMaskedAttention) {
            call.valid = static_cast<uint8_t const*>(inputs[3]);
        }
        return mat_attention(&call, stream);
    }

    // -- housekeeping

    IPluginV2DynamicExt* clone() const noexcept override {
        auto* copy = new (std::nothrow) Plugin(attributes_);
        if (copy != nullptr) copy->setPluginNamespace(namespace_.c_str());
        return copy;
    }
    char const* getPluginType() const noexcept override {
        return mat::kNames[static_cast<int32_t>(attributes_.kind)];
    }
    char const* getPluginVersion() const noexcept override { return mat::kVersion; }
    int32_t getNbOutputs() const noexcept override { return 1; }
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}
    size_t getSerializationSize() const noexcept override { return sizeof(Attributes); }
    void serialize(void* buffer) const noexcept override {
        std::memcpy(buffer, &attributes_, sizeof(Attributes));
    }
    void destroy() noexcept override { delete this; }
    void setPluginNamespace(char const* name) noexcept override { namespace_ = name; }
    char const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

   private:
    Attributes attributes_;
    std::string namespace_;
};

class Creator final : public IPluginCreator {
   public:
    explicit Creator(Operator kind) : kind_(kind) {
        for (size_t i = 0; i < fields_.size(); ++i) {
            fields_[i] = PluginField(kFields[i], nullptr, PluginFieldType::kINT32, 1);
        }
        const int32_t count = kind == Operator::kPropagation ? 2 : 3;
        collection_ = {count, fields_.data()};
    }

    char const* getPluginName() const noexcept override {
        return mat::kNames[static_cast<int32_t>(kind_)];
    }
    char const* getPluginVersion() const noexcept override { return mat::kVersion; }
    PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }

    IPluginV2* createPlugin(char const*, PluginFieldCollection const* given) noexcept override {
        Attributes attributes;
        attributes.kind = kind_;
        for (int32_t i = 0; i < given->nbFields; ++i) {
            PluginField const& field = given->fields[i];
            if (field.type != PluginFieldType::kINT32 || field.length != 1) continue;
            attributes.take(field.name, *static_cast<int32_t const*>(field.data));
        }
        return made(attributes);
    }

    IPluginV2* deserializePlugin(char const*, void const* data, size_t size) noexcept override {
        Attributes attributes;
        if (size != sizeof(Attributes)) {
            complain(getPluginName(), "the engine was built with another version of this library");
            return nullptr;
        }
        std::memcpy(&attributes, data, size);
        return made(attributes);
    }

    void setPluginNamespace(char const* name) noexcept override { namespace_ = name; }
    char const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

   private:
    static constexpr std::array<char const*, 3> kFields = {"window", "shift", "heads"};

    IPluginV2* made(Attributes const& attributes) noexcept {
        char const* problem = attributes.kind == kind_ ? attributes.problem()
                                                       : "the engine names another operator";
        if (problem != nullptr) {
            complain(getPluginName(), problem);
            return nullptr;
        }
        auto* plugin = new (std::nothrow) Plugin(attributes);
        if (plugin != nullptr) plugin->setPluginNamespace(namespace_.c_str());
        return plugin;
    }

    Operator kind_;
    std::array<PluginField, 3> fields_;
    PluginFieldCollection collection_{};
    std::string namespace_;
};

std::array<IPluginCreator*, 3> const& creators() {
    static Creator masked(Operator::kMaskedAttention), plain(Operator::kAttention),
        propagation(Operator::kPropagation);
    static const std::array<IPluginCreator*, 3> all = {&masked, &plain, &propagation};
    return all;
}

// The registry of the TensorRT that is loaded already, or null.
IPluginRegistry* registry() {
    using Find = IPluginRegistry* (*)();
    auto find = reinterpret_cast<Find>(dlsym(RTLD_DEFAULT, "getPluginRegistry"));
    return find == nullptr ? nullptr : find();
}

// For `trtexec --staticPlugins`, and whoever merely opens the library.
__attribute__((constructor)) void register_creators() {
    if (registry() == nullptr) return;
    for (IPluginCreator* creator : creators()) registry()->registerCreator(*creator, "");
}

}  // namespace

// For IPluginRegistry::loadLibrary (`trtexec --dynamicPlugins`), which registers them itself.
extern "C" __attribute__((visibility("default"))) IPluginCreator* const* getPluginCreators(
    int32_t& count) {
    if (registry() != nullptr) {
        for (IPluginCreator* creator : creators()) registry()->deregisterCreator(*creator);
    }
    count = static_cast<int32_t>(creators().size());
    return creators().data();
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder* finder) {
    logger_finder = finder;
}
