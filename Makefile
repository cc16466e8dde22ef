# popdet: every target does its own set-up in .venv. CONFIG, IPUS, TARGET, ARTIFACT, IMAGE and JOBS are the knobs.
CONFIG  ?= configs/voc0712-r50c4-mixed-4ipu.yaml
TARGET  ?= embedded
PYTHON  ?= python3
OUT     ?= artifacts
JOBS    ?= 2

VENV    := .venv
STAMP   := $(VENV)/.popdet-ready
POPDET  := $(VENV)/bin/popdet
IPU_OPT := $(if $(IPUS),--ipus $(IPUS),)
DEMO    := -c configs/shapes-tiny.yaml --out $(OUT)

.PHONY: help setup export compile compare train eval run demo custom-ops test lint clean

help:           ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

setup: $(STAMP) ## create .venv with the pinned libraries and build the host kernels

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[authoring,dev]'
	$(VENV)/bin/python -m custom_ops.host.build
	@touch $@

export: setup   ## PyTorch network -> reference.infer.onnx, reference.train.onnx
	$(POPDET) export -c $(CONFIG) --out $(OUT)

compile: setup  ## passes and pipeline stages -> artifact (IPUS=4, TARGET=embedded|ipu)
	$(POPDET) compile -c $(CONFIG) --out $(OUT) --target $(TARGET) $(IPU_OPT)

compare: setup  ## onnxruntime on the CPU against the compiled artifact; exit code 1 on mismatch
	$(POPDET) compare -c $(CONFIG) --out $(OUT)

train: setup    ## train through the pipelined program
	$(POPDET) train -c $(CONFIG) --out $(OUT)

eval: setup     ## average precision of the artifact on the config's evaluation split
	$(POPDET) eval -c $(CONFIG) --out $(OUT)

run: setup      ## ARTIFACT=... IMAGE=...: annotated PNG and COCO-style JSON
	@test -n "$(ARTIFACT)" -a -n "$(IMAGE)" || { echo 'usage: make run ARTIFACT=artifacts/NAME IMAGE=picture.jpg'; exit 2; }
	$(POPDET) run $(ARTIFACT) $(IMAGE)

demo: setup     ## the whole chain on a tiny detector: export, compile for 4 IPUs, compare, train, evaluate, run
	$(POPDET) export $(DEMO)
	$(POPDET) compile $(DEMO) --ipus 4
	$(POPDET) compare $(DEMO)
	$(POPDET) train $(DEMO)
	$(POPDET) eval $(DEMO) --min-ap50 0.5
	$(POPDET) compare $(DEMO)
	$(POPDET) run $(OUT)/shapes-tiny data/shapes-tiny/JPEGImages/val_000003.jpg

custom-ops: setup ## the IPU's ops and codelets, where a Poplar SDK is enabled (elsewhere: says what is missing, code 3)
	@$(VENV)/bin/python -m custom_ops.popart.build

test: setup     ## lint, types, the Python 3.8 check of the runner side, and the whole suite
	$(MAKE) --no-print-directory lint
	$(VENV)/bin/python -m pytest --numprocesses $(JOBS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/vermin --quiet --violations -t=3.8- --no-tips --eval-annotations runtime/*.py detection_data popdet custom_ops

clean:          ## remove build outputs (never artifacts or data)
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
