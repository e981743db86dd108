// Stands in for TensorRT's library, of the version that the environment's VERSION says: a registry
// that tells the names of the creators it knows, in order, and a logger that remembers.
#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

class Registry final : public IPluginRegistry {
   public:
    bool registerCreator(IPluginCreatorInterface& creator,
                         AsciiChar const* const) noexcept override {
        known.push_back(static_cast<IPluginCreatorV3One*>(&creator));
        return true;
    }
    bool deregisterCreator(IPluginCreatorInterface const& creator) noexcept override {
        auto place = std::find(known.begin(), known.end(), &creator);
        if (place == known.end()) return false;
        known.erase(place);
        return true;
    }

    // Of no interest here.
    bool registerCreator(IPluginCreator&, AsciiChar const* const) noexcept override {
        return false;
    }
    bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
    IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override {
        return nullptr;
    }
    IPluginCreator* getPluginCreator(AsciiChar const* const, AsciiChar const* const,
                                     AsciiChar const* const) noexcept override {
        return nullptr;
    }
    void setErrorRecorder(IErrorRecorder* const) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool const) override {}
    PluginLibraryHandle loadLibrary(AsciiChar const*) noexcept override { return nullptr; }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    IPluginCreatorInterface* const* getAllCreators(int32_t* const) const noexcept override {
        return nullptr;
    }
    IPluginCreatorInterface* getCreator(AsciiChar const* const, AsciiChar const* const,
                                        AsciiChar const* const) noexcept override {
        return nullptr;
    }
    IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override {
        return nullptr;
    }
    int32_t releasePluginResource(AsciiChar const*) noexcept override { return 1; }
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const) noexcept override {
        return nullptr;
    }

    std::vector<IPluginCreatorV3One*> known;
};

class Logger final : public ILogger {
   public:
    void log(Severity, char const* line) noexcept override { last = line; }
    std::string last;
};

Logger logger;

Registry& own() {
    static Registry registry;
    return registry;
}

}  // namespace

extern "C" IPluginRegistry* getPluginRegistry() noexcept { return &own(); }

extern "C" ILogger* getLogger() noexcept { return &logger; }

extern "C" int32_t getInferLibVersion() noexcept { return std::atoi(std::getenv("VERSION")); }

// The names, a space between them.
extern "C" char const* registered() {
    static std::string names;
    names.clear();
    for (IPluginCreatorV3One* creator : own().known) {
        if (!names.empty()) names += ' ';
        names += creator->getPluginName();
    }
    return names.c_str();
}

// What the logger heard last.
extern "C" char const* last_line() { return logger.last.c_str(); }
