// Every kernel on small inputs, for compute-sanitizer: each tensor is an allocation of its own, of
// exactly its size, and results lie in poisoned memory.
//
//   nvcc -std=c++17 -O3 -lineinfo -arch=native -I engines/plugins tests/gpu/sanitize.cu
//        engines/plugins/kernels.cu -o sanitize
//   compute-sanitizer --tool memcheck ./sanitize
//
// Exits with 1 if something was not written, or written where nothing belongs. Whether the numbers
// are right is for check_kernels.py to say.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace {

struct Case {
    int window, shift, rows, columns;  // the grid in windows
    int heads, head_size, batch;  // 0 heads: as many as take the kernel for many blocks
    bool masked, packed;  // q, k and v side by side, y in rows that are wider than it: with
                          // masks of INT32, in 16 bits, what is behind it is set to 0
    int mask_type;
};

constexpr Case kCases[] = {
    {8, 4, 2, 2, 1, 30, 2, true, true, MAT_MASK_BYTE},
    {8, 0, 1, 2, 2, 32, 1, true, false, MAT_MASK_INT32},
    {8, 1, 2, 2, 1, 2, 1, false, true, MAT_MASK_BYTE},
    {16, 8, 2, 2, 1, 30, 1, true, true, MAT_MASK_INT32},
    {16, 0, 1, 1, 1, 2, 1, false, false, MAT_MASK_INT32},
    {16, 0, 1, 1, 0, 2, 1, true, false, MAT_MASK_BYTE},
};

constexpr int kNormChannels[] = {1, 13, 30, 180};

struct EpilogueCase {
    int batch, channels, height, width;
    int pad;  // of the filter; -1: none
    bool parts, batched;
    int layout;
};

constexpr EpilogueCase kEpilogueCases[] = {
    {1, 16, 10, 18, 0, true, false, MAT_CHANNELS_LAST},
    {2, 13, 9, 11, 2, true, true, MAT_CHANNELS_LAST},
    {1, 24, 8, 7, 2, false, false, MAT_CHANNELS_LAST},
    {2, 3, 5, 7, -1, true, true, MAT_CHANNELS_LAST},
    {1, 16, 10, 18, 0, true, false, MAT_LINEAR},
    {2, 13, 9, 11, 1, true, true, MAT_LINEAR},
    {1, 4, 7, 16, -1, true, false, MAT_LINEAR},
    {2, 3, 5, 7, -1, true, true, MAT_LINEAR},
};

void must(cudaError_t status) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(status));
    std::exit(2);
}

uint32_t random_bits() {
    static uint32_t state = 1;
    state ^= state << 13;
    state ^= state >> 17;
    return state ^= state << 5;
}

// A number from ±1/8 to ±2, in a type's bits.
uint32_t number_of(int type) {
    const uint32_t bits = random_bits(), sign = bits >> 31, exponent = bits & 3;
    if (type == MAT_HALF) return sign << 15 | (12 + exponent) << 10 | (bits >> 8 & 0x3ff);
    if (type == MAT_BFLOAT16) return sign << 15 | (124 + exponent) << 7 | (bits >> 8 & 0x7f);
    return sign << 31 | (124 + exponent) << 23 | (bits >> 8 & 0x7fffff);
}

// Memory of the GPU, of exactly this size.
class Memory {
   public:
    explicit Memory(std::vector<uint8_t> const& bytes) : size_(bytes.size()) {
        must(cudaMalloc(&pointer_, size_));
        must(cudaMemcpy(pointer_, bytes.data(), size_, cudaMemcpyHostToDevice));
    }
    ~Memory() { must(cudaFree(pointer_)); }
    Memory(Memory const&) = delete;

    template <typename T>
    T* as() const {
        return static_cast<T*>(pointer_);
    }
    std::vector<uint8_t> bytes() const {
        std::vector<uint8_t> bytes(size_);
        must(cudaMemcpy(bytes.data(), pointer_, size_, cudaMemcpyDeviceToHost));
        return bytes;
    }

   private:
    void* pointer_ = nullptr;
    size_t size_;
};

// A mask's elements, of which few are valid or all.
std::vector<uint8_t> mask_of(size_t tokens, size_t size, bool all) {
    std::vector<uint8_t> bytes(tokens * size);
    for (size_t i = 0; i < tokens; ++i) bytes[i * size] = all || random_bits() % 50 == 0;
    return bytes;  // little-endian
}

std::vector<uint8_t> numbers(size_t count, int type) {
    const size_t size = type == MAT_FLOAT ? 4 : 2;
    std::vector<uint8_t> bytes(count * size);
    for (size_t i = 0; i < count; ++i) {
        const uint32_t number = number_of(type);
        std::memcpy(&bytes[i * size], &number, size);  // little-endian
    }
    return bytes;
}

constexpr uint8_t kPoison = 0xff;  // a number of these bytes is no number

// How many elements of rows [tokens, stride] are poison where they should not be, or the reverse.
int wrong(std::vector<uint8_t> const& bytes, size_t size, int stride, int channels) {
    int count = 0;
    for (size_t i = 0; i < bytes.size() / size; ++i) {
        bool poison = true;
        for (size_t j = 0; j < size; ++j) poison &= bytes[i * size + j] == kPoison;
        count += poison == (static_cast<int>(i % stride) < channels);
    }
    return count;
}

bool passes(Case c, int type) {
    if (c.heads == 0) must(cudaDeviceGetAttribute(&c.heads, cudaDevAttrMultiProcessorCount, 0));
    const int height = c.rows * c.window, width = c.columns * c.window;
    const size_t tokens = static_cast<size_t>(c.batch) * height * width;
    const int channels = c.heads * c.head_size;
    const size_t size = type == MAT_FLOAT ? 4 : 2;
    MatAttention a{};
    a.batch = c.batch;
    a.height = height;
    a.width = width;
    a.heads = c.heads;
    a.head_size = c.head_size;
    a.window = c.window;
    a.shift = c.shift;
    a.type = type;
    a.q_stride = a.k_stride = a.v_stride = c.packed ? 3 * channels : channels;
    a.y_stride = c.packed ? channels + 2 : channels;
    const bool padded = c.packed && c.mask_type == MAT_MASK_INT32 && type != MAT_FLOAT;
    a.y_padding = padded ? 2 : 0;
    // The last token of v ends where the memory ends.
    const Memory q(numbers((c.packed ? 3 : 1) * tokens * channels, type));
    const Memory k(numbers(tokens * channels, type)), v(numbers(tokens * channels, type));
    a.q = q.as<void>();
    a.k = c.packed ? q.as<char>() + size * channels : k.as<char>();
    a.v = c.packed ? q.as<char>() + 2 * size * channels : v.as<char>();
    a.mask_type = c.mask_type;
    const size_t mask_size = c.mask_type == MAT_MASK_INT32 ? 4 : 1;
    const Memory valid(mask_of(tokens, mask_size, false));
    const Memory y(std::vector<uint8_t>(tokens * a.y_stride * size, kPoison));
    const Memory behind(std::vector<uint8_t>(tokens * mask_size, kPoison));
    const Memory alone(std::vector<uint8_t>(tokens * mask_size, kPoison));
    a.valid = c.masked ? valid.as<void>() : nullptr;
    a.y = y.as<void>();
    a.propagated = behind.as<void>();
    must(static_cast<cudaError_t>(mat_attention(&a, nullptr)));
    must(static_cast<cudaError_t>(mat_propagate(valid.as<void>(), alone.as<void>(), c.batch, height,
                                                width, c.window, c.shift, c.mask_type, nullptr)));
    must(cudaDeviceSynchronize());

    const int bad = wrong(y.bytes(), size, a.y_stride, channels + a.y_padding);
    const std::vector<uint8_t> ones = mask_of(tokens, mask_size, true);
    const bool masks = behind.bytes() == (c.masked ? alone.bytes() : ones) &&
                       wrong(alone.bytes(), mask_size, 1, 1) == 0;
    std::printf("window %2d, shift %2d, %dx%d windows, %3d heads of %2d, batch %d, %s%s, type %d: %s\n",
                c.window, c.shift, c.rows, c.columns, c.heads, c.head_size, c.batch,
                c.masked ? "mask" : "no mask", c.packed ? ", packed" : "", type,
                bad || !masks ? "FAILED" : "written");
    if (bad) std::printf("  %d elements unwritten, or written where nothing belongs\n", bad);
    if (!masks) std::printf("  the masks differ, or are not written\n");
    return bad == 0 && masks;
}

// Where the epilogue writes, and that it writes there: the numbers drawn give none that is poison.
bool passes(EpilogueCase const& c, int type) {
    if (type == MAT_FLOAT && c.layout == MAT_CHANNELS_LAST) return true;  // there is none
    const size_t size = type == MAT_FLOAT ? 4 : 2;
    const int more = c.pad < 0 ? 0 : 2 * c.pad - 2;
    const size_t channels = c.layout == MAT_LINEAR ? c.channels : (c.channels + 7) / 8 * 8;
    const size_t pixels = static_cast<size_t>(c.height + more) * (c.width + more);
    const size_t images = c.batched ? c.batch : 1;
    MatEpilogue e{};
    e.batch = c.batch;
    e.channels = c.channels;
    e.height = c.height;
    e.width = c.width;
    e.filter = c.pad >= 0;
    e.pad = c.pad < 0 ? 0 : c.pad;
    e.gain = 1.0f;
    e.slope = c.parts ? 0.2f : 1.0f;
    e.type = type;
    e.layout = c.layout;
    const Memory x(numbers(c.batch * channels * c.height * c.width, type));
    const Memory y(std::vector<uint8_t>(c.batch * channels * pixels * size, kPoison));
    const Memory by_channel(numbers(images * c.channels, type));
    const Memory by_pixel(numbers(images * pixels, type));
    const Memory skip(numbers(images * channels * pixels, type));
    e.x = x.as<void>();
    e.y = y.as<void>();
    for (int part = 0; c.parts && part < MAT_PARTS; ++part) {
        const bool pixel = part == MAT_NOISE || part == MAT_RATIO;
        e.parts[part] = (part == MAT_SKIP ? skip : pixel ? by_pixel : by_channel).as<void>();
        e.batched[part] = c.batched;
    }
    must(static_cast<cudaError_t>(mat_epilogue(&e, nullptr)));
    must(cudaDeviceSynchronize());
    const int bad = wrong(y.bytes(), size, 1, 1);
    std::printf("epilogue of %dx%dx%dx%d, padding %d, %s, layout %d, type %d: %s\n", c.batch,
                c.channels, c.height, c.width, c.pad, c.parts ? "all parts" : "no parts", c.layout,
                type, bad ? "FAILED" : "written");
    if (bad) std::printf("  %d elements unwritten\n", bad);
    return bad == 0;
}

// A norm of a few tokens, all of whose memory is written.
bool passes(int channels, int type) {
    if (type == MAT_FLOAT) return true;  // there is none
    MatTokenNorm n{};
    n.batch = 2;
    n.channels = channels;
    n.height = 3;
    n.width = 5;
    n.floor = 0.01f;
    n.type = type;
    const size_t count = static_cast<size_t>(n.batch) * n.height * n.width *
                         ((channels + 7) / 8 * 8);
    const Memory x(numbers(count, type)), y(std::vector<uint8_t>(2 * count, kPoison));
    n.x = x.as<void>();
    n.y = y.as<void>();
    must(static_cast<cudaError_t>(mat_token_norm(&n, nullptr)));
    must(cudaDeviceSynchronize());
    const int bad = wrong(y.bytes(), 2, 1, 1);
    std::printf("norm of %d channels, type %d: %s\n", channels, type, bad ? "FAILED" : "written");
    return bad == 0;
}

}  // namespace

int main() {
    bool good = true;
    for (int type : {MAT_FLOAT, MAT_HALF, MAT_BFLOAT16}) {
        for (Case const& c : kCases) good &= passes(c, type);
        for (EpilogueCase const& c : kEpilogueCases) good &= passes(c, type);
        for (int channels : kNormChannels) good &= passes(channels, type);
    }
    return good ? 0 : 1;
}
