// Plays TensorRT's part for the plugins of 8.6: finds a creator, makes a plugin of a node's
// attributes, asks for formats and shapes, runs it, clones it, serializes it and reads it back.
// Compiled together with the plugins and the kernels: on the CPU (`cuda_on_cpu`), or by nvcc with
// MAT_ON_GPU.
#include <cstring>

#include "plugin_harness.h"

using namespace nvinfer1;

extern "C" IPluginCreator* const* getPluginCreators(int32_t& count);
extern "C" void setLoggerFinder(ILoggerFinder* finder);

namespace {

Listener listener;
const bool listening = (setLoggerFinder(&listener), true);

IPluginCreator* creator_of(char const* name) {
    int32_t count = 0;
    IPluginCreator* const* all = getPluginCreators(count);
    for (int32_t i = 0; i < count; ++i) {
        if (std::strcmp(all[i]->getPluginName(), name) == 0) return all[i];
    }
    return nullptr;
}

IPluginV2DynamicExt* made(IPluginCreator* creator, char const* attributes) {
    const Fields fields(attributes);
    return static_cast<IPluginV2DynamicExt*>(creator->createPlugin("node", fields.get()));
}

}  // namespace

// Runs an operator through every stage of a plugin's life. Shapes are 4 numbers a tensor, the output
// last; types and formats are TensorRT's. Returns 0, the status of the kernel, or the number of the
// stage that went wrong.
extern "C" int play(char const* name, char const* attributes, int32_t inputs, int32_t const* shapes,
                    int32_t const* types, int32_t const* formats, void const* const* in,
                    void* out) {
    IPluginCreator* creator = creator_of(name);
    if (creator == nullptr) return -1;
    IPluginV2DynamicExt* first = made(creator, attributes);
    if (first == nullptr) return -2;

    std::vector<PluginTensorDesc> tensors = tensors_of(inputs, shapes, types, formats);
    std::vector<DynamicPluginTensorDesc> ranges;
    for (PluginTensorDesc const& tensor : tensors) {
        ranges.push_back({tensor, tensor.dims, tensor.dims});
    }
    for (int32_t i = 0; i <= inputs; ++i) {
        if (!first->supportsFormatCombination(i, tensors.data(), inputs, 1)) return -3;
        PluginTensorDesc saved = tensors[i];
        tensors[i].format = TensorFormat::kCHW32;
        if (first->supportsFormatCombination(i, tensors.data(), inputs, 1)) return -4;
        tensors[i] = saved;
        tensors[i].type = DataType::kINT8;
        if (first->supportsFormatCombination(i, tensors.data(), inputs, 1)) return -5;
        tensors[i] = saved;
    }
    std::vector<DataType> given;
    for (int32_t i = 0; i < inputs; ++i) given.push_back(tensors[i].type);
    if (first->getOutputDataType(0, given.data(), inputs) != tensors[inputs].type) return -6;
    const auto shape_of = [&](DimsExprs const* shapes_in, IExprBuilder& builder) {
        return first->getOutputDimensions(0, shapes_in, inputs, builder);
    };
    if (!shape_fits(tensors, shape_of)) return -12;
    first->configurePlugin(ranges.data(), inputs, &ranges[inputs], 1);
    if (first->getWorkspaceSize(tensors.data(), inputs, &tensors[inputs], 1) != 0) return -7;

    // An engine holds what was serialized; each of its contexts a clone of that.
    std::vector<char> held(first->getSerializationSize());
    first->serialize(held.data());
    if (creator->deserializePlugin("node", held.data(), held.size() - 1) != nullptr) return -8;
    auto* read = static_cast<IPluginV2DynamicExt*>(
        creator->deserializePlugin("node", held.data(), held.size()));
    first->destroy();
    if (read == nullptr || std::strcmp(read->getPluginType(), name) != 0) return -9;
    read->setPluginNamespace("mat");
    IPluginV2DynamicExt* clone = read->clone();
    read->destroy();
    if (std::strcmp(clone->getPluginNamespace(), "mat") != 0) return -10;
    if (clone->getNbOutputs() != 1 || clone->initialize() != 0) return -11;
    const int status = run(tensors, in, out, [&](auto from, auto to, cudaStream_t stream) {
        return clone->enqueue(tensors.data(), &tensors[inputs], from, to, nullptr, stream);
    });
    clone->terminate();
    clone->destroy();
    return status;
}

// Runs one node in several contexts of an engine, in turns and twice each. `shapes`, `in` and `out`
// have those of the first one first.
extern "C" int play_in_turns(char const* name, char const* attributes, int32_t inputs,
                             int32_t contexts, int32_t const* shapes, int32_t const* types,
                             int32_t const* formats, void const* const* in, void* const* out) {
    IPluginV2DynamicExt* engine = made(creator_of(name), attributes);
    if (engine == nullptr) return -1;
    std::vector<IPluginV2DynamicExt*> clones;
    std::vector<std::vector<PluginTensorDesc>> tensors;
    for (int32_t i = 0; i < contexts; ++i) {
        clones.push_back(engine->clone());
        tensors.push_back(tensors_of(inputs, shapes + 4 * i * (inputs + 1), types, formats));
    }
    int status = 0;
    for (int32_t turn = 0; status == 0 && turn < 2 * contexts; ++turn) {
        const int32_t i = turn % contexts;
        PluginTensorDesc const* own = tensors[i].data();
        const auto launch = [&](auto from, auto to, cudaStream_t stream) {
            return clones[i]->enqueue(own, own + inputs, from, to, nullptr, stream);
        };
        status = run(tensors[i], in + i * inputs, out[i], launch);
    }
    for (IPluginV2DynamicExt* clone : clones) clone->destroy();
    engine->destroy();
    return status;
}

// Whether a node with these attributes is refused.
extern "C" int refused(char const* name, char const* attributes) {
    IPluginV2DynamicExt* plugin = made(creator_of(name), attributes);
    if (plugin == nullptr) return 1;
    plugin->destroy();
    return 0;
}

// What the logger heard last.
extern "C" char const* last_line() { return listener.last.c_str(); }

// Whether the tensors of a node may be so.
extern "C" int formats_fit(char const* name, char const* attributes, int32_t inputs,
                           int32_t const* shapes, int32_t const* types, int32_t const* formats) {
    IPluginV2DynamicExt* plugin = made(creator_of(name), attributes);
    const std::vector<PluginTensorDesc> tensors = tensors_of(inputs, shapes, types, formats);
    bool fit = true;
    for (int32_t i = 0; i <= inputs; ++i) {
        fit = fit && plugin->supportsFormatCombination(i, tensors.data(), inputs, 1);
    }
    plugin->destroy();
    return fit;
}
