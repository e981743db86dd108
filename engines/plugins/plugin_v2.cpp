// The operators as IPluginV2DynamicExt, for TensorRT 8.6. Thin: the kernels do the work.
#include <new>
#include <string>

#include "plugin_common.h"

namespace {

using namespace nvinfer1;
using mat::Attributes;
using mat::Operator;

class Plugin final : public IPluginV2DynamicExt {
   public:
    explicit Plugin(Attributes const& attributes) : attributes_(attributes) {}

    // -- what TensorRT asks while it builds

    DimsExprs getOutputDimensions(int32_t, DimsExprs const* inputs, int32_t,
                                  IExprBuilder& builder) noexcept override {
        return mat::output_shape(attributes_, inputs, builder);
    }

    DataType getOutputDataType(int32_t, DataType const* types, int32_t) const noexcept override {
        return types[0];
    }

    bool supportsFormatCombination(int32_t position, PluginTensorDesc const* all, int32_t inputs,
                                   int32_t) noexcept override {
        return inputs == attributes_.inputs() &&
               mat::supports(attributes_, position, all[position], all[0]);
    }

    void configurePlugin(DynamicPluginTensorDesc const* in, int32_t inputs,
                         DynamicPluginTensorDesc const*, int32_t) noexcept override {
        // It can but say so; with such shapes nothing is run.
        if (inputs == attributes_.inputs()) fit([in](int32_t i) { return in[i].max; });
    }

    size_t getWorkspaceSize(PluginTensorDesc const*, int32_t, PluginTensorDesc const*,
                            int32_t) const noexcept override {
        return 0;
    }

    // -- and while the engine runs

    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void*, cudaStream_t stream) noexcept override {
        if (!fit([in](int32_t i) { return in[i].dims; })) return cudaErrorInvalidValue;
        return mat::launch(attributes_, in, inputs, outputs, stream);
    }

    // -- housekeeping

    IPluginV2DynamicExt* clone() const noexcept override {
        auto* copy = new (std::nothrow) Plugin(attributes_);
        if (copy != nullptr) copy->setPluginNamespace(namespace_.c_str());
        return copy;
    }
    char const* getPluginType() const noexcept override { return mat::name_of(attributes_.kind); }
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
    // Whether the shapes of the inputs fit each other and the kernels; the logger hears why not.
    template <typename ShapeOf>
    bool fit(ShapeOf shape_of) const noexcept {
        std::array<Dims, mat::kMostInputs> shapes{};
        for (int32_t i = 0; i < attributes_.inputs(); ++i) shapes[i] = shape_of(i);
        char const* problem =
            mat::shapes_problem(attributes_, shapes.data(), attributes_.inputs());
        if (problem != nullptr) mat::complain(attributes_.kind, problem);
        return problem == nullptr;
    }

    Attributes attributes_;
    std::string namespace_;
};

class Creator final : public IPluginCreator {
   public:
    explicit Creator(Operator kind) : kind_(kind), names_(kind) {}

    char const* getPluginName() const noexcept override { return mat::name_of(kind_); }
    char const* getPluginVersion() const noexcept override { return mat::kVersion; }
    PluginFieldCollection const* getFieldNames() noexcept override { return names_.get(); }

    IPluginV2* createPlugin(char const*, PluginFieldCollection const* given) noexcept override {
        Attributes attributes;
        return mat::read_node(kind_, given, attributes) ? made(attributes) : nullptr;
    }

    IPluginV2* deserializePlugin(char const*, void const* data, size_t size) noexcept override {
        Attributes attributes;
        return mat::read_engine(kind_, data, size, attributes) ? made(attributes) : nullptr;
    }

    void setPluginNamespace(char const* name) noexcept override { namespace_ = name; }
    char const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

   private:
    IPluginV2* made(Attributes const& attributes) noexcept {
        auto* plugin = new (std::nothrow) Plugin(attributes);
        if (plugin != nullptr) plugin->setPluginNamespace(namespace_.c_str());
        return plugin;
    }

    Operator kind_;
    mat::FieldNames names_;
    std::string namespace_;
};

using Creators = std::array<IPluginCreator*, std::size(mat::kNames)>;

Creators const& creators() {
    static Creator masked(Operator::kMaskedAttention), plain(Operator::kAttention),
        propagation(Operator::kPropagation), epilogue(Operator::kEpilogue),
        masked_map(Operator::kMaskedMapAttention), map(Operator::kMapAttention),
        norm(Operator::kTokenNorm);
    static const Creators all = {&masked, &plain, &propagation, &epilogue, &masked_map, &map, &norm};
    return all;
}

// For `trtexec --staticPlugins`, and whoever merely opens the library.
__attribute__((constructor)) void register_creators() { mat::enroll(creators()); }

}  // namespace

// For IPluginRegistry::loadLibrary (`trtexec --dynamicPlugins`), which registers them itself.
MAT_EXPORT IPluginCreator* const* getPluginCreators(int32_t& count) {
    mat::withdraw(creators());
    count = static_cast<int32_t>(creators().size());
    return creators().data();
}

MAT_EXPORT void setLoggerFinder(ILoggerFinder* finder) { mat::logger_finder = finder; }
