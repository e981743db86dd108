"""TensorRT engines: build, manifest, runtime, plugins (to come)."""
