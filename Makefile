# `make help` lists the targets.

BUILD    := build
PACKAGES := ./...
# What runs goroutines of its own, and is fast enough under the race detector.
RACED    := ./reference/... ./fixtures/... ./conformance/backends/... ./tools/gptoss
# What needs neither cgo (ONNX Runtime) nor to start itself again.
PORTABLE := ./reference/... ./exporter/... ./fixtures/... ./golden/... ./conformance/backends/recorded ./conformance/backends/reference
.DEFAULT_GOAL := help

include $(wildcard tools/*/*.mk)

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*[#]# ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*[#]# (.*)/\1\t\2/' | expand -t 16

.PHONY: conformance
conformance: onnxruntime ## Judge every stage and write build/report (about a minute)
	@mkdir -p $(BUILD)
	@rm -rf $(BUILD)/report
	@go test -count=1 -timeout 20m ./conformance/... > $(BUILD)/conformance.log 2>&1; tests=$$?; \
	if [ -f $(BUILD)/report/report.json ]; then \
		go run ./tools/gptoss report $(BUILD)/report/report.json; verdict=$$?; \
		echo; echo "In full: $(BUILD)/report/report.html, report.md, report.json; go test: $(BUILD)/conformance.log"; \
	else \
		verdict=2; cat $(BUILD)/conformance.log; echo "no report was written"; \
	fi; \
	if [ $$tests -ne 0 ] && [ $$verdict -eq 0 ]; then \
		grep -vE '^(ok|\?) ' $(BUILD)/conformance.log | tail -40; echo "go test ./conformance/... failed"; exit 1; \
	fi; \
	exit $$verdict

.PHONY: test
test: onnxruntime ## Run every check: gofmt, vet, staticcheck, all tests, the race detector
	@unformatted=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go')); \
	if [ -n "$$unformatted" ]; then echo "gofmt -w is due on:"; echo "$$unformatted"; exit 1; fi
	go vet $(PACKAGES)
	go tool staticcheck $(PACKAGES)
	go test -count=1 -timeout 20m $(TESTFLAGS) $(PACKAGES)
	go test -count=1 -timeout 20m $(TESTFLAGS) -race $(RACED)

.PHONY: arm64
arm64: ## Run the tests that need no cgo as arm64, under qemu (three minutes)
	@qemu=$$(command -v qemu-aarch64 || command -v qemu-aarch64-static) || \
		{ echo "qemu-aarch64 is missing: install qemu-user (on Debian and Ubuntu: apt install qemu-user)"; exit 1; }; \
	CGO_ENABLED=0 GOARCH=arm64 go test -count=1 -timeout 20m $(TESTFLAGS) -exec "$$qemu" $(PORTABLE)

.PHONY: build
build: onnxruntime ## Make build/gptoss
	@mkdir -p $(BUILD)
	go build -o $(BUILD)/gptoss ./tools/gptoss

.PHONY: bench
bench: onnxruntime ## Run the benchmarks
	go test -run '^$$' -bench . -benchmem $(PACKAGES)

.PHONY: separation
separation: $(BUILD)/report/report.json ## Measure right implementations against faults, into conformance/README.md
	go run ./tools/gptoss separation --report $(BUILD)/report/report.json --write conformance/README.md

$(BUILD)/report/report.json:
	$(MAKE) conformance

.PHONY: clean
clean: ## Remove build/, but not the oracles' environment
	find $(BUILD) -mindepth 1 -maxdepth 1 ! -name oracles -exec rm -rf {} + 2>/dev/null || true
