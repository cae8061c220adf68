# What the recipes share. Include it first: `include ../common.mk`.
#
# A recipe's targets are manifests and run directories. A finished run holds the file `done`; until then the same command
# goes on where the run stopped, so nothing here deletes a run directory, and data are order-only prerequisites: newer
# files do not start a finished run anew. To train again, give another EXP or remove the run directory yourself.

ENV ?= k2
RECIPES := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
VENV := $(abspath $(RECIPES)/../.venv-$(ENV))
# The command of `make setup` if it is there, else the one on PATH; give ASRKIT=... for another.
ASRKIT ?= $(firstword $(wildcard $(VENV)/bin/asrkit) asrkit)
BIN := $(patsubst ./,,$(filter-out ./,$(dir $(ASRKIT))))
PYTHON := $(BIN)python
LHOTSE := $(BIN)lhotse
# Processes of data-parallel training, one a GPU. (torch 1.13's torchrun does not start on Python 3.11 without --redirects
# and --tee: the enum behind their default has lost its 0; and its --standalone takes one port for all, so that two trainings
# at once meet in it. These options take a free one.)
NPROC ?= 1
TORCHRUN := $(BIN)torchrun --rdzv_backend c10d --rdzv_endpoint localhost:0 --nproc_per_node $(NPROC) --redirects 1 --tee 1
TRAINER := $(if $(filter 1,$(NPROC)),$(ASRKIT),$(TORCHRUN) -m asrkit)
TRAIN := $(TRAINER) train-backbone
# Recordings are read from, and manifests and runs written to, these folders of the recipe.
DATA ?= data
EXP ?= exp
# Appended to every training command, for example SET="--set training.steps=100".
SET ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := all
.SECONDARY:
.PHONY: all
