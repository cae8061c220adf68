# The experiments behind the table of claims in docs/results.md; ../../docs/results/claims.yaml has its rows.
#
#     sequence      criteria on sequences: longer-slow (the ordinary loss), mwer, mwer-workers (two replicas), mmi and smbr, all at one
#                   rate, decoded greedily and with an n-gram of the training texts, whose weights are tuned on dev for each
#     adaptive      a half-trained student, trained on: half-alone, half-constant, half-adaptive, and half-piecewise, whose weights are the
#                   means that half-adaptive had in those steps
#     language      language models of the training texts as teachers: taught-none, taught-bpe, taught-phone, taught-senone, taught-all
#     dual          full context and chunks in one training: norms-plain, and streaming, with in-place distillation from a teacher that is two
#                   frames late, because in full context a model emits earlier. With norms that both modes share: streaming-plain, and
#                   streaming-early, whose teacher is not late
#     modular       longer-attention: attention after `longer`. dropped: `longer` with attention that is dropped half the time;
#                   dropped-attention: this attention trained further
#     supernet      from `streaming-early`: super, one supernet, and a dedicated model for each of its members: dense and sparse; super-both, the
#                   supernet in as many steps as both of them together, which a member gets half of
#     pretrained-supernet    the same from `tuned-all` (super-tuned, super-both-tuned, dense-tuned, sparse-tuned) and from `fresh-all` (...-fresh)
#     outside       Whisper's encoder as a teacher of the backbone: outside-alone, the texts alone; outside-whisper, the frames of Whisper beside
#                   them. Speed is not perturbed in either, since the frames on disk are those of unperturbed audio. `make setup`
#                   installs tiny.en; WHISPER=whisper:DIR is another.
#     pretraining   models that heard the audio of all training data first (tuned-10, tuned-60, tuned-all: the minutes of labels that they
#                   learned from), and models that did not (fresh-...)
#     claims        all of these, and integers and masks; stores what the table shows
#
# All arms of an experiment have the same steps, data and batches, and the same learning rate. An arm of 500 steps of 120 s takes about
# ten minutes of one core, longer where every step does more: three times as long for mwer, mmi and smbr, twice for dual. One process:
#
#     make -C recipes/minilibrispeech claims NPROC=1 SET="--set training.steps=500 --set training.accumulate=2"
#
# These start from nothing, or pretrain, or are two models, and have steps of their own:
HALF_STEPS ?= 1000
PRETRAIN_STEPS ?= 2000
FRESH_STEPS ?= 2000
BOTH_STEPS ?= 2000
# Steps between two growths of the masks of `sparse` and `super`; the masks are final after five times as many.
GROWTH ?= 50
# Further manifests of audio to pretrain on, separated by commas; texts are not needed.
EXTRA ?=

LATER = $(TRAIN_DATA) --config later.yaml --out $(@D) $(SET)
evaluated = $(foreach name,$(1),$(EXP)/$(name)/evaluation/test.done)

.PHONY: sequence adaptive language dual modular supernet pretrained-supernet outside pretraining claims

# --- sequence
SEQUENCE := mwer mwer-workers mmi smbr
LATTICES := mmi smbr
# Between the rates of train-backbone --from, 5e-4, at which mwer lowered nothing in a trial, and none.
SLOW := --set training.optimizer.learning_rate=1e-4
# Weight of the n-gram in training: the one that decoding the backbone with an n-gram turned out to want.
LM_SCALE ?= 1

sequence: $(call evaluated,longer-slow $(SEQUENCE)) $(foreach name,longer-slow $(LATTICES),$(EXP)/$(name)/evaluation/ngram.done)
	$(COMPARE) $(EXP)/longer-slow $(EXP)/mwer $(EXP)/mwer-workers --json $(EXP)/sequence.json
	$(ASRKIT) compare --evaluation '*-full-ctc' $(EXP)/longer-slow $(LATTICES:%=$(EXP)/%) --json $(EXP)/sequence-ctc.json
	$(ASRKIT) compare --evaluation '*-full-ctc-beam8-*' $(EXP)/longer-slow $(LATTICES:%=$(EXP)/%) --json $(EXP)/sequence-ngram.json

$(EXP)/longer-slow/done: | $(BACKBONE)/done
	$(TRAIN) --from $(BACKBONE) $(LATER) $(SLOW)

$(LATTICES:%=$(EXP)/%/done): LATTICE := --set lattice.denominator.lm_scale=$(LM_SCALE)
$(EXP)/mwer/done $(LATTICES:%=$(EXP)/%/done): | $(BACKBONE)/done
	$(TRAINER) sequence-train --criterion $(notdir $(@D)) --from $(BACKBONE) $(LATER) $(LATTICE) $(SLOW)

# Replicas are processes of their own. Each of their pushes has the data of one step of the others.
$(EXP)/mwer-workers/done: | $(BACKBONE)/done
	$(ASRKIT) sequence-train --criterion mwer --workers 2 --from $(BACKBONE) \
	    $(if $(filter-out 1,$(NPROC)),--push-every $(NPROC)) $(LATER) $(SLOW)

$(call evaluated,longer-slow $(LATTICES)): CTC := yes

$(EXP)/ngram/done: | $(BACKBONE)/done
	$(ASRKIT) train-lm --kind ngram --manifest $(DATA)/train.jsonl.gz --tokenizer $(BACKBONE)/tokenizer.model --set held_out=0 --out $(@D)

$(EXP)/%/evaluation/ngram.done: | $(EXP)/%/evaluation/test.done $(EXP)/ngram/done
	$(ASRKIT) tune --from $(EXP)/$* --method ctc-beam --beam 8 --lm $(EXP)/ngram --manifest $(DATA)/dev.jsonl.gz \
	    --over lm-scale=0.4:0.6:0.8:1:1.2,length-bonus=0:1:2:3:4 --out $(@D)/ngram.yaml
	$(ASRKIT) evaluate --from $(EXP)/$* --decoding $(@D)/ngram.yaml --lm $(EXP)/ngram --manifest $(TEST)
	touch $@

# --- adaptive
ADAPTIVE := half-alone half-constant half-adaptive half-piecewise

adaptive: $(call evaluated,half $(ADAPTIVE))
	$(COMPARE) $(ADAPTIVE:%=$(EXP)/%) --json $(EXP)/adaptive.json

$(EXP)/half/done: | $(BACKBONE)/done $(SPOKEN)
	$(TRAIN) --tokenizer $(BACKBONE)/tokenizer.model $(FRESH_DATA) --config student.yaml --out $(@D) $(SET) \
	    --set training.steps=$(HALF_STEPS)

$(EXP)/half-alone/done: | $(EXP)/half/done
	$(TRAIN) --from $(EXP)/half $(LATER)

$(EXP)/half-piecewise/done: | $(EXP)/half-adaptive/done
$(EXP)/half-piecewise/done: WEIGHT = piecewise --set "teacher.weight.points=$$($(PYTHON) weights.py $(EXP)/half-adaptive)"
$(EXP)/half-constant/done: WEIGHT := constant
$(EXP)/half-adaptive/done: WEIGHT := student-teacher --set training.log_every=25
$(EXP)/half-constant/done $(EXP)/half-adaptive/done $(EXP)/half-piecewise/done: | $(EXP)/half/done $(EXP)/longer/done
	$(TRAINER) distill --from $(EXP)/half --teacher $(EXP)/longer $(LATER) --weight $(WEIGHT)

# --- language
UNITS := bpe phone senone
LANGUAGE := taught-none $(UNITS:%=taught-%) taught-all
LM_STEPS ?= 300

language: $(call evaluated,$(LANGUAGE))
	$(COMPARE) $(LANGUAGE:%=$(EXP)/%) --json $(EXP)/language.json

$(EXP)/lm-bpe/done: UNIT := --unit bpe --tokenizer $(BACKBONE)/tokenizer.model
$(EXP)/lm-phone/done: UNIT := --unit phone
$(EXP)/lm-senone/done: UNIT := --unit senone
$(UNITS:%=$(EXP)/lm-%/done): | $(ALIGNED)/train.jsonl.gz $(ALIGNED)/dev.jsonl.gz
	$(ASRKIT) train-lm --manifest $(ALIGNED)/train.jsonl.gz --dev $(ALIGNED)/dev.jsonl.gz $(UNIT) --seed $(SEED) --out $(@D) \
	    --set training.steps=$(LM_STEPS) --set training.evaluate_every=25 \
	    --set training.optimizer.learning_rate=3e-3 --set training.optimizer.warm_up_steps=50

# `none` has the head on the labels of the frames, as the others do, and a language model that does not count.
TEACHING_none := --lm senone=$(EXP)/lm-senone --lambda 1
TEACHING_all := $(foreach unit,$(UNITS),--lm $(unit)=$(EXP)/lm-$(unit)) --lambda 0.9
$(LANGUAGE:%=$(EXP)/%/done): $(EXP)/taught-%/done: | $(UNITS:%=$(EXP)/lm-%/done)
	$(TRAINER) distill-lm --from $(BACKBONE) $(or $(TEACHING_$*),--lm $*=$(EXP)/lm-$* --lambda 0.9) --supervised senone --set unaligned=allow \
	    --manifest $(ALIGNED)/train.jsonl.gz --dev $(ALIGNED)/dev.jsonl.gz --seed $(SEED) --config later.yaml --out $(@D) $(SET)

# --- dual
DUAL := streaming-plain streaming-early norms-plain streaming

dual: $(call evaluated,$(DUAL))
	$(ASRKIT) compare --evaluation '*-chunk8-left32-beam4' $(DUAL:%=$(EXP)/%) --json $(EXP)/dual.json

$(EXP)/streaming-plain/done: DUAL_ARM := --set model.norms=shared --set contexts.distillation_scale=0
$(EXP)/streaming-early/done: DUAL_ARM := --set model.norms=shared --set contexts.distillation_delay=0
$(EXP)/norms-plain/done: DUAL_ARM := --set contexts.distillation_scale=0
$(EXP)/streaming-plain/done $(EXP)/streaming-early/done $(EXP)/norms-plain/done: | $(BACKBONE)/done
	$(TRAIN) --from $(BACKBONE) $(TRAIN_DATA) --config streaming.yaml --out $(@D) $(SET) $(DUAL_ARM)

$(call evaluated,$(filter-out streaming,$(DUAL))): CHUNKS := $(STREAM)
$(call evaluated,$(filter-out streaming,$(DUAL))): | $(ALIGNED)/test.jsonl.gz

# --- modular
MODULAR := dropped longer-attention dropped-attention

modular: $(call evaluated,longer $(MODULAR))
	$(COMPARE) $(EXP)/longer $(MODULAR:%=$(EXP)/%) --json $(EXP)/modular.json

$(EXP)/dropped/done: | $(BACKBONE)/done
	$(TRAIN) --from $(BACKBONE) $(LATER) --set model.attention_dropout.probability=0.5

$(EXP)/longer-attention/done: | $(EXP)/longer/done
	$(TRAINER) add-submodel --from $(EXP)/longer --name attention $(LATER)

$(EXP)/dropped-attention/done: | $(EXP)/dropped/done
	$(TRAINER) add-submodel --from $(EXP)/dropped --name attention --init joint $(LATER)

$(call evaluated,dropped): VARIANT := --variant backbone

# --- supernet
# The parents: `streaming-early`, and models that learned from all labels with (`tuned`) and without (`fresh`) pretraining, which stand for
# the first steps of the paper's two-step training.
SUPER_PARENT := $(EXP)/streaming-early
$(EXP)/%-tuned/done: SUPER_PARENT := $(EXP)/tuned-all
$(EXP)/%-fresh/done: SUPER_PARENT := $(EXP)/fresh-all

DENSE := dense dense-tuned dense-fresh
SPARSE := sparse sparse-tuned sparse-fresh
BOTH := super-both super-both-tuned super-both-fresh
SUPER := super super-tuned super-fresh $(BOTH)

supernet: $(call evaluated,dense sparse super super-both)
	$(COMPARE) $(EXP)/dense $(SUPERS) --json $(EXP)/super-dense.json
	$(SPARSELY) $(EXP)/sparse $(SUPERS) --json $(EXP)/super-sparse.json

pretrained-supernet: $(call evaluated,$(foreach member,dense sparse super super-both,$(member)-tuned $(member)-fresh))
	$(foreach parent,tuned fresh,$(COMPARE) $(EXP)/dense-$(parent) $(SUPERS:%=%-$(parent)) --json $(EXP)/super-$(parent)-dense.json && \
	    $(SPARSELY) $(EXP)/sparse-$(parent) $(SUPERS:%=%-$(parent)) --json $(EXP)/super-$(parent)-sparse.json &&) true

SUPERS := $(EXP)/super $(EXP)/super-both
SPARSELY := $(ASRKIT) compare --evaluation '*-chunk8-left32-beam4'

$(DENSE:%=$(EXP)/%/done):
	$(TRAIN) --from $(SUPER_PARENT) $(LATER) --set 'contexts.train=[full]'

$(SPARSE:%=$(EXP)/%/done):
	$(TRAINER) prune --from $(SUPER_PARENT) --sparsity 0.67 --block 8x1 --schedule iterative --set schedule.start=$(GROWTH) \
	    --set schedule.interval=$(GROWTH) $(LATER) --set 'contexts.train=["chunk=8,left=32"]'

$(BOTH:%=$(EXP)/%/done): LONGER := --set training.steps=$(BOTH_STEPS) --set growth.interval=$(shell echo $$((2 * $(GROWTH))))
$(SUPER:%=$(EXP)/%/done):
	$(TRAINER) supernet --from $(SUPER_PARENT) --sparsity 0.67 --block 8x1 --dense full --sparse chunk=8,left=32 \
	    --set growth.interval=$(GROWTH) $(LATER) $(LONGER)

$(foreach name,dense sparse super super-both,$(EXP)/$(name)/done): | $(EXP)/streaming-early/done
$(foreach name,dense sparse super super-both,$(EXP)/$(name)-tuned/done): | $(EXP)/tuned-all/done
$(foreach name,dense sparse super super-both,$(EXP)/$(name)-fresh/done): | $(EXP)/fresh-all/done

$(call evaluated,$(SUPER)): VARIANT := --variant dense
$(call evaluated,$(SUPER)): CHUNKS := --variant sparse $(STREAM)
$(call evaluated,$(SPARSE)): CHUNKS := $(STREAM)
$(call evaluated,$(SUPER) $(SPARSE)): | $(ALIGNED)/test.jsonl.gz

# --- outside
WHISPER ?= whisper:tiny.en
OUTSIDE := outside-alone outside-whisper
UNPERTURBED := --set data.augment.speed=0

outside: $(call evaluated,$(OUTSIDE))
	$(COMPARE) $(OUTSIDE:%=$(EXP)/%) --json $(EXP)/outside.json

$(EXP)/outside-alone/done: | $(BACKBONE)/done
	$(TRAIN) --from $(BACKBONE) $(LATER) $(UNPERTURBED)

$(EXP)/outside-whisper/done: | $(BACKBONE)/done
	$(TRAINER) distill --from $(BACKBONE) --teacher $(WHISPER) --cache $(DATA)/whisper $(LATER) $(UNPERTURBED)

# --- pretraining
MINUTES := 10 60 all
FRESH := $(MINUTES:%=fresh-%)
TUNED := $(MINUTES:%=tuned-%)
LABELED := $(DATA)/labeled

pretraining: $(call evaluated,$(FRESH) $(TUNED))
	$(foreach minutes,$(MINUTES),$(COMPARE) $(EXP)/fresh-$(minutes) $(EXP)/tuned-$(minutes) --json $(EXP)/pretraining-$(minutes).json &&) true

$(EXP)/pretrained/done: | $(PARTS)
	$(TRAINER) pretrain --manifest $(DATA)/train.jsonl.gz --dev $(DATA)/dev.jsonl.gz --seed $(SEED) --config pretrain.yaml \
	    --set 'data.also=[$(EXTRA)]' --out $(@D) $(SET) --set training.steps=$(PRETRAIN_STEPS)

$(LABELED)/all.jsonl.gz: | $(PARTS)
	mkdir -p $(@D)
	cp $(DATA)/train.jsonl.gz $@.part
	mv $@.part $@

$(LABELED)/%.jsonl.gz: | $(PARTS)
	mkdir -p $(@D)
	$(PYTHON) subset.py $(DATA)/train.jsonl.gz --minutes $* --out $@

# The synthetic speech is not of the corpus; both kinds have it, and the tokenizer of the backbone.
LABELS = --manifest $(LABELED)/$*.jsonl.gz --dev $(DATA)/dev.jsonl.gz --seed $(SEED) --set 'data.also=[$(SPOKEN)]' \
    --tokenizer $(BACKBONE)/tokenizer.model --out $(@D) $(SET) --set training.steps=$(FRESH_STEPS)

$(FRESH:%=$(EXP)/%/done): $(EXP)/fresh-%/done: | $(LABELED)/%.jsonl.gz $(SPOKEN) $(BACKBONE)/done
	$(TRAIN) --config backbone.yaml $(LABELS)

$(TUNED:%=$(EXP)/%/done): $(EXP)/tuned-%/done: | $(LABELED)/%.jsonl.gz $(SPOKEN) $(BACKBONE)/done $(EXP)/pretrained/done
	$(TRAIN) --from $(EXP)/pretrained --config tuned.yaml $(LABELS)

# --- claims
CLAIMED := int8 int4a4 int2 int4-trained int4a4-trained int2-trained float-trained joint joint-alone joint-1of4
claims: $(call evaluated,backbone longer attention conformer longer-slow $(SEQUENCE) $(ADAPTIVE) taught-none taught-senone taught-all $(DUAL) \
            $(MODULAR) $(DENSE) $(SPARSE) $(SUPER) $(OUTSIDE) $(FRESH) $(TUNED)) \
        $(foreach name,longer-slow $(LATTICES),$(EXP)/$(name)/evaluation/ngram.done) \
        $(foreach name,float $(CLAIMED),$(SMALLER)/$(name)/evaluation/done)
	$(PYTHON) ../../scripts/claims.py collect $(EXP)
