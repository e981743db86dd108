// Plays TensorRT's part for the plugins of 10 and later: finds a creator, makes a plugin of a
// node's attributes, asks for types, shapes and formats, serializes it, makes one of what was
// serialized, attaches that to a context and runs it. Compiled together with the plugins and the
// kernels: on the CPU (`cuda_on_cpu`), or by nvcc with MAT_ON_GPU.
#include <cstring>
#include <memory>

#include "plugin_harness.h"

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(ILoggerFinder* finder);

namespace {

Listener listener;
const bool listening = (setLoggerFinder(&listener), true);

IPluginCreatorV3One* creator_of(char const* name) {
    int32_t count = 0;
    IPluginCreatorInterface* const* all = getCreators(count);
    for (int32_t i = 0; i < count; ++i) {
        if (std::strcmp(all[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) continue;
        auto* creator = static_cast<IPluginCreatorV3One*>(all[i]);
        if (std::strcmp(creator->getPluginName(), name) == 0) return creator;
    }
    return nullptr;
}

// A plugin, and its three sides.
struct Sides {
    explicit Sides(IPluginV3* made) : plugin(made) {
        if (made == nullptr) return;
        auto side = [&](PluginCapabilityType type) { return made->getCapabilityInterface(type); };
        core = static_cast<IPluginV3OneCore*>(side(PluginCapabilityType::kCORE));
        build = static_cast<IPluginV3OneBuild*>(side(PluginCapabilityType::kBUILD));
        runtime = static_cast<IPluginV3OneRuntime*>(side(PluginCapabilityType::kRUNTIME));
    }
    std::unique_ptr<IPluginV3> plugin;
    IPluginV3OneCore* core = nullptr;
    IPluginV3OneBuild* build = nullptr;
    IPluginV3OneRuntime* runtime = nullptr;
};

Sides made(char const* name, char const* attributes) {
    const Fields fields(attributes);
    return Sides(creator_of(name)->createPlugin("node", fields.get(), TensorRTPhase::kBUILD));
}

// An engine keeps a copy of a plugin's fields, and makes one of that.
Sides read_back(IPluginCreatorV3One* creator, IPluginV3OneRuntime& runtime) {
    PluginFieldCollection const* kept = runtime.getFieldsToSerialize();
    if (kept->nbFields != 1 || kept->fields[0].type != PluginFieldType::kINT32) {
        return Sides(nullptr);
    }
    auto const* numbers = static_cast<int32_t const*>(kept->fields[0].data);
    const std::vector<int32_t> copy(numbers, numbers + kept->fields[0].length);
    const PluginField field(kept->fields[0].name, copy.data(), PluginFieldType::kINT32,
                            static_cast<int32_t>(copy.size()));
    const PluginFieldCollection fields{1, &field};
    return Sides(creator->createPlugin("node", &fields, TensorRTPhase::kRUNTIME));
}

std::vector<DynamicPluginTensorDesc> ranges_of(std::vector<PluginTensorDesc> const& tensors) {
    std::vector<DynamicPluginTensorDesc> ranges;
    for (PluginTensorDesc const& tensor : tensors) {
        ranges.push_back({tensor, tensor.dims, tensor.dims, tensor.dims});
    }
    return ranges;
}

struct Context final : IPluginResourceContext {
    IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

// Whether the output is told to be of the first input's type and of the right shape.
bool outputs_fit(IPluginV3OneBuild& build, std::vector<PluginTensorDesc> const& tensors) {
    const int32_t inputs = static_cast<int32_t>(tensors.size()) - 1;
    std::vector<DataType> types;
    for (int32_t i = 0; i < inputs; ++i) types.push_back(tensors[i].type);
    DataType type{};
    if (build.getNbOutputs() != 1 || build.getOutputDataTypes(&type, 1, types.data(), inputs)) {
        return false;
    }
    const auto shape_of = [&](DimsExprs const* shapes, IExprBuilder& builder) {
        DimsExprs shape{};
        build.getOutputShapes(shapes, inputs, nullptr, 0, &shape, 1, builder);
        return shape;
    };
    return type == tensors[inputs].type && shape_fits(tensors, shape_of);
}

}  // namespace

// Runs an operator through every stage of a plugin's life. Shapes are 4 numbers a tensor, the output
// last; types and formats are TensorRT's. Returns 0, the status of the kernel, or the number of the
// stage that went wrong.
extern "C" int play(char const* name, char const* attributes, int32_t inputs, int32_t const* shapes,
                    int32_t const* types, int32_t const* formats, void const* const* in,
                    void* out) {
    IPluginCreatorV3One* creator = creator_of(name);
    if (creator == nullptr) return -1;
    const std::vector<PluginTensorDesc> tensors = tensors_of(inputs, shapes, types, formats);
    const std::vector<DynamicPluginTensorDesc> ranges = ranges_of(tensors);

    // Building: TensorRT works on clones, and asks each of them.
    Sides read(nullptr);
    {
        Sides first = made(name, attributes);
        if (first.plugin == nullptr) return -2;
        const Sides clone(first.plugin->clone());
        first.plugin.reset();
        if (std::strcmp(clone.core->getPluginName(), name) != 0) return -3;
        if (std::strcmp(clone.core->getPluginNamespace(), creator->getPluginNamespace())) return -4;
        if (!outputs_fit(*clone.build, tensors)) return -5;
        for (int32_t i = 0; i <= inputs; ++i) {
            if (!clone.build->supportsFormatCombination(i, ranges.data(), inputs, 1)) return -6;
        }
        if (clone.build->configurePlugin(ranges.data(), inputs, &ranges[inputs], 1)) return -7;
        if (clone.build->getWorkspaceSize(ranges.data(), inputs, &ranges[inputs], 1)) return -8;
        if (clone.build->getNbTactics() != 0) return -9;
        if (clone.runtime->onShapeChange(tensors.data(), inputs, &tensors[inputs], 1)) return -10;

        read = read_back(creator, *clone.runtime);
        if (read.plugin == nullptr) return -11;
        char const* before = clone.build->getMetadataString();
        if (std::strcmp(read.build->getMetadataString(), before) != 0) return -12;
    }

    // Running: every context has a clone of its own.
    Context context;
    const Sides attached(read.runtime->attachToContext(&context));
    read.plugin.reset();
    if (attached.plugin == nullptr) return -13;
    if (attached.runtime->onShapeChange(tensors.data(), inputs, &tensors[inputs], 1)) return -14;
    return run(tensors, in, out, [&](auto from, auto to, cudaStream_t stream) {
        return attached.runtime->enqueue(tensors.data(), &tensors[inputs], from, to, nullptr,
                                         stream);
    });
}

// Runs one node in several contexts of an engine, in turns and twice each. Every context has its
// shapes, told before any of them runs; `shapes`, `in` and `out` have those of the first one first.
extern "C" int play_in_turns(char const* name, char const* attributes, int32_t inputs,
                             int32_t contexts, int32_t const* shapes, int32_t const* types,
                             int32_t const* formats, void const* const* in, void* const* out) {
    const Sides first = made(name, attributes);
    const Sides engine = read_back(creator_of(name), *first.runtime);
    if (engine.plugin == nullptr) return -1;
    Context context;
    std::vector<Sides> attached;
    std::vector<std::vector<PluginTensorDesc>> tensors;
    for (int32_t i = 0; i < contexts; ++i) {
        attached.emplace_back(engine.runtime->attachToContext(&context));
        tensors.push_back(tensors_of(inputs, shapes + 4 * i * (inputs + 1), types, formats));
        if (attached[i].plugin == nullptr) return -2;
    }
    for (int32_t i = 0; i < contexts; ++i) {
        PluginTensorDesc const* own = tensors[i].data();
        if (attached[i].runtime->onShapeChange(own, inputs, own + inputs, 1)) return -3;
    }
    for (int32_t turn = 0; turn < 2 * contexts; ++turn) {
        const int32_t i = turn % contexts;
        PluginTensorDesc const* own = tensors[i].data();
        const auto launch = [&](auto from, auto to, cudaStream_t stream) {
            return attached[i].runtime->enqueue(own, own + inputs, from, to, nullptr, stream);
        };
        const int status = run(tensors[i], in + i * inputs, out[i], launch);
        if (status != 0) return status;
    }
    return 0;
}

// Whether a node with these attributes is refused.
extern "C" int refused(char const* name, char const* attributes) {
    return made(name, attributes).plugin == nullptr;
}

// Whether a plugin is refused that an engine holds as these numbers.
extern "C" int unread(char const* name, int32_t const* numbers, int32_t count) {
    const PluginField field("attributes", numbers, PluginFieldType::kINT32, count);
    const PluginFieldCollection fields{1, &field};
    IPluginV3* plugin = creator_of(name)->createPlugin("node", &fields, TensorRTPhase::kRUNTIME);
    return Sides(plugin).plugin == nullptr;
}

// Whether shapes are refused, by a bit each: 1 while an engine is built, 2 while it runs.
extern "C" int misfits(char const* name, char const* attributes, int32_t inputs,
                       int32_t const* shapes) {
    const Sides sides = made(name, attributes);
    const std::vector<int32_t> zeros(inputs + 1, 0);
    const std::vector<PluginTensorDesc> tensors =
        tensors_of(inputs, shapes, zeros.data(), zeros.data());
    const std::vector<DynamicPluginTensorDesc> ranges = ranges_of(tensors);
    const int built = sides.build->configurePlugin(ranges.data(), inputs, &ranges[inputs], 1);
    const int running =
        sides.runtime->onShapeChange(tensors.data(), inputs, &tensors[inputs], 1);
    return (built != 0) | (running != 0) << 1;
}

// Whether the tensors of a node may be so.
extern "C" int formats_fit(char const* name, char const* attributes, int32_t inputs,
                           int32_t const* shapes, int32_t const* types, int32_t const* formats) {
    const Sides sides = made(name, attributes);
    const std::vector<DynamicPluginTensorDesc> all =
        ranges_of(tensors_of(inputs, shapes, types, formats));
    bool fit = true;
    for (int32_t i = 0; i <= inputs; ++i) {
        fit = fit && sides.build->supportsFormatCombination(i, all.data(), inputs, 1);
    }
    return fit;
}

// Whether a tensor may be so, for each type of the first one, its own type and its own format:
// `out` has a byte for each, the format innermost. The first one is of a format too.
extern "C" void formats(char const* name, char const* attributes, int32_t inputs, int32_t position,
                        int32_t first_format, int32_t types, int32_t formats, uint8_t* out) {
    const Sides sides = made(name, attributes);
    std::vector<DynamicPluginTensorDesc> all(inputs + 1);
    for (int32_t first = 0; first < types; ++first) {
        for (int32_t own = 0; own < types; ++own) {
            for (int32_t format = 0; format < formats; ++format) {
                all[0].desc.type = static_cast<DataType>(first);
                all[0].desc.format = static_cast<TensorFormat>(first_format);
                all[position].desc.type = static_cast<DataType>(own);
                all[position].desc.format = static_cast<TensorFormat>(format);
                *out++ = sides.build->supportsFormatCombination(position, all.data(), inputs, 1);
            }
        }
    }
}

// The suffix by which kernel timings of a node are kept.
extern "C" char const* timing_id(char const* name, char const* attributes) {
    static std::string text;
    return (text = made(name, attributes).build->getTimingCacheID()).c_str();
}

// What the logger heard last.
extern "C" char const* last_line() { return listener.last.c_str(); }
