"""compare and summary --baseline: which evaluations they take, what they refuse, and what they write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asrkit.config import from_dict, to_dict
from asrkit.data.manifests import make_cut, write_cuts
from asrkit.errors import UserError
from asrkit.reporting.compare import Comparison
from asrkit.reporting.evaluations import counterpart
from asrkit.reporting.results import (
    RESULT,
    UTTERANCES,
    DecodingRecord,
    Result,
    read_result,
    read_utterances,
    summarize,
    utterance_line,
)
from asrkit.reporting.tables import summary_table
from asrkit.reporting.wer import Scored
from asrkit.run_dir import EXPORT, WEIGHTS, sha256_of
from asrkit.stages.compare import compare_runs
from asrkit.stages.evaluate import evaluate
from asrkit.stages.summary import summarize_runs
from helpers.commands import asrkit
from helpers.small_runs import noise, write_run

TEXT = "one two three four five"


def write_evaluation(directory: Path, missed: int, digest: str = "of no weights", count: int = 60) -> Path:
    """An evaluation in which the first word of the first ``missed`` utterances is lost."""
    utterances = [
        Scored(f"cut-{index}", TEXT, TEXT[4:] if index < missed else TEXT, "en", f"speaker {index % 3}")
        for index in range(count)
    ]
    result = Result(
        run="exp", weights_sha256=digest, variant="backbone", context="full", latency_ms=None, manifest="test.jsonl.gz",
        manifest_sha256="3f2a9c01", method="greedy", beam=None, total=summarize(utterances), languages={},
        emission_latency=None, audio_seconds=1.0, decode_seconds=1.0, real_time_factor=1.0, device="cpu", threads=1,
        warnings=[],
    )  # fmt: skip
    directory.mkdir(parents=True)
    (directory / RESULT).write_text(json.dumps(to_dict(result)))
    (directory / UTTERANCES).write_text("".join(map(utterance_line, utterances)))
    return directory


def write_system(path: Path, evaluations: Mapping[str, int], kind: str = WEIGHTS) -> str:
    """A run directory as far as compare looks: its weights, and evaluations by name with the number of missed words."""
    path.mkdir(parents=True)
    (path / kind).write_text(f"weights of {path.name}")
    for name, missed in evaluations.items():
        write_evaluation(path / "evaluation" / name, missed, sha256_of(path / kind))
    return str(path)


def rewrite(directory: Path, change: Mapping[str, Any], lines: slice = slice(None)) -> None:
    """Change fields of some utterances of an evaluation; a field that becomes None is removed."""
    rows = [json.loads(line) for line in (directory / UTTERANCES).read_text().splitlines()]
    for row in rows[lines]:
        row.update(change)
    rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
    (directory / UTTERANCES).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_runs_exports_and_evaluations(tmp_path: Path) -> None:
    run = write_system(tmp_path / "run", {"test-backbone-full-greedy": 30})
    exported = write_system(tmp_path / "onnx", {"test-backbone-full-greedy": 31}, EXPORT)
    evaluation = str(write_evaluation(tmp_path / "elsewhere", 0))
    rows = compare_runs([run, exported, evaluation], margin=2.0, out=tmp_path / "compare.json")
    assert [(row.baseline, row.system, row.significant) for row in rows] == [
        (run, exported, False),
        (run, evaluation, True),
    ]
    assert [row.difference for row in rows] == pytest.approx([1 / 300, -30 / 300])
    assert [row.by for row in rows] == ["speaker", "speaker"]
    written = json.loads((tmp_path / "compare.json").read_text())
    assert [from_dict(Comparison, row, "row") for row in written["comparisons"]] == rows
    assert written["evaluations"][run] == [f"{run}/evaluation/test-backbone-full-greedy"]
    (row,) = compare_runs([run, evaluation], baseline=evaluation)
    assert (row.baseline, row.system) == (evaluation, run)
    assert compare_runs([run], baseline=evaluation) == [row]


def test_one_of_several_evaluations_is_chosen_by_name(tmp_path: Path) -> None:
    names = [
        "test-3f2a9c01-backbone-full-greedy",
        "test-3f2a9c01-backbone-full-beam4",
        "test-aaaaaaaa-near-full-greedy",
    ]
    one, other = (write_system(tmp_path / name, dict.fromkeys(names, 3)) for name in ("one", "other"))
    with pytest.raises(UserError) as refused:
        compare_runs([one, other])
    assert [line.split(":")[0] for line in refused.value.lines] == [one, other]
    assert all(name in line and "3 evaluations" in line for line in refused.value.lines for name in names)
    for patterns in (["beam4"], ["3f2a9c01", "beam"], ["*-3f2a9c01-*beam?"]):
        compare_runs([one, other], evaluation=patterns, out=tmp_path / "compare.json")
        evaluations = json.loads((tmp_path / "compare.json").read_text())["evaluations"]
        assert [Path(directory).name for (directory,) in evaluations.values()] == [names[1]] * 2
    with pytest.raises(UserError, match="no evaluation fits --evaluation beam4 --evaluation near; it has test-"):
        compare_runs([one, other], evaluation=["beam4", "near"])


def test_what_is_refused(tmp_path: Path) -> None:
    run = write_system(tmp_path / "run", {"test": 3})
    stale = write_system(tmp_path / "stale", {"test": 3})
    (tmp_path / "stale" / WEIGHTS).write_text("trained on")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as refused:
        compare_runs([run, stale, str(tmp_path / "empty"), f"{tmp_path}/./run"], margin=-1)
    for line in ("is named twice", "--margin -1", "was not evaluated with its present weights", "is no run directory"):
        assert sum(line in finding for finding in refused.value.lines) == 1, line
    assert len(refused.value.lines) == 4
    with pytest.raises(UserError, match="one system alone"):
        compare_runs([run])
    other = write_evaluation(tmp_path / "other", 2)
    rewrite(other, {"ref": "one two"}, slice(5))
    with pytest.raises(UserError, match="same references .*'one two three four five' and 'one two'.*; and 2 more"):
        compare_runs([run, str(other)])
    (other / UTTERANCES).unlink()
    with pytest.raises(UserError, match="utterances.jsonl: is not a result of this version's evaluate"):
        compare_runs([run, str(other)])


def test_results_from_before_speakers_were_stored_are_read(tmp_path: Path) -> None:
    first, second = (write_evaluation(tmp_path / name, missed) for name, missed in (("a", 9), ("b", 3)))
    rewrite(first, {"speaker": None})
    assert {utterance.speaker for utterance in read_utterances(first)} == {""}
    (row,) = compare_runs([str(first), str(second)])
    assert (row.by, row.groups) == ("speaker", 3)  # as the second knows them
    rewrite(second, {"speaker": None})
    (row,) = compare_runs([str(first), str(second)])
    assert (row.by, row.groups) == ("utterance", 60)


def test_seeds(tmp_path: Path) -> None:
    floats = [
        write_system(tmp_path / f"float-{seed}", {"test": missed}) for seed, missed in ((1, 20), (2, 24), (3, 22))
    ]
    small = [write_system(tmp_path / f"int4-{seed}", {"test": missed}) for seed, missed in ((1, 30), (2, 34))]
    arguments = [f"float={','.join(floats)}", f"int4={','.join(small)}"]
    (row,) = compare_runs(arguments, seeds=True)
    assert (row.baseline, row.baseline_seeds, row.system, row.seeds) == ("float", 3, "int4", 2)
    assert row.difference == pytest.approx(10 / 300) and row.p_mapsswe is None
    (back,) = compare_runs(arguments, seeds=True, baseline="int4")
    assert back.difference == pytest.approx(-10 / 300)
    for wrong in ("float", "float=a", "=a,b", "float=a,a"):
        with pytest.raises(UserError, match="with --seeds write a name and two or more runs"):
            compare_runs([wrong, arguments[1]], seeds=True)


def test_the_command(tmp_path: Path) -> None:
    first, second = (write_evaluation(tmp_path / name, missed) for name, missed in (("a", 40), ("b", 0)))
    text = asrkit("compare", first, second, "--by", "utterance", "--margin", 1, "--json", tmp_path / "out" / "c.json")
    assert "makes 13.33 fewer errors in 100 words" in text and "is significant" in text
    assert "by length" in text and "by speaker" in text and (tmp_path / "out" / "c.json").is_file()
    assert "--baseline" in asrkit("compare", "--help")
    assert asrkit("compare", first, code=1).startswith("error: one system alone")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(1)
    cuts = []
    for number in range(4):
        path = folder / f"{number}.wav"
        soundfile.write(path, noise(random, 16000), 16000)
        cut = make_cut(
            f"cut-{number}", path, sampling_rate=16000, num_samples=16000, text="one two three", language="en"
        )
        cut.supervisions[0].speaker = f"speaker {number % 2}"
        cuts.append(cut)
    write_cuts(folder / "test.jsonl.gz", cuts)
    return folder / "test.jsonl.gz"


def test_other_files_make_another_search(tmp_path: Path) -> None:
    """An evaluation with another language model of the same weight is no counterpart."""
    one = read_result(write_evaluation(tmp_path / "one", 0))
    results = [
        replace(
            one,
            decoding=DecodingRecord(
                settings={"lm_scale": 0.3, "length_bonus": bonus}, sources={"lm": {"path": "lm", "sha256": sha}}
            ),
        )
        for sha, bonus in (("aa", 0.0), ("bb", 0.0), ("aa", 1.0))
    ]
    assert {result.search for result in results} == {"greedy lm 0.3"}
    paths = [Path(str(number)) for number in range(3)]
    for number, result in enumerate(results):
        assert counterpart(result, dict(zip(paths, results, strict=True))) == paths[number]
        others = {path: other for path, other in zip(paths, results, strict=True) if other is not result}
        assert counterpart(result, others) is None


def test_evaluate_stores_speakers_and_summary_marks_what_is_significant(tmp_path: Path, manifest: Path) -> None:
    one = write_run(tmp_path / "one")
    other = Path(shutil.copytree(one, tmp_path / "other"))
    for run in (one, other):
        (evaluation, beam) = evaluate(run, manifest, methods=["greedy", "beam"])
        stored = read_utterances(evaluation.directory)
        assert stored == evaluation.utterances
        assert [utterance.speaker for utterance in stored] == ["speaker 0", "speaker 1"] * 2
        rewrite(evaluation.directory, {"hyp": "one two" if run == one else "one two three"})
        rewrite(beam.directory, {"hyp": "one two three"})
    rows = summarize_runs([one, other], baseline=one, out=tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == rows
    assert [row["method"] for row in rows] == ["beam", "greedy"] * 2
    assert [row["comparison"] is None for row in rows] == [True, True, False, False]
    beam_row, greedy_row = (row["comparison"] for row in rows[2:])
    assert (beam_row["difference"], beam_row["significant"]) == (0, False)
    assert greedy_row["difference"] == pytest.approx(-1 / 3)
    assert (
        greedy_row["p_mapsswe"] == 2 / 2**4 and greedy_row["p_holm"] == 2 * 2 / 2**4 and not greedy_row["significant"]
    )
    assert "speakers" not in greedy_row and greedy_row["interval_95"]
    # Evaluated again with another temperature of its confidences, the baseline has the same words twice.
    (greedy,) = (one / "evaluation").glob("*-greedy")
    again = Path(shutil.copytree(greedy, one / "evaluation" / "again"))
    content = json.loads((again / RESULT).read_text())
    confidence = {
        "words": 1,
        "right": 1.0,
        "mean": 0.5,
        "ece": 0.5,
        "bins": 10,
        "temperature": 2.0,
        "calibrated_on": None,
    }
    (again / RESULT).write_text(json.dumps({**content, "confidence": confidence}))
    twice = summarize_runs([one, other], baseline=one)
    assert [row["comparison"] is None for row in twice][-2:] == [False, False]
    (again / RESULT).write_text(json.dumps({**content, "variant": "near"}))
    with pytest.raises(UserError, match="one: has an evaluation of variant near, but no such variant"):
        summarize_runs([one])
    shutil.rmtree(again)
    greedy_row["significant"] = True
    change = summary_table(rows).columns[7]
    assert change.header == "change" and list(change.cells) == ["-", "-", "+0.00  ", "-33.33 *"]
    assert "change" not in [column.header for column in summary_table(summarize_runs([one])).columns]
