# make quickstart                install, then train ConvMLP-S on real handwritten digits (two or three minutes on two cores)
# make quickstart-detection      install, then find and outline digits on photographs: RetinaNet and Mask R-CNN
# make quickstart-segmentation   install, then label their pixels: Semantic FPN
# make benchmark-accuracy        install, then train ConvMLP-S and peers of timm on Fashion-MNIST, three seeds each (hours)
# make ablation                  the same for the four steps from Pure-MLP to ConvMLP-S
# make pictures                  install, then make the pictures of README and docs (a quarter of an hour)
# make test                      install, then run the quick tests (eight minutes on two cores)
# make test-slow                 the long ones: fuzzing, killed runs, recipes with other packages
# make coverage                  both, with the branches that no test reaches
# make lint                      ruff, mypy, codespell; make format fixes what ruff can
# make fuzz                      forty thousand random inputs (half an hour); `make test-slow` tries some of them
# make survive                   kill a training run twenty times, with one process and with two (a quarter of an hour)
# make test-upstream             the tests of detection and segmentation with OpenMMLab's own packages
# Each target sets up .venv by itself, once. PYTHON=python3.12 make ... takes another interpreter.

PYTHON ?= python3
VENV = .venv
INSTALLED = $(VENV)/.installed

.PHONY: install quickstart quickstart-detection quickstart-segmentation benchmark-accuracy ablation pictures
.PHONY: test test-slow coverage test-upstream fuzz survive lint format clean

install: $(INSTALLED)

$(INSTALLED): $(VENV)/.quickstart
	@$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(VENV)/.quickstart: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13) and "Python 3.10 to 3.13 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@echo "Installing into $(VENV): PyTorch with its CUDA libraries, about 6 GB. Once."
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --upgrade pip
	@$(VENV)/bin/python -m pip install --quiet --editable '.[tools]'
	@touch $@

quickstart: $(VENV)/.quickstart
	$(VENV)/bin/convmlp train -c quickstart --overwrite $(ARGS)

SCENES = output/scenes
# Written at the end of the run, beside best.pth
BACKBONE = output/quickstart_crops/confusion_matrix.png

$(SCENES)/.complete: | $(INSTALLED)
	$(VENV)/bin/python tools/digit_scenes.py $(SCENES)
	@touch $@

$(BACKBONE): $(SCENES)/.complete
	PYTHON=$(VENV)/bin/python ./dist_classification.sh 1 -c configs/classification/quickstart_crops.yml --overwrite $(BACKBONE_ARGS) $(SCENES)/crops

quickstart-detection: $(INSTALLED) $(BACKBONE)
	for model in retinanet maskrcnn; do \
	    PYTHON=$(VENV)/bin/python ./dist_detection.sh configs/detection/quickstart_$$model.py 1 $(SCENES)/detection \
	        --amp --overwrite --show-dir output/quickstart_$$model/pictures $(ARGS) || exit 1; \
	done

quickstart-segmentation: $(INSTALLED) $(BACKBONE)
	PYTHON=$(VENV)/bin/python ./dist_segmentation.sh configs/segmentation/quickstart_fpn.py 1 $(SCENES)/segmentation \
	    --amp --overwrite --show-dir output/quickstart_fpn/pictures $(ARGS)

# Debian's package dataset-fashion-mnist has this folder
CLOTHES = /usr/share/datasets/fashion-mnist

benchmark-accuracy: $(VENV)/.quickstart
	$(VENV)/bin/python tools/accuracy.py $(CLOTHES) $(ARGS)

ablation: $(VENV)/.quickstart
	$(VENV)/bin/python tools/accuracy.py $(CLOTHES) --ablation $(ARGS)

pictures: $(INSTALLED)
	$(VENV)/bin/python tools/pictures.py $(ARGS)

# Two files at a time, each on one core
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

test: $(INSTALLED)
	$(PYTEST) $(ARGS)

test-slow: $(INSTALLED)
	$(PYTEST) -m slow --dist worksteal $(ARGS)

coverage: $(INSTALLED)
	$(PYTEST) -m "slow or not slow" --cov --cov-report=term:skip-covered $(ARGS)

fuzz: $(INSTALLED)
	CONVMLP_FUZZ=long $(VENV)/bin/python -m pytest -m "slow or not slow" -k fuzz $(ARGS)

survive: $(INSTALLED)
	$(VENV)/bin/python tools/survive.py $(ARGS)
	$(VENV)/bin/python tools/survive.py --processes 2 $(ARGS)

# Both families of packages provide the modules mmcv, mmengine, mmdet and mmseg, so each needs its own environment.
test-upstream: $(VENV)-upstream/.installed
	$(VENV)-upstream/bin/python -m pytest tests/openmmlab $(ARGS)

$(VENV)-upstream/.installed: pyproject.toml setup.py
	@test -x $(VENV)-upstream/bin/pip || $(PYTHON) -m venv $(VENV)-upstream
	@$(VENV)-upstream/bin/python -m pip install --quiet --editable '.[openmmlab-upstream,test]'
	@touch $@

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-upstream build dist output src/*.egg-info
