# Two commands: `make app` starts the app, `make test` runs every test. Both install what they need, once.
PYTHON ?= python3
VENV := .venv
MODELS := ddpm-digits ddpm-fashion uvit-digits sd-fashion
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

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

# The precomputed scenes, made by the command that a user would run.
signals: export OMS_CACHE := assets/signals
signals: $(VENV)/.installed
	for model in $(MODELS); do \
	  $(BIN)/python -m oms_core score --model $$model --attack NA,PIA --steps 10 --traces 8 && \
	  $(BIN)/python -m oms_core score --model $$model || exit 1; \
	done
	for captions in blip none; do \
	  $(BIN)/python -m oms_core score --model sd-fashion --captions $$captions || exit 1; \
	done

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(PIP) install --quiet -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) .cache .training .pytest_cache .ruff_cache
