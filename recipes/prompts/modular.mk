# The table on modular training in docs/results.md: `make -C recipes/prompts modular SEED=1`, one process of one thread.
#
#     alone      the backbone alone              alone-attention    attention added to it
#     dropped    with attention dropped half the time    dropped-attention  its attention trained further, the rest frozen
#     joint      an ordinary Conformer
#     dual       full context and chunks of 320 ms at once          dual-taught        the same with in-place distillation
SEED ?= 1
MODULAR := $(EXP)/modular-$(SEED)
ALONE := $(TRAIN_DATA) --config backbone.yaml --max-duration 60 --seed $(SEED) \
    --set loss.warm_up_steps=300 --set training.evaluate_every=300 --set training.steps=1200
ADDED := $(TRAIN_DATA) --config modular.yaml --seed $(SEED)
DUAL := --set 'contexts.train=[full,"chunk=8,left=32"]' --set contexts.sampling=joint
SYSTEMS := alone dropped joint dual dual-taught alone-attention dropped-attention

.PHONY: modular
modular: $(SYSTEMS:%=$(MODULAR)/%/evaluation/done)
	$(ASRKIT) summary $(SYSTEMS:%=$(MODULAR)/%) --out $(MODULAR)/summary.json

$(MODULAR)/alone/done $(MODULAR)/dropped/done $(MODULAR)/joint/done $(MODULAR)/dual/done $(MODULAR)/dual-taught/done: \
    | $(PROMPTS)/train.jsonl.gz $(SPOKEN)/train.jsonl.gz

$(MODULAR)/alone/done:
	$(ASRKIT) train-backbone $(ALONE) --out $(@D)

$(MODULAR)/dropped/done:
	$(ASRKIT) train-backbone $(ALONE) --set model.attention_dropout.probability=0.5 --out $(@D)

$(MODULAR)/joint/done:
	$(ASRKIT) train-backbone $(ALONE) --set model.attention_dropout.probability=0 --out $(@D)

$(MODULAR)/dual/done:
	$(ASRKIT) train-backbone $(ALONE) $(DUAL) --out $(@D)

$(MODULAR)/dual-taught/done:
	$(ASRKIT) train-backbone $(ALONE) $(DUAL) --set contexts.distillation_scale=0.2 --out $(@D)

$(MODULAR)/alone-attention/done: | $(MODULAR)/alone/done
	$(ASRKIT) add-submodel --from $(MODULAR)/alone --name attention $(ADDED) --out $(@D)

$(MODULAR)/dropped-attention/done: | $(MODULAR)/dropped/done
	$(ASRKIT) add-submodel --from $(MODULAR)/dropped --name attention --init joint $(ADDED) --out $(@D)

# Models that were trained in chunks are also evaluated chunk by chunk.
$(MODULAR)/dual/evaluation/done $(MODULAR)/dual-taught/evaluation/done: CHUNKS := --chunk 8 --left 32

$(MODULAR)/%/evaluation/done: | $(MODULAR)/%/done
	$(ASRKIT) evaluate --from $(MODULAR)/$* --mode full --manifest $(PROMPTS)/test.jsonl.gz --method greedy --method beam
	$(ASRKIT) evaluate --from $(MODULAR)/$* --mode full --manifest $(PROMPTS)/dev.jsonl.gz --method greedy --method beam
	$(if $(CHUNKS),$(ASRKIT) evaluate --from $(MODULAR)/$* $(CHUNKS) --manifest $(PROMPTS)/test.jsonl.gz --method greedy --method beam)
	$(if $(CHUNKS),$(ASRKIT) evaluate --from $(MODULAR)/$* $(CHUNKS) --manifest $(PROMPTS)/dev.jsonl.gz --method greedy --method beam)
	touch $@
