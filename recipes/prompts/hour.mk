# The demo's test with about an hour of 2 cores: `make -C recipes/prompts hour`, after `make -C recipes/minilibrispeech`, whose backbone
# has heard other readers of English (38 minutes). It is trained further on the prompts, on the synthetic speech and on those readers, its
# weights become 4-bit integers, and the beam search gets a 5-gram of the demo's texts, whose weight is tuned on dev. READ may be several manifests,
# separated by commas; docs/results.md has what more readers gave.
PARENT ?= ../minilibrispeech/exp/backbone
READ ?= ../minilibrispeech/data/train.jsonl.gz
HOUR := $(EXP)/hour
HOURS := $(HOUR) $(EXP)/hour-int4

comma := ,
READERS := $(subst $(comma), ,$(READ))

.PHONY: hour
hour: $(HOURS:%=%/evaluation/ngram.done)
	$(ASRKIT) summary $(HOURS)

$(PARENT)/done $(READERS):
	@echo "$@ is missing: run \`make -C recipes/minilibrispeech\` first, or set PARENT and READ"; false

$(HOURS:%=%/done): ALSO := ,$(READ)
$(HOUR)/done: | $(PARENT)/done $(READERS) $(PROMPTS)/train.jsonl.gz $(SPOKEN)/train.jsonl.gz
	$(TRAIN) --from $(PARENT) $(TRAIN_DATA) --config hour.yaml --out $(@D) $(SET)

$(EXP)/hour-int4/done: | $(HOUR)/done
	$(TRAINER) qat --from $(HOUR) --teacher $(HOUR) --bits 4 $(LATER) --out $(@D) $(SET)

$(EXP)/hour-ngram/done: | $(HOUR)/done $(EXP)/texts.txt
	$(ASRKIT) train-lm --kind ngram --order 5 --text $(EXP)/texts.txt --tokenizer $(HOUR)/tokenizer.model --set bad_lines=skip \
	    --set held_out=0 --out $(@D)

$(HOURS:%=%/evaluation/ngram.done): %/evaluation/ngram.done: | %/evaluation/test.done $(EXP)/hour-ngram/done
	$(ASRKIT) tune --from $* --method beam --beam 8 --lm $(EXP)/hour-ngram --manifest $(PROMPTS)/dev.jsonl.gz \
	    --over lm-scale=0.1:0.2:0.3:0.4:0.5,length-bonus=0:0.5:1 --out $(@D)/ngram.yaml
	$(ASRKIT) evaluate --from $* --decoding $(@D)/ngram.yaml --manifest $(PROMPTS)/test.jsonl.gz
	touch $@
