# Every target does its own set-up: `make demo` and `make test` are all a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is kept, whatever the environment says: the tests start hundreds of processes.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install demo docs check test test-all tests test-fast test-cluster test-fault bench image clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench,docs]'
	touch $@

demo: install
	$(BIN)/python workflows/pipeline.py --config configs/demo.yaml out=runs/demo
	@echo "The demo wrote runs/demo. Look at:"
	@echo "  runs/demo/report.html                            all of it in a browser, stage by stage; the rest are its files"
	@echo "  runs/demo/cohort/figures/contact_sheet.png       the phantom fields with their targets"
	@echo "  runs/demo/folds/figures/oof_examples.png         predictions on images a fold never saw"
	@echo "  runs/demo/folds/figures/folds.png                learning curves; also: tensorboard --logdir runs/demo/folds"
	@echo "  runs/demo/folds/ensemble.json, folds.parquet     the trained members and their scores"
	@echo "  runs/demo/thresholds/report.md                   thresholds searched on those images, and what they are worth"
	@echo "  runs/demo/scores/contact_sheet.png               the hold-out images as the ensemble sees them; masks/, overlays/"
	@echo "  runs/demo/slides/report.md, overviews/, galleries/   a phantom slide, and the figures of a whole slide"
	@echo "  runs/demo/slides_evaluation/report.md            how good these are: Dice, targets, FROC"
	@echo "  runs/demo/evaluation/report.md                   how good the scores of the fields are, with intervals and figures"

# Pages that open from disk: site/index.html.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "The documentation is in site/: open site/index.html"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Three on two cores: tests of stages wait for processes that start.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder

# The checks side by side with the tests, which wait now and then.
test: install
	$(MAKE) --jobs=2 check tests CHOSEN='-m "not long"'

# With the long ones: jobs on clusters of their own, and stages of which processes or nodes are killed on the way.
test-all: install
	$(MAKE) --jobs=2 check tests

tests: install
	$(PYTEST) $(CHOSEN) --cov --cov-report term

# The library alone, for the inner loop: no Ray.
test-fast: install
	$(PYTEST) --ignore tests/workflows --ignore tests/scoring --ignore tests/folds

# Clusters as users have them: a real Slurm of two nodes, and stages on hosts of namespaces under faults of network,
# disks and object store, with a table at the end. Root only; hours, or minutes with STAS_TEST_CLUSTER=short, which
# leaves all but one fault out. It needs Debian's slurm-wlm, munge, iproute2, openssh-server and rsync.
STAS_TEST_CLUSTER ?= yes
test-cluster: install
	STAS_TEST_CLUSTER=$(STAS_TEST_CLUSTER) $(BIN)/python -m pytest -rs tests/cluster

# The one fault of CI.
test-fault: install
	STAS_TEST_CLUSTER=short $(BIN)/python -m pytest -rs tests/cluster/test_faults.py

# Left out: scripts that need a GPU, and those that need arguments.
bench: install
	for script in tests/bench/[a-z]*.py; do \
		case $$script in *_gpu.py|*/ensemble_gain.py) ;; *) \
			$(BIN)/python -m tests.bench.$$(basename $$script .py) || exit 1 ;; esac; done

# The image of cluster nodes (see cluster/Dockerfile). DEVICE: cuda or cpu. CONTAINER: docker, podman, buildah...
CONTAINER ?= docker
DEVICE ?= cuda
PACKAGES ?=
TAG ?= stas:$(DEVICE)

image: VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' stas_core/__init__.py)
image: COMMIT = $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
image:
	$(CONTAINER) build --file cluster/Dockerfile --build-arg DEVICE=$(DEVICE) --build-arg PACKAGES="$(PACKAGES)" \
		--build-arg VERSION="$(VERSION)" --build-arg COMMIT="$(COMMIT)" --tag "$(TAG)" .

clean:
	rm -rf runs/demo $(VENV)
