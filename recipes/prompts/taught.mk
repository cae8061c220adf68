# Teachers and a student of five languages (docs/distill.md): `make -C recipes/prompts taught SEED=1`.
#
#     teacher-LANG          the model of `five`, trained further on one language
#     alone                 the student without a teacher
#     one-WEIGHT            taught by the model of `five`
#     each-WEIGHT           taught by the teacher of each language; WEIGHT is constant, linear or student-teacher
PUPILS := $(EXP)/taught-$(SEED)
ONE := $(PUPILS)/one-constant $(PUPILS)/one-student-teacher
EACH := $(PUPILS)/each-constant $(PUPILS)/each-linear $(PUPILS)/each-student-teacher
STUDENTS := $(PUPILS)/alone $(ONE) $(EACH)
TEACHERS := $(LANGS:%=$(EXP)/teacher-%)
LEARN = $(TRAIN_DATA) --config student.yaml --seed $(SEED) --out $(@D) $(SET)
OWN = --manifest $(PROMPTS)/train-$*.jsonl.gz --dev $(PROMPTS)/dev-$*.jsonl.gz --set 'data.also=[$(SPOKEN)/train-$*.jsonl.gz]'

.PHONY: taught students
taught:
	$(MAKE) LANGS="en es fr it ru" DATA=$(DATA)/five EXP=$(EXP)/five SYNTHETIC=600 CONFIG=five.yaml students

students: $(RUN)/evaluation/test.done $(STUDENTS:%=%/evaluation/test.done) $(TEACHERS:%=%/evaluation/own.done)
	$(ASRKIT) summary $(RUN) $(STUDENTS) --out $(PUPILS)/summary.json

$(SPOKEN)/train-%.jsonl.gz: | $(SPOKEN)/train.jsonl.gz
	gzip -dc $(SPOKEN)/train.jsonl.gz | grep -E '"language": ?"$*"' | gzip -n > $@.part
	mv $@.part $@

$(TEACHERS:%=%/done): $(EXP)/teacher-%/done: | $(RUN)/done $(SPOKEN)/train-%.jsonl.gz
	$(ASRKIT) train-backbone --from $(RUN) $(OWN) --config teacher.yaml --out $(@D) $(SET)

$(TEACHERS:%=%/evaluation/own.done): $(EXP)/teacher-%/evaluation/own.done: | $(EXP)/teacher-%/done
	$(ASRKIT) evaluate --from $(EXP)/teacher-$* --manifest $(PROMPTS)/test-$*.jsonl.gz --method greedy --method beam
	touch $@

$(PUPILS)/alone/done: | $(RUN)/done
	$(ASRKIT) train-backbone --tokenizer $(RUN)/tokenizer.model $(LEARN)

$(ONE:%=%/done): $(PUPILS)/one-%/done: | $(RUN)/done
	$(ASRKIT) distill --teacher $(RUN) --weight $* $(LEARN)

$(PUPILS)/each-linear/done: DECAY := --set teacher.weight.end=0
$(EACH:%=%/done): $(PUPILS)/each-%/done: | $(TEACHERS:%=%/done)
	$(ASRKIT) distill $(foreach lang,$(LANGS),--teacher $(lang)=$(EXP)/teacher-$(lang)) --weight $* $(DECAY) $(LEARN)
