# Language models into the demo's backbone (docs/lm-distill.md): `make -C recipes/prompts lm SEED=1`, after the demo.
#
#     none       trained on with a head on the aligned senones, and nothing of language models (lambda 1)
#     senone, phone, bpe    the same with one language model's head; all three with lambda 0.9
LM := $(EXP)/lm-$(SEED)
ALIGNED := $(LM)/aligned
UNITS := bpe phone senone
LM_SYSTEMS := none $(UNITS) all
ALIGN = $(ASRKIT) align --from $(RUN) $(UNITS:%=--unit %) --language en --set bad_cuts=skip
LM_STEPS ?= 400
TAUGHT = --manifest $(ALIGNED)/train.jsonl.gz --dev $(ALIGNED)/dev.jsonl.gz --set 'data.also=[$(ALIGNED)/spoken.jsonl.gz]' \
    --supervised senone --config modular.yaml --set unaligned=allow --set training.steps=250 --set training.evaluate_every=250 --seed $(SEED) $(SET)

.PHONY: lm
lm: $(LM_SYSTEMS:%=$(LM)/%/evaluation/done)
	$(ASRKIT) summary $(LM_SYSTEMS:%=$(LM)/%) --out $(LM)/summary.json

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

$(LM)/none/done: HEADS := --lm senone=$(LM)/lm-senone --lambda 1
$(LM)/senone/done: HEADS := --lm senone=$(LM)/lm-senone --lambda 0.9
$(LM)/phone/done: HEADS := --lm phone=$(LM)/lm-phone --lambda 0.9
$(LM)/bpe/done: HEADS := --lm bpe=$(LM)/lm-bpe --lambda 0.9
$(LM)/all/done: HEADS := $(foreach unit,$(UNITS),--lm $(unit)=$(LM)/lm-$(unit)) --lambda 0.9
$(LM_SYSTEMS:%=$(LM)/%/done): | $(UNITS:%=$(LM)/lm-%/done) $(ALIGNED)/train.jsonl.gz $(ALIGNED)/dev.jsonl.gz
	$(ASRKIT) distill --from $(RUN) $(HEADS) $(TAUGHT) --out $(@D)

$(LM)/%/evaluation/done: | $(LM)/%/done
	$(ASRKIT) evaluate --from $(LM)/$* --manifest $(PROMPTS)/test.jsonl.gz --method greedy --method beam
	$(ASRKIT) evaluate --from $(LM)/$* --manifest $(PROMPTS)/dev.jsonl.gz --method greedy --method beam
	touch $@
