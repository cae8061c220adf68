# Language models into the demo's backbone (docs/lm-distill.md): `make -C recipes/prompts lm SEED=1`, after the demo; or, with
# the demo's alignments and tokenizer, into a new one: `make -C recipes/prompts lm-fresh SEED=1`.
#
#     none       trained on with a head on the aligned senones, and nothing of language models (lambda 1)
#     senone, phone, bpe    the same with one language model's head; all three with lambda 0.9
LM := $(EXP)/lm-$(SEED)
ALIGNED := $(LM)/aligned
UNITS := bpe phone senone
LM_SYSTEMS := none $(UNITS) all
ALIGN = $(ASRKIT) align --from $(RUN) $(UNITS:%=--unit %) --language en --set bad_cuts=skip
LM_STEPS ?= 400
# What is taught, how long, and where it goes.
LEARNER := $(RUN)
LESSONS := --config modular.yaml --set training.steps=250 --set training.evaluate_every=250
LEARNT := $(LM)
TAUGHT = --manifest $(ALIGNED)/train.jsonl.gz --dev $(ALIGNED)/dev.jsonl.gz --set 'data.also=[$(ALIGNED)/spoken.jsonl.gz]' \
    --supervised senone $(LESSONS) --set unaligned=allow --seed $(SEED) $(SET)

.PHONY: lm lm-fresh
lm: $(LM_SYSTEMS:%=$(LEARNT)/%/evaluation/done)
	$(ASRKIT) summary $(LM_SYSTEMS:%=$(LEARNT)/%) --out $(LEARNT)/summary.json

lm-fresh: | $(EXP)/fresh/done
	$(MAKE) lm LEARNER=$(EXP)/fresh LESSONS="--config fresh.yaml" LEARNT=$(LM)/fresh

# A model that knows nothing yet but the tokenizer.
$(EXP)/fresh/done: | $(RUN)/done
	$(ASRKIT) train-backbone $(TRAIN_DATA) --tokenizer $(RUN)/tokenizer.model --config backbone.yaml --set training.steps=1 --out $(@D)

$(ALIGNED)/spoken.jsonl.gz: | $(RUN)/done
	$(ALIGN) --manifest $(SPOKEN)/train.jsonl.gz --out $@

$(ALIGNED)/train.jsonl.gz: | $(ALIGNED)/spoken.jsonl.gz
	$(ALIGN) --senones $(ALIGNED)/spoken.senones.yaml --manifest $(PROMPTS)/train.jsonl.gz --out $@

$(ALIGNED)/dev.jsonl.gz: | $(ALIGNED)/spoken.jsonl.gz
	$(ALIGN) --senones $(ALIGNED)/spoken.senones.yaml --manifest $(PROMPTS)/dev.jsonl.gz --out $@

$(LM)/lm-bpe/done: LM_UNIT := --unit bpe --tokenizer $(RUN)/tokenizer.model
$(LM)/lm-phone/done: LM_UNIT := --unit phone --language en
$(LM)/lm-senone/done: LM_UNIT := --unit senone --language en --senones $(ALIGNED)/spoken.senones.yaml
$(UNITS:%=$(LM)/lm-%/done): | $(ALIGNED)/spoken.jsonl.gz
	$(ASRKIT) train-lm --text $(DATA)/fortunes-en.txt $(LM_UNIT) --set training.steps=$(LM_STEPS) --set bad_lines=skip --seed $(SEED) --out $(@D)

$(LEARNT)/none/done: HEADS := --lm senone=$(LM)/lm-senone --lambda 1
$(LEARNT)/senone/done: HEADS := --lm senone=$(LM)/lm-senone --lambda 0.9
$(LEARNT)/phone/done: HEADS := --lm phone=$(LM)/lm-phone --lambda 0.9
$(LEARNT)/bpe/done: HEADS := --lm bpe=$(LM)/lm-bpe --lambda 0.9
$(LEARNT)/all/done: HEADS := $(foreach unit,$(UNITS),--lm $(unit)=$(LM)/lm-$(unit)) --lambda 0.9
$(LM_SYSTEMS:%=$(LEARNT)/%/done): | $(UNITS:%=$(LM)/lm-%/done) $(ALIGNED)/train.jsonl.gz $(ALIGNED)/dev.jsonl.gz
	$(ASRKIT) distill --from $(LEARNER) $(HEADS) $(TAUGHT) --out $(@D)

$(LEARNT)/%/evaluation/done: | $(LEARNT)/%/done
	$(ASRKIT) evaluate --from $(LEARNT)/$* --manifest $(PROMPTS)/test.jsonl.gz --method greedy --method beam
	$(ASRKIT) evaluate --from $(LEARNT)/$* --manifest $(PROMPTS)/dev.jsonl.gz --method greedy --method beam
	touch $@
