# Distill language models (docs/distill-lm.md) into the demo's backbone: `make -C recipes/prompts lm SEED=1`, after the demo; or
# into a new model with the demo's alignments and tokenizer: `make -C recipes/prompts lm-fresh SEED=1`.
#
#     none                  trained further with a head on the aligned senones and no language model (lambda 1)
#     senone, phone, bpe    the same with the head of one language model, lambda 0.9
#     all                   the same with all three heads, lambda 0.9
LM := $(EXP)/lm-$(SEED)
ALIGNED := $(LM)/aligned
UNITS := bpe phone senone
LM_SYSTEMS := none $(UNITS) all
ALIGN = $(ASRKIT) align --from $(RUN) $(UNITS:%=--unit %) --language en --set bad_cuts=skip
LM_STEPS ?= 800
# The model to train, the settings, and where the results go.
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

# A new model, trained for one step, with the demo's tokenizer.
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
# The language models' training text: fortunes, the synthetic speech's texts, and the prompts' texts ten times.
$(LM)/corpus.txt: | $(ALIGNED)/spoken.jsonl.gz
	cp $(DATA)/fortunes-en.txt $@.part
	for manifest in $(SPOKEN) $(foreach time,0 1 2 3 4 5 6 7 8 9,$(PROMPTS)); do gzip -dc $$manifest/train.jsonl.gz; done \
	    | $(PYTHON) -c 'import json, sys; [print(json.loads(line)["supervisions"][0]["text"]) for line in sys.stdin]' >> $@.part
	mv $@.part $@

LM_TRAINING := --set training.steps=$(LM_STEPS) --set training.optimizer.learning_rate=3e-3 --set training.optimizer.warm_up_steps=100
$(UNITS:%=$(LM)/lm-%/done): | $(LM)/corpus.txt
	$(ASRKIT) train-lm --text $(LM)/corpus.txt $(LM_UNIT) $(LM_TRAINING) --set bad_lines=skip --seed $(SEED) --out $(@D)

$(LEARNT)/none/done: HEADS := --lm senone=$(LM)/lm-senone --lambda 1
$(LEARNT)/senone/done: HEADS := --lm senone=$(LM)/lm-senone --lambda 0.9
$(LEARNT)/phone/done: HEADS := --lm phone=$(LM)/lm-phone --lambda 0.9
$(LEARNT)/bpe/done: HEADS := --lm bpe=$(LM)/lm-bpe --lambda 0.9
$(LEARNT)/all/done: HEADS := $(foreach unit,$(UNITS),--lm $(unit)=$(LM)/lm-$(unit)) --lambda 0.9
$(LM_SYSTEMS:%=$(LEARNT)/%/done): | $(UNITS:%=$(LM)/lm-%/done) $(ALIGNED)/train.jsonl.gz $(ALIGNED)/dev.jsonl.gz
	$(ASRKIT) distill-lm --from $(LEARNER) $(HEADS) $(TAUGHT) --out $(@D)

$(LEARNT)/%/evaluation/done: | $(LEARNT)/%/done
	$(ASRKIT) evaluate --from $(LEARNT)/$* --manifest $(PROMPTS)/test.jsonl.gz --method greedy --method beam
	$(ASRKIT) evaluate --from $(LEARNT)/$* --manifest $(PROMPTS)/dev.jsonl.gz --method greedy --method beam
	touch $@
