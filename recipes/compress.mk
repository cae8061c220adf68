# Integers and masks on a recipe's float model. A recipe sets these variables and includes this file after ../common.mk:
#
#     FLOAT      the float run directory        MATERIAL   training data and settings: --manifest, --dev, ...
#     SMALLER    where the results go           TESTS      manifests to evaluate on
#
#     int8 int4 int4a8 int4a4 int2     untrained: float weights as integers; a8 and a4 have integer inputs, int2 has blocks with zero points
#     int8-trained ... int2-trained    the same, trained with the float model as teacher; int2 as published: clipped, with a gradient
#                                      through its scales (arXiv 2305.16619)
#     int4-alone                       int4 trained without a teacher
#     sparse sparse-int4               2 of every 4 weights; then 4 bits each, trained again
#     joint joint-few                  both in one fine-tuning, the mask computed once or 50 times (US20250078815A1); half as long as the two
#     joint-alone                      joint without a teacher
#     joint-1of4                       1 of every 4 weights: the negative control
#     float-trained                    4 of every 4 weights: the same training without any pruning
#     onnx                             sparse-int4, exported
BITS_int8 := --bits 8
BITS_int4 := --bits 4
BITS_int4a8 := --bits 4 --act-bits 8
BITS_int4a4 := --bits 4 --act-bits 4
BITS_int2 := --bits 2 --set weights.symmetric=false --set weights.scale=block --set weights.block_size=32
# qat has the same settings one group deeper.
TRAINED_int2 := --bits 2 --set quantization.weights.symmetric=false --set quantization.weights.scale=block \
    --set quantization.weights.block_size=32 --set quantization.weights.clip=search --set quantization.weights.scale_gradient=true
UNTRAINED := int8 int4 int4a8 int4a4 int2
# Trained with qat: the teacher, then the rest.
TEACHER = --teacher $(FLOAT)
JOINT_joint := --sparsity 2:4
JOINT_joint-few := --sparsity 2:4 --shots 50
JOINT_joint-alone := --sparsity 2:4
JOINT_joint-1of4 := --sparsity 1:4
JOINT := int4-alone joint joint-few joint-alone joint-1of4
SPARSITY_sparse := 2:4
SPARSITY_float-trained := 4:4
PRUNED := sparse float-trained
COMPRESSED := $(UNTRAINED) $(UNTRAINED:%=%-trained) $(PRUNED) sparse-int4 $(JOINT)

.PHONY: compress
compress: $(SMALLER)/float/evaluation/done $(COMPRESSED:%=$(SMALLER)/%/evaluation/done) $(SMALLER)/onnx/evaluation/done
	$(ASRKIT) summary $(SMALLER)/float $(COMPRESSED:%=$(SMALLER)/%) $(SMALLER)/onnx \
	    --baseline $(SMALLER)/float --out $(SMALLER)/summary.json

$(SMALLER)/float/done: | $(FLOAT)/done
	mkdir -p $(SMALLER)
	ln -sfn $(abspath $(FLOAT)) $(@D)

$(UNTRAINED:%=$(SMALLER)/%/done): $(SMALLER)/%/done: | $(FLOAT)/done
	$(ASRKIT) quantize --from $(FLOAT) $(BITS_$*) --out $(@D)

$(UNTRAINED:%=$(SMALLER)/%-trained/done): $(SMALLER)/%-trained/done: | $(FLOAT)/done
	$(ASRKIT) qat --from $(FLOAT) --teacher $(FLOAT) $(or $(TRAINED_$*),$(BITS_$*)) $(MATERIAL) --out $(@D)

$(JOINT:%=$(SMALLER)/%/done): $(SMALLER)/%/done: | $(FLOAT)/done
	$(ASRKIT) qat --from $(FLOAT) $(if $(findstring alone,$*),,$(TEACHER)) --bits 4 $(JOINT_$*) $(MATERIAL) --out $(@D)

$(PRUNED:%=$(SMALLER)/%/done): $(SMALLER)/%/done: | $(FLOAT)/done
	$(ASRKIT) prune --from $(FLOAT) --teacher $(FLOAT) --sparsity $(SPARSITY_$*) $(MATERIAL) --out $(@D)

$(SMALLER)/sparse-int4/done: | $(SMALLER)/sparse/done
	$(ASRKIT) qat --from $(SMALLER)/sparse --teacher $(FLOAT) --bits 4 $(MATERIAL) --out $(@D)

$(SMALLER)/onnx/export.yaml: | $(SMALLER)/sparse-int4/done
	$(ASRKIT) export --from $(SMALLER)/sparse-int4 --out $(@D)

define EVALUATE
for manifest in $(TESTS); do \
    $(ASRKIT) evaluate --from $(@D:%/evaluation=%) --manifest $$manifest --method greedy --method beam; done
touch $@
endef

$(SMALLER)/%/evaluation/done: | $(SMALLER)/%/done
	$(EVALUATE)

$(SMALLER)/onnx/evaluation/done: | $(SMALLER)/onnx/export.yaml
	$(EVALUATE)
