// A GPU of paper: CUDA kernels run on one CPU thread, so that their arithmetic can be tested where
// there is no GPU. Stands in for CUDA's headers; says nothing about speed, or about races.
//
// Every CUDA thread of a block is a fiber. A fiber yields where threads meet (barriers, shuffles,
// tensor cores); since all of them meet in the same order, one round of the scheduler is a barrier.
// Blocks run one after the other, so shared memory is static.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
using cudaEvent_t = void*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorNotSupported = 801,
};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** pointer, size_t size) {
    return *pointer = std::malloc(size), cudaSuccess;
}
inline cudaError_t cudaFree(void* pointer) { return std::free(pointer), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    return std::memcpy(to, from, size), cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    return *value = attribute == cudaDevAttrMultiProcessorCount ? 8 : 9, cudaSuccess;
}

namespace paper {

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

struct Block {
    std::vector<ucontext_t> fibers;
    std::vector<std::vector<char>> stacks;
    std::vector<bool> ended;
    std::vector<uint32_t> slots;  // what each thread shows the others, 8 words a thread
    std::vector<std::vector<Copy>> copies;  // asynchronous ones of each thread, under way
    ucontext_t scheduler;
    unsigned current = 0;
    std::function<void()> body;
};

inline Block block;
inline dim3 thread_index, block_index;

inline void yield() { swapcontext(&block.fibers[block.current], &block.scheduler); }

inline void run_fiber() {
    block.body();
    block.ended[block.current] = true;
    yield();
}

inline void run_block(int threads, std::function<void()> body) {
    block.body = std::move(body);
    block.fibers.assign(threads, {});
    block.stacks.resize(threads);
    block.ended.assign(threads, false);
    block.slots.assign(8 * threads, 0);
    block.copies.assign(threads, {});
    for (int i = 0; i < threads; ++i) {
        block.stacks[i].resize(64 << 10);
        getcontext(&block.fibers[i]);
        block.fibers[i].uc_stack.ss_sp = block.stacks[i].data();
        block.fibers[i].uc_stack.ss_size = block.stacks[i].size();
        block.fibers[i].uc_link = nullptr;
        makecontext(&block.fibers[i], run_fiber, 0);
    }
    for (bool left = true; left;) {
        left = false;
        for (int i = 0; i < threads; ++i) {
            if (block.ended[i]) continue;
            block.current = i;
            thread_index.x = i;
            swapcontext(&block.scheduler, &block.fibers[i]);
            left |= !block.ended[i];
        }
    }
}

// Show a word to the block; what another thread showed, once all have.
inline void show(int slot, uint32_t word) { block.slots[8 * block.current + slot] = word; }
inline uint32_t shown(unsigned thread, int slot) { return block.slots[8 * thread + slot]; }
inline unsigned warp() { return block.current / 32 * 32; }

}  // namespace paper

#define threadIdx paper::thread_index
#define blockIdx paper::block_index

inline void __syncthreads() { paper::yield(); }

inline int __syncthreads_or(int value) {
    paper::show(0, value != 0);
    paper::yield();
    int any = 0;
    for (unsigned i = 0; i < paper::block.fibers.size(); ++i) any |= paper::shown(i, 0);
    paper::yield();
    return any;
}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    paper::show(0, word);
    paper::yield();
    word = paper::shown(paper::block.current ^ mask, 0);
    std::memcpy(&value, &word, 4);
    paper::yield();
    return value;
}

inline uint32_t __ldg(const uint32_t* pointer) { return *pointer; }
inline float __fdividef(float a, float b) { return a / b; }

// Copies arrive late, when they are waited for: what is read before is what was there.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
    paper::block.copies[paper::block.current].push_back({to, from, bytes});
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) {
    auto& copies = paper::block.copies[paper::block.current];
    for (const auto& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
    copies.clear();
}

template <typename... Arguments>
void start(void (*kernel)(Arguments...), dim3 grid, int threads, cudaStream_t,
           Arguments... arguments) {
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                paper::block_index = dim3(x, y, z);
                paper::run_block(threads, [&] { kernel(arguments...); });
            }
        }
    }
}
