// What the harnesses of both generations of plugins share: tensors where the kernels run, and a
// logger that remembers.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>
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
    for (int32_t i = 0; i < tensor.dims.nbDims; ++i) bytes *= tensor.dims.d[i];
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

// The tensors of a node: its inputs, and an output like the first.
inline std::vector<nvinfer1::PluginTensorDesc> tensors_of(int32_t inputs, int32_t const* shapes,
                                                          int32_t const* types) {
    std::vector<nvinfer1::PluginTensorDesc> tensors(inputs + 1);
    for (int32_t i = 0; i <= inputs; ++i) {
        const int32_t like = i < inputs ? i : 0;
        tensors[i].dims.nbDims = 4;
        for (int32_t j = 0; j < 4; ++j) tensors[i].dims.d[j] = shapes[4 * like + j];
        tensors[i].type = static_cast<nvinfer1::DataType>(types[like]);
        tensors[i].format = nvinfer1::TensorFormat::kLINEAR;
    }
    return tensors;
}

// A node's attributes as its parser gives them; a negative number of heads is none.
class Fields {
   public:
    Fields(int32_t window, int32_t shift, int32_t heads) : values_{window, shift, heads} {
        for (int i = 0; i < (heads < 0 ? 2 : 3); ++i) {
            fields_.emplace_back(kNames[i], &values_[i], nvinfer1::PluginFieldType::kINT32, 1);
        }
        fields_.emplace_back("height", &side_, nvinfer1::PluginFieldType::kINT32, 1);
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }
    nvinfer1::PluginFieldCollection const* get() const { return &collection_; }

   private:
    static constexpr char const* kNames[] = {"window", "shift", "heads"};
    int32_t values_[3];
    int32_t side_ = 64;  // of the grid: in a node, and none of the plugin's business
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};
