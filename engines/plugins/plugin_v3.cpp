// The operators as IPluginV3, for TensorRT 10 and later. Thin: the kernels do the work.
#include <new>

#include "plugin_common.h"

namespace {

using namespace nvinfer1;
using mat::Attributes;
using mat::Operator;

constexpr int32_t kNumbers = sizeof(Attributes) / sizeof(int32_t);

// A plugin never changes once it is made, so that threads may share it. No output is an input's
// memory: a kernel reads a neighbour's tokens after it has written its own.
class Plugin final : public IPluginV3,
                     public IPluginV3OneCore,
                     public IPluginV3OneBuild,
                     public IPluginV3OneRuntime {
   public:
    explicit Plugin(Attributes const& attributes) : attributes_(attributes) {
        mat::write_text(attributes, text_, sizeof text_);
    }
    Plugin(Plugin const&) = delete;  // `stored_` points into it
    Plugin& operator=(Plugin const&) = delete;

    // -- the plugin as a whole

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(attributes_); }
    char const* getPluginName() const noexcept override { return mat::name_of(attributes_.kind); }
    char const* getPluginVersion() const noexcept override { return mat::kVersion; }
    char const* getPluginNamespace() const noexcept override { return ""; }

    // -- what TensorRT asks while it builds

    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t getOutputDataTypes(DataType* out, int32_t outputs, DataType const* in,
                               int32_t inputs) const noexcept override {
        if (outputs != 1 || inputs != attributes_.inputs()) return refused(kCount);
        out[0] = in[0];
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t,
                            DimsExprs* out, int32_t outputs,
                            IExprBuilder& builder) noexcept override {
        if (outputs != 1 || inputs != attributes_.inputs()) return refused(kCount);
        out[0] = mat::output_shape(attributes_, in, builder);
        return 0;
    }

    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* all,
                                   int32_t inputs, int32_t outputs) noexcept override {
        return outputs == 1 && inputs == attributes_.inputs() &&
               mat::supports(attributes_, position, all[position].desc, all[0].desc);
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t inputs,
                            DynamicPluginTensorDesc const*, int32_t) noexcept override {
        return checked(in, inputs, [](DynamicPluginTensorDesc const& own) { return own.max; });
    }

    // Beside shapes and types, what timings depend on.
    char const* getTimingCacheID() noexcept override { return text_; }
    char const* getMetadataString() noexcept override { return text_; }

    // -- and while the engine runs

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const*,
                          int32_t) noexcept override {
        return checked(in, inputs, [](PluginTensorDesc const& own) { return own.dims; });
    }

    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void*, cudaStream_t stream) noexcept override {
        return mat::launch(attributes_, in, inputs, outputs, stream);
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &collection_; }

   private:
    static constexpr char const* kCount = "it has another number of tensors than its operator";

    int32_t refused(char const* problem) const noexcept {
        mat::complain(attributes_.kind, problem);
        return -1;
    }

    // A status for the shapes of the inputs.
    template <typename Tensor, typename ShapeOf>
    int32_t checked(Tensor const* in, int32_t inputs, ShapeOf shape_of) const noexcept {
        if (inputs != attributes_.inputs()) return refused(kCount);
        std::array<Dims, mat::kMostInputs> shapes{};
        for (int32_t i = 0; i < inputs; ++i) shapes[i] = shape_of(in[i]);
        char const* problem = mat::shapes_problem(attributes_, shapes.data(), inputs);
        return problem == nullptr ? 0 : refused(problem);
    }

    Attributes attributes_;
    PluginField stored_{"attributes", &attributes_, PluginFieldType::kINT32, kNumbers};
    PluginFieldCollection collection_{1, &stored_};
    char text_[160];
};

class Creator final : public IPluginCreatorV3One {
   public:
    explicit Creator(Operator kind) : kind_(kind), names_(kind) {}

    char const* getPluginName() const noexcept override { return mat::name_of(kind_); }
    char const* getPluginVersion() const noexcept override { return mat::kVersion; }
    char const* getPluginNamespace() const noexcept override { return ""; }
    PluginFieldCollection const* getFieldNames() noexcept override { return names_.get(); }

    // From a node's attributes while a network is made, from what an engine holds afterwards.
    IPluginV3* createPlugin(char const*, PluginFieldCollection const* given,
                            TensorRTPhase phase) noexcept override {
        Attributes attributes;
        const bool fine = phase == TensorRTPhase::kBUILD
                              ? mat::read_node(kind_, given, attributes)
                              : read_stored(given, attributes);
        return fine ? new (std::nothrow) Plugin(attributes) : nullptr;
    }

   private:
    bool read_stored(PluginFieldCollection const* given, Attributes& attributes) const noexcept {
        const bool numbers = given != nullptr && given->nbFields == 1 &&
                             given->fields[0].type == PluginFieldType::kINT32;
        return mat::read_engine(kind_, numbers ? given->fields[0].data : nullptr,
                                numbers ? given->fields[0].length * sizeof(int32_t) : 0,
                                attributes);
    }

    Operator kind_;
    mat::FieldNames names_;
};

using Creators = std::array<IPluginCreatorInterface*, std::size(mat::kNames)>;

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
MAT_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
    mat::withdraw(creators());
    count = static_cast<int32_t>(creators().size());
    return creators().data();
}

MAT_EXPORT void setLoggerFinder(ILoggerFinder* finder) { mat::logger_finder = finder; }
