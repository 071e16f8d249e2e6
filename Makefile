# Two commands: `make app` starts the app, `make test` runs every test. Both install what they need, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODELS := ddpm-digits ddpm-fashion uvit-digits uvit-fashion sd-fashion
SWEPT := 50 70 90 110 130 150 170 190 210 230 250 300 350
OMS := $(BIN)/python -m oms_core
PYTEST ?= --numprocesses auto --dist loadfile --no-loadscope-reorder
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -r
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true  # on all cores, as pip does not

.PHONY: app test check format signals clean

app: $(VENV)/.installed
	$(BIN)/streamlit run app.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST)

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The precomputed scenes, made by the commands that a user would run. Gradients are too large to
# ship; what was learned from them is not.
signals: export OMS_CACHE := assets/signals
signals: $(VENV)/.installed
	for model in $(MODELS); do \
	  $(OMS) score --model $$model --attack NA --steps 10 --traces 8 && \
	  $(OMS) evaluate --model $$model || exit 1; \
	done
	for captions in blip none; do $(OMS) score --model sd-fashion --captions $$captions || exit 1; done
	for table in 1 2 3 4 5 6 trajectory; do $(OMS) table $$table || exit 1; done
	$(OMS) table schemes --model ddpm-digits
	for figure in 1 2a 2b; do $(OMS) figure $$figure --out $(VENV)/figure.html || exit 1; done
	for attack in NA PIA; do for t in $(SWEPT); do \
	  $(OMS) score --attack $$attack --t $$t --limit 600 || exit 1; \
	done; done
	grep -rl '"attack": "GSA-gradients"' --include=manifest.json assets/signals | xargs -r -n 1 dirname | xargs -r rm -r

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) requirements.txt
	$(COMPILE)
	touch $@

$(VENV)/.installed-test: requirements-test.txt requirements-ray.txt $(VENV)/.installed
	$(INSTALL) requirements-test.txt
	$(COMPILE)
	touch $@

clean:
	rm -rf $(VENV) .cache .training .pytest_cache .ruff_cache
