# The pinned ONNX Runtime shared library, in the cache directory. Does nothing
# when it is there with the right hash, or when ONNXRUNTIME_LIB names one.
.PHONY: onnxruntime
onnxruntime: ## Fetch the pinned ONNX Runtime into the cache
	@go run ./tools/onnxruntime
