// What the library says of itself, to whoever opens it: no GPU and no TensorRT is needed.
//
// CMakeLists.txt gives the architectures, the compiler and the digest of the sources.
#include "plugin_common.h"

#if NV_TENSORRT_MAJOR >= 10
#define MAT_INTERFACE "V3"
#else
#define MAT_INTERFACE "V2"
#endif

// JSON; engines/plugins/library.py reads it.
MAT_EXPORT char const* mat_plugins_describe() {
    return "{\"interface\": \"" MAT_INTERFACE "\", "
           "\"tensorrt\": \"" MAT_TEXT(NV_TENSORRT_MAJOR) "." MAT_TEXT(NV_TENSORRT_MINOR) "."
           MAT_TEXT(NV_TENSORRT_PATCH) "\", "
           "\"tensorrt_major\": " MAT_TEXT(NV_TENSORRT_MAJOR) ", "
           "\"architectures\": \"" MAT_ARCHITECTURES "\", "
           "\"compiler\": \"" MAT_COMPILER "\", "
           "\"sources\": \"" MAT_SOURCES "\"}";
}
