# demo, test and lab make their own environment in .venv on first use.
PYTHON ?= python3
DEMO := runs/quickstart

# The environment's own kernel runs the notebooks, also where the user has installed another "python3" kernel.
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: demo test lint lab clean

# The second plotly renderer writes plots that an HTML file can show without Jupyter.
demo: .venv/.installed
	mkdir -p $(DEMO)
	PLOTLY_RENDERER=plotly_mimetype+notebook .venv/bin/papermill notebooks/01_quickstart.ipynb \
		$(DEMO)/01_quickstart.ipynb --kernel python3 --execution-timeout 900 -p run_dir $(DEMO)/run $(DEMO_ARGS)
	.venv/bin/jupyter nbconvert --to html $(DEMO)/01_quickstart.ipynb
	@echo "Open $(CURDIR)/$(DEMO)/01_quickstart.html"

test: lint
	.venv/bin/python -m pytest $(PYTEST_ARGS)

lint: .venv/.installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

lab: .venv/.installed
	.venv/bin/jupyter lab

# Leaves runs/ alone.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit("covrl_lab needs Python 3.11 or newer and $(PYTHON) is " + v + ": name another with make PYTHON=python3.11")'
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e ".[notebooks,tests]"
	touch $@
