# Every target does its own set-up and is quick when nothing has changed.
# Without make: python tools/run.py, python tools/test.py, …

PYTHON ?= python3
ARGS ?=
ONLY ?=

.DEFAULT_GOAL := help
.PHONY: help run serve test lint bench comfyui setup page clean

help:
	@echo "AttnScope"
	@echo
	@echo "  make run        server, page and a ComfyUI that samples the demo model; ARGS=--no-browser"
	@echo "  make serve      the server alone, for a ComfyUI of your own"
	@echo "  make test       every test, with a real ComfyUI and a real browser; ARGS=\"tests/unit -k name\""
	@echo "  make lint       style and types; ARGS=--fix mends what it can"
	@echo "  make bench      every benchmark; ONLY=<result name> for one, ARGS=--list for the names"
	@echo "  make comfyui    get the pinned ComfyUI"
	@echo "  make setup      the virtual environment alone"
	@echo "  make page       the page alone"
	@echo "  make clean      remove what was built; environments, downloads and your runs stay"
	@echo
	@echo "  PYTHON=<path>            Python 3.11 to 3.13 for the virtual environment"
	@echo "  COMFYUI_DIR=<folder>     a ComfyUI of your own; COMFYUI_PYTHON=<path> its Python"
	@echo "  ATTNSCOPE_PORT, COMFYUI_PORT, CHROMIUM=<path>"
	@echo
	@echo "Without make: python tools/run.py, python tools/test.py and so on."

run serve test lint setup page:
	@"$(PYTHON)" tools/$@.py $(ARGS)

bench:
	@"$(PYTHON)" tools/bench.py $(if $(ONLY),--only "$(ONLY)") $(ARGS)

comfyui:
	@"$(PYTHON)" tools/comfyui.py

clean:
	rm -rf .build build dist frontend/dist attnscope.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
