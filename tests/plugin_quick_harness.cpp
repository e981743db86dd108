// Launches the kernel of quick.cu as TensorRT does: by a grid, a block and the arguments' addresses.
// Compiled for the CPU (`cuda_on_cpu`).
#include "quick.cu"

#include <utility>

namespace {

template <typename... Parameters, size_t... I>
void launch_with(void (*kernel)(Parameters...), dim3 grid, int threads, void* const* arguments,
                 std::index_sequence<I...>) {
    start(kernel, grid, threads, nullptr, *static_cast<Parameters*>(arguments[I])...);
}

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* const* arguments) {
    launch_with(kernel, grid, threads, arguments, std::index_sequence_for<Parameters...>{});
    return sizeof...(Parameters);
}

}  // namespace

// Returns how many arguments the kernel takes.
extern "C" int run(int const* grid, int threads, void* const* arguments) {
    return launch(mat_quick, dim3(grid[0], grid[1], grid[2]), threads, arguments);
}
