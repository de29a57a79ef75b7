# demo, test and lab make their own environment in .venv on first use.
PYTHON ?= python3
DEMO := runs/quickstart

# The environment's own kernel runs the notebooks, also where the user has installed another "python3" kernel.
export JUPYTER_PREFER_ENV_PATH := 1
# As in covrl_lab/__init__.py, also where a notebook imports torch first.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 2000

.PHONY: demo test quick lint bench gpu-check torture trials lab learning clean

# The second plotly renderer writes plots that an HTML file can show without Jupyter.
demo: .venv/.installed
	mkdir -p $(DEMO)
	PLOTLY_RENDERER=plotly_mimetype+notebook .venv/bin/papermill notebooks/01_quickstart.ipynb \
		$(DEMO)/01_quickstart.ipynb --kernel python3 --execution-timeout 3600 -p run_dir $(DEMO)/run $(DEMO_ARGS)
	.venv/bin/jupyter nbconvert --to html $(DEMO)/01_quickstart.ipynb
	@echo "Open $(CURDIR)/$(DEMO)/01_quickstart.html"

# Two workers: one runs what drives browsers, grids and notebooks, one after the other; see tests/conftest.py.
PYTEST := .venv/bin/python -m pytest -n 2 --no-loadscope-reorder
test: lint
	$(PYTEST) $(PYTEST_ARGS)

# Without the tests marked slow: for every edit.
quick: lint
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

lint: .venv/.tests
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

# The learning curves of notebooks/08_results.ipynb: six runs, about 8 minutes each on one free core. An
# interrupted run resumes; the files to look at are copied next to the notebook.
TRAIN := OMP_NUM_THREADS=1 .venv/bin/covrl-lab train --steps 30 --eval_questions 200 --run_dir runs/learning
learning: .venv/.installed
	for seed in 0 1 2; do \
		$(TRAIN)/covrl-s$$seed --seed $$seed --method covrl_published && \
		$(TRAIN)/prior_only-s$$seed --seed $$seed --method covrl_published --alpha 1 --composite_weight 1 --kl_weight 0 || exit 1; \
	done
	for run in runs/learning/*; do \
		kept=notebooks/results/learning/$$(basename $$run) && mkdir -p $$kept && \
		cp -r $$run/config.json $$run/metrics.jsonl $$run/evaluations.jsonl $$run/evaluations $$kept || exit 1; \
	done

# Our step against TRL's, the machine's limits, and how time and memory grow: about 30 minutes of a quiet
# machine. What is measured already is kept (BENCH_ARGS=--again measures anew).
bench: .venv/.installed
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	.venv/bin/python -m tests.bench.benchmark $(BENCH_ARGS)

# Numbers, speed and memory on a graphics card, at most ten minutes; CHECK_ARGS="--device cpu" tries the script alone.
gpu-check: .venv/.installed
	.venv/bin/python -m tests.bench.gpu_check --out notebooks/results/speed/gpu_check.json $(CHECK_ARGS)

# Runs killed at random and at every write, and load: a table. TORTURE_ARGS="--kills 40 --steps 0" does less.
torture: .venv/.tests
	.venv/bin/python -m tests.bench.torture $(TORTURE_ARGS)

# Methods on tasks of one to three steps (tests/bench/trials.py): a run takes 4 to 6 minutes on one free core. What
# is done already is kept: make trials TRIALS_ARGS="--methods covrl grpo --seeds 0".
trials: .venv/.installed
	.venv/bin/python -m tests.bench.trials $(TRIALS_ARGS)

lab: .venv/.installed
	.venv/bin/jupyter lab

# Leaves runs/ alone.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit("covrl_lab needs Python 3.11 or newer and $(PYTHON) is " + v + ": name another with make PYTHON=python3.11")'
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e ".[notebooks]"
	touch $@

# What the tests need besides. A part of reasoning-gym may have to be built, with a C compiler and Python's headers.
.venv/.tests: .venv/.installed
	.venv/bin/python -m pip install -c constraints.txt -e ".[notebooks,tests]"
	touch $@
