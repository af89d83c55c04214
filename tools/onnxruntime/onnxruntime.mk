# The pinned ONNX Runtime shared library, in the cache directory. Does nothing
# when it is there with the right hash, or when ONNXRUNTIME_LIB names one.
.PHONY: onnxruntime
onnxruntime:
	@go run ./tools/onnxruntime
