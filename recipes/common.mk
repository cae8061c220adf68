# Shared by all recipes. Include it first: `include ../common.mk`.
#
# A recipe's targets are manifests and run directories. A finished run holds the file `done`. Until then, the same command
# resumes it, so nothing here deletes a run directory. Data are order-only prerequisites, so newer files do not restart
# a finished run. To train again, set another EXP or remove the run directory yourself.

ifneq ($(word 2,$(CURDIR)),)
$(error $(CURDIR): make cannot work in a path with a space; move the repository)
endif
ENV ?= k2
RECIPES := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
VENV := $(abspath $(RECIPES)/../.venv-$(ENV))
# asrkit as installed by `make setup`, else the one on PATH; set ASRKIT=... to use another.
ASRKIT ?= $(firstword $(wildcard $(VENV)/bin/asrkit) asrkit)
BIN := $(patsubst ./,,$(filter-out ./,$(dir $(ASRKIT))))
PYTHON := $(BIN)python
LHOTSE := $(BIN)lhotse
# Processes of data-parallel training, one per GPU. (torch 1.13's torchrun does not start on Python 3.11 without --redirects
# and --tee, because the enum behind their default has lost its 0. Its --standalone always uses the same port, so two
# trainings at once would collide. These options use a free one.)
NPROC ?= 1
TORCHRUN := $(BIN)torchrun --rdzv_backend c10d --rdzv_endpoint localhost:0 --nproc_per_node $(NPROC) --redirects 1 --tee 1
TRAINER := $(if $(filter 1,$(NPROC)),$(ASRKIT),$(TORCHRUN) -m asrkit)
TRAIN := $(TRAINER) train-backbone
# The recipe's folders for data and for run directories.
DATA ?= data
EXP ?= exp
# Appended to every training command, for example: SET="--set training.steps=100".
SET ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := all
.SECONDARY:
.PHONY: all
