// What the harnesses of both generations of plugins share: tensors where the kernels run, and a
// logger that remembers.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// Stands in for TensorRT's logger.
class Listener final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder {
   public:
    void log(Severity, char const* line) noexcept override { last = line; }
    nvinfer1::ILogger* findLogger() override { return this; }

    std::string last;
};

inline size_t bytes_of(nvinfer1::PluginTensorDesc const& tensor) {
    const int type = static_cast<int>(tensor.type);
    size_t bytes = type == 0 || type == 3 ? 4 : 2;  // FLOAT and INT32; HALF and BF16
    const bool last = tensor.format == nvinfer1::TensorFormat::kHWC8;
    for (int32_t i = 0; i < tensor.dims.nbDims; ++i) {
        const size_t side = tensor.dims.d[i];
        bytes *= last && i == 1 ? (side + 7) / 8 * 8 : side;
    }
    return bytes;
}

#ifdef MAT_ON_GPU

inline void must(cudaError_t status) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(status));
    std::abort();
}

// Runs a launch as a CUDA graph, on copies of the caller's tensors in the GPU's memory. The first
// launch, outside the graph, is forgotten: what counts is what the graph writes.
template <typename Launch>
int run(std::vector<nvinfer1::PluginTensorDesc> const& tensors, void const* const* in, void* out,
        Launch launch) {
    std::vector<void*> places(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
        must(cudaMalloc(&places[i], bytes_of(tensors[i])));
        if (i + 1 == tensors.size()) break;
        must(cudaMemcpy(places[i], in[i], bytes_of(tensors[i]), cudaMemcpyHostToDevice));
    }
    cudaStream_t stream;
    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    int status = launch(places.data(), &places.back(), stream);
    if (status == 0) {
        must(cudaStreamSynchronize(stream));
        must(cudaMemset(places.back(), 0xff, bytes_of(tensors.back())));
        must(cudaDeviceSynchronize());
        cudaGraph_t graph;
        cudaGraphExec_t ready;
        must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        status = launch(places.data(), &places.back(), stream);
        must(cudaStreamEndCapture(stream, &graph));
        must(cudaGraphInstantiateWithFlags(&ready, graph, 0));
        must(cudaGraphLaunch(ready, stream));
        must(cudaStreamSynchronize(stream));
        must(cudaMemcpy(out, places.back(), bytes_of(tensors.back()), cudaMemcpyDeviceToHost));
        must(cudaGraphExecDestroy(ready));
        must(cudaGraphDestroy(graph));
    }
    must(cudaStreamDestroy(stream));
    for (void* place : places) must(cudaFree(place));
    return status;
}

#else

// Runs a launch where the caller's tensors lie.
template <typename Launch>
int run(std::vector<nvinfer1::PluginTensorDesc> const&, void const* const* in, void* out,
        Launch launch) {
    return launch(in, &out, nullptr);
}

#endif

// The tensors of a node: its inputs, and its output.
inline std::vector<nvinfer1::PluginTensorDesc> tensors_of(int32_t inputs, int32_t const* shapes,
                                                          int32_t const* types,
                                                          int32_t const* formats) {
    std::vector<nvinfer1::PluginTensorDesc> tensors(inputs + 1);
    for (int32_t i = 0; i <= inputs; ++i) {
        tensors[i].dims.nbDims = 4;
        for (int32_t j = 0; j < 4; ++j) tensors[i].dims.d[j] = shapes[4 * i + j];
        tensors[i].type = static_cast<nvinfer1::DataType>(types[i]);
        tensors[i].format = static_cast<nvinfer1::TensorFormat>(formats[i]);
    }
    return tensors;
}

// A size that is known, and whoever makes sums of them.
using Extent = std::remove_reference_t<decltype(nvinfer1::Dims{}.d[0])>;

struct Size final : nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
    explicit Size(Extent value) : value_(value) { mImpl = this; }
    bool isConstant() const { return true; }
    Extent getConstantValue() const { return value_; }
    bool isSizeTensor() const { return false; }  // TensorRT 8.6 does not ask
    Extent value_;
};

struct Builder final : nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
    Builder() { mImpl = this; }
    nvinfer1::IDimensionExpr const* constant(Extent value) {
        made.push_back(std::make_unique<Size>(value));
        return made.back().get();
    }
    nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation operation,
                                              nvinfer1::IDimensionExpr const& a,
                                              nvinfer1::IDimensionExpr const& b) {
        if (operation != nvinfer1::DimensionOperation::kSUM) return nullptr;
        return constant(a.getConstantValue() + b.getConstantValue());
    }
    nvinfer1::IDimensionExpr const* declareSizeTensor(int32_t, nvinfer1::IDimensionExpr const&,
                                                      nvinfer1::IDimensionExpr const&) {
        return nullptr;
    }
    std::vector<std::unique_ptr<Size>> made;
};

// Whether a plugin that is told the shapes of the inputs gives that of the output.
template <typename ShapeOf>
bool shape_fits(std::vector<nvinfer1::PluginTensorDesc> const& tensors, ShapeOf shape_of) {
    Builder builder;
    std::vector<nvinfer1::DimsExprs> shapes(tensors.size() - 1);
    for (size_t i = 0; i < shapes.size(); ++i) {
        shapes[i].nbDims = 4;
        for (int j = 0; j < 4; ++j) shapes[i].d[j] = builder.constant(tensors[i].dims.d[j]);
    }
    const nvinfer1::DimsExprs shape = shape_of(shapes.data(), builder);
    for (int j = 0; j < 4; ++j) {
        if (shape.d[j]->getConstantValue() != tensors.back().dims.d[j]) return false;
    }
    return shape.nbDims == 4;
}

// A node's attributes as its parser gives them, from a text such as "window=8 gain=4.0": a number
// with a point is a float.
class Fields {
   public:
    explicit Fields(char const* text) {
        std::istringstream words(text);
        for (std::string word; words >> word;) {
            const size_t equals = word.find('=');
            std::string const value = word.substr(equals + 1);
            const bool real = value.find('.') != std::string::npos;
            entries_.push_back({word.substr(0, equals), real ? 0 : std::stoi(value),
                                real ? std::stof(value) : 0.0f, real});
        }
        // Of the grid: in a node, and none of the plugin's business.
        entries_.push_back({"height", 64, 0.0f, false});
        for (Entry const& entry : entries_) {
            fields_.emplace_back(entry.name.c_str(),
                                 entry.is_real ? static_cast<void const*>(&entry.real)
                                               : static_cast<void const*>(&entry.integer),
                                 entry.is_real ? nvinfer1::PluginFieldType::kFLOAT32
                                               : nvinfer1::PluginFieldType::kINT32,
                                 1);
        }
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }
    nvinfer1::PluginFieldCollection const* get() const { return &collection_; }

   private:
    struct Entry {
        std::string name;
        int32_t integer;
        float real;
        bool is_real;
    };
    std::vector<Entry> entries_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};
