"""TensorRT engines: build, manifest, runtime, plugins."""
