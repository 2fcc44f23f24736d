# make demo          set up, distil the embedded teacher, measure, draw a picture, serve (SERVE=0 stops before serving;
#                    TEACHER=transformer takes the embedded transformer in place of the UNet)
# make test          set up and run the tests        make test-slow   the long ones as well
# make check         format, lint and fast tests, as CI does
# make fuzz          thousands of changed files through every loader     make mutants   531 changed lines, each of which a test must notice
# make soak          kill runs of every method at random, and compare what they end with (half an hour of a core)
# make lowest        the lowest allowed versions of all packages, and tests that touch each     make advisories   their known weaknesses
# make assets        train everything in assets/ again (some hours of two cores)

PYTHON ?= python3
SERVE ?= 1
TEACHER ?= unet
PORT ?= 7860
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# glibc keeps what is freed, in huge pages, which takes up to a fifth off a training step (benchmarks/allocator.json).
MEMORY := GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4294967296
RUN := $(MEMORY) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python
LAUNCH := $(MEMORY) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --config_file training/accelerate

# What the demo distils, by which recipe, and where its run lies.
ifeq ($(TEACHER),unet)
DEMO_TEACHER := assets/teacher
DEMO_RECIPE := training/recipes/demo.yaml
DEMO_RUN := runs/demo
else ifeq ($(TEACHER),transformer)
DEMO_TEACHER := assets/transformer
DEMO_RECIPE := training/recipes/transformer_dmd2.yaml
DEMO_RUN := runs/transformer_dmd2
else
$(error TEACHER=$(TEACHER) is none of the embedded teachers; set it to unet or transformer)
endif

# Set in many containers, it would have every process below compile torch and diffusers anew, in 13 seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-slow check lowest advisories fuzz mutants soak assets
.DELETE_ON_ERROR:

install: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "stepdistill needs Python 3.10 or newer; set PYTHON=python3.11, say.")'
	$(PYTHON) -m venv .venv
	@# uv fetches and unpacks many files at once, in a minute where pip takes four. It knows nothing of pip's own configuration: where
	@# it is not to be had or finds no index, pip does it.
	{ $(PIP) uv && $(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[dev]"; } || $(PIP) -e ".[dev]"
	@touch $@

demo: $(READY)
	$(LAUNCH)/2cpu.yaml -m training.train $(DEMO_RECIPE)
	$(LAUNCH)/2cpu.yaml -m evaluation run --pipeline $(DEMO_RUN)/student --teacher $(DEMO_TEACHER) --steps 1,4 --teacher-guidance 2 \
	    --n 500 --out $(DEMO_RUN)/results
	$(RUN) -m evaluation picture --teacher $(DEMO_TEACHER) --student $(DEMO_RUN)/student --student-steps 4,1 --smooth \
	    --out $(DEMO_RUN)/picture.png
	@echo "the table is in $(DEMO_RUN)/results/results.md, the picture in $(DEMO_RUN)/picture.png"
	@if [ "$(SERVE)" != 0 ]; then $(RUN) -m app --student $(DEMO_RUN)/student --teacher $(DEMO_TEACHER) --port $(PORT); fi

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The lowest allowed versions, in an environment of their own, and the tests that touch each of them.
SMOKE := tests/test_imports.py tests/test_config.py tests/test_lora.py tests/training/test_webdataset.py tests/training/test_trackers.py \
    tests/families/test_loading.py tests/app/test_app_request.py tests/evaluation/test_evaluate.py tests/security/test_data_files.py \
    tests/test_onnx_form.py tests/training/test_streamed.py

lowest: $(READY)
	$(BIN)/uv venv --clear --python $(BIN)/python .venv/lowest
	$(BIN)/uv pip install --quiet --python .venv/lowest/bin/python --resolution lowest-direct -e ".[dev]"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv/lowest/bin/python -m pytest $(SMOKE)

# Known weaknesses of what is installed; where no database of them is reachable, that is said.
advisories: $(READY)
	$(BIN)/python tests/advisories.py

# Both go on where they stopped, and keep their results: tests/fuzz/fuzz.json, tests/mutants/mutants.json.
fuzz: $(READY)
	$(RUN) tests/fuzz

mutants: $(READY)
	$(RUN) tests/mutants

# Goes on where it was; remove benchmarks/soak.json to begin again.
soak: $(READY)
	$(RUN) tests/soak.py

# Each step is skipped where its result exists; remove assets/NAME to make it again.
assets: $(READY) assets/teacher/vae/training.json assets/clip/training.json assets/scenes-v1/training.json \
        assets/teacher/unet/config.json assets/student/stepdistill.json assets/ar/transformer/training.json \
        assets/tiny_decoder/training.json assets/transformer/transformer/config.json

assets/teacher/vae/training.json:
	$(RUN) -m training.embedded.vae --out runs/vae --steps 12000 --stop 7500
	$(RUN) -m training.embedded.vae --out assets/teacher/vae --init runs/vae --steps 3600 --lr 1e-3 --seed 1

assets/tiny_decoder/training.json: | assets/teacher/vae/training.json
	$(RUN) -m training.embedded.decoder --out assets/tiny_decoder --steps 1600 --pool 1536 --lr 3e-3

assets/clip/training.json:
	$(RUN) -m training.embedded.clip --clip runs/clip/clip --teacher runs/clip/teacher --steps 3000 --stop 1353
	$(RUN) -m training.embedded.clip --clip assets/clip --teacher assets/teacher --init runs/clip/clip --steps 1500 --lr 8e-4 --seed 1

assets/scenes-v1/training.json:
	$(RUN) -m training.embedded.features --data scenes --name scenes-v1 --out assets/scenes-v1

assets/teacher/unet/config.json: | assets/teacher/vae/training.json assets/clip/training.json
	$(LAUNCH)/2cpu.yaml -m training.train training/recipes/scenes_teacher.yaml
	$(RUN) -m training.embedded.ship runs/scenes_teacher/student assets/teacher

assets/student/stepdistill.json: | assets/teacher/unet/config.json
	$(LAUNCH)/2cpu.yaml -m training.train training/recipes/scenes_dmd2.yaml
	$(RUN) -m training.embedded.ship runs/scenes_dmd2/student assets/student --share assets/teacher

assets/transformer/transformer/config.json: | assets/teacher/vae/training.json assets/clip/training.json
	$(RUN) -m training.embedded.shapes sd3 runs/shapes/sd3
	$(LAUNCH)/cpu.yaml -m training.train training/recipes/transformer_teacher.yaml
	$(RUN) -m training.embedded.ship runs/transformer_teacher/student assets/transformer --share assets/teacher

assets/ar/vqvae/training.json: | assets/teacher/vae/training.json
	$(RUN) -m training.embedded.vq --vae assets/teacher/vae --out assets/ar/vqvae --steps 1500 --stop 1220

assets/ar/transformer/training.json: | assets/ar/vqvae/training.json assets/clip/training.json
	$(RUN) -m training.embedded.ar --vqvae assets/ar/vqvae --text assets/teacher --out runs/ar --steps 1800 --pool 5000
	$(RUN) -m training.embedded.ar --vqvae assets/ar/vqvae --text assets/teacher --out runs/ar2 --init runs/ar --steps 1800 --pool 8000 \
	    --lr 1.5e-3 --seed 1
	$(RUN) -m training.embedded.ar --vqvae assets/ar/vqvae --text assets/teacher --out assets/ar --init runs/ar2 --steps 2400 --pool 10000 \
	    --lr 1.5e-3 --seed 2
