# Two commands do everything on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO := demo

.PHONY: demo test lint clean

# Of kernel-lens only TensorRT's headers are wanted, hence nothing that it needs to run.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps kernel-lens==2.0.1
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m mat_export.demo $(DEMO)
	$(BIN)/mat-export onnx -o $(DEMO)/mat-tiny-256.onnx
	$(BIN)/mat-export parity $(DEMO)/mat-tiny-256.onnx --report $(DEMO)/parity
	mkdir -p $(DEMO)/filled
	$(BIN)/mat-export inpaint $(DEMO)/photo.png $(DEMO)/mask.png -o $(DEMO)/filled \
		--model $(DEMO)/mat-tiny-256.onnx --count 3 --sheet $(DEMO)/sheet.png
	@echo
	@echo "  one look at everything:  $(DEMO)/sheet.png"
	@echo "  filled pictures:         $(DEMO)/filled/"
	@echo "  proof of parity:         $(DEMO)/parity/index.html"

# A worker for each core, and a thread for each worker: more wait for each other, and take twice as long.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info
