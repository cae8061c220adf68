"""report: what is in the file, that strangers' texts stay texts, what it refuses; and in a browser, that it works."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from asrkit.data.manifests import open_cuts, text_of
from asrkit.errors import UserError
from asrkit.run_dir import open_run
from asrkit.stages.report import report
from asrkit.training.run_writer import LEFT_OUT, write_sealed
from helpers.browser import needs_chromium, opened, until
from helpers.commands import QUICK, asrkit, sets
from helpers.report_runs import HOSTILE, write_chain, write_manifest
from helpers.small_runs import write_run

pytest.importorskip("jinja2")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    """Two run directories, and the manifest they were evaluated on."""
    folder = tmp_path_factory.mktemp("report")
    manifest = write_manifest(folder)
    texts = [(cut.id, text_of(cut)) for cut in open_cuts(manifest)]
    return write_chain(folder / "exp", manifest, texts), manifest


@pytest.fixture(scope="module")
def written(chain: tuple[list[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(chain[0], tmp_path_factory.mktemp("out") / "report.html", sounds=3)


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def data_of(html: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_cuts_left_out_of_training_are_in_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_sealed(run / LEFT_OUT, {"cut-17": "silent: the peak lies below -60 dBFS"})
    html = report([run], tmp_path / "report.html", sounds=0).read_text(encoding="utf-8")
    assert "cut-17" in html and "the peak lies below" in html
    (run / LEFT_OUT).write_text("cut-17: silent\n")
    html = report([run], tmp_path / "again.html", sounds=0).read_text(encoding="utf-8")
    assert "left_out.yaml: is damaged" in html and "the peak lies below" not in html


def test_every_label_is_of_one_evaluation(chain: tuple[list[Path], Path], tmp_path: Path) -> None:
    """Evaluations with two language models of the same weight get the names of their directories."""
    run = Path(shutil.copytree(chain[0][0], tmp_path / "run"))
    (found,) = (run / "evaluation").iterdir()
    content = json.loads((found / "result.json").read_text())
    for name in "ab":
        decoding = {"settings": {"lm_scale": 0.3}, "sources": {"lm": {"path": "lm", "sha256": name}}, "tuned_on": None}
        other = Path(shutil.copytree(found, run / "evaluation" / name))
        (other / "result.json").write_text(json.dumps({**content, "decoding": decoding}))
    html = report([run], tmp_path / "report.html", sounds=0).read_text(encoding="utf-8")
    (tests,) = data_of(html)
    assert sorted(system["label"] for system in tests["systems"]) == ["run, a", "run, b", "run, greedy"]


def test_what_is_in_the_file(written: Path) -> None:
    html = written.read_text(encoding="utf-8")
    (tests,) = data_of(html)
    assert [(system["label"], system["main"]) for system in tests["systems"]] == [
        ("first", True), ("second, ctc", False), ("second, greedy", True)
    ]  # fmt: skip
    rows = tests["utterances"]
    assert len(rows) == 12 and sum("audio" in row for row in rows) == 6 and all("uri" in row for row in rows)
    assert [row["errors"] for row in rows[4:8]] == [[0, 0, 0], [1, 0, 1], [2, 0, 2], [3, 0, 3]]
    assert rows[5]["hyps"][0] == [0, 1, 1, 1] and rows[5]["late"] == [105.0] * 3
    worst = max(rows, key=lambda row: row["errors"][0])
    assert "audio" in worst and worst["emitted"][0]
    for text in (
        "second, greedy against first",
        "train-backbone",
        "training.steps",
        "Training loss",
        "Dev WER",
        "kilobytes",
    ):
        assert text in html, text
    assert 'class="mask"' in html and "by speaker" in html and "by language" in html and "by length" in html
    assert len(html) < 2e6


def test_texts_of_strangers_stay_texts(written: Path) -> None:
    html = written.read_text(encoding="utf-8")
    elements = Elements(html).found
    assert not [tag for tag, _ in elements if tag in ("object", "iframe", "link", "base", "embed")]
    assert [attributes for tag, attributes in elements if tag == "script"] == [
        {"type": "application/json", "id": "report-data"}, {}
    ]  # fmt: skip
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]
    sources = [
        attributes[key] or ""
        for _, attributes in elements
        for key in ("src", "href", "xlink:href")
        if key in attributes
    ]
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    policy = next(attributes["content"] for tag, attributes in elements if tag == "meta" and "http-equiv" in attributes)
    assert policy is not None and "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert "script-src 'sha256-" in policy and "script-src 'unsafe-inline'" not in policy and "http" not in policy
    (tests,) = data_of(html)
    assert [row["id"] for row in tests["utterances"][:4]] == [f"cut-{number} {HOSTILE[number]}" for number in range(4)]


def test_data_alone(chain: tuple[list[Path], Path], tmp_path: Path) -> None:
    (chain[1].parent / "dropped.tsv").write_text("id\treason\ttext\nx\ttoo short\t" + HOSTILE[0] + "\n")
    said = asrkit("report", "--data", chain[1], "--out", tmp_path / "data.html")
    html = (tmp_path / "data.html").read_text(encoding="utf-8")
    (chain[1].parent / "dropped.tsv").unlink()
    assert re.fullmatch(rf"{re.escape(str(tmp_path / 'data.html'))}: 0\.\d MB\n", said)
    assert "too short (1)" in html and "12 utterances" in html and data_of(html) == [] and HOSTILE[0] not in html


def test_what_is_missing_is_said(chain: tuple[list[Path], Path], tmp_path: Path) -> None:
    runs, manifest = chain
    content = manifest.read_bytes()
    manifest.write_bytes(content[:-1] + b"x")
    try:
        html = report(runs, tmp_path / "report.html", evaluation=["greedy"]).read_text()
    finally:
        manifest.write_bytes(content)
    assert "has changed since it was used" in html and "2 things" not in html
    (tests,) = data_of(html)
    assert [system["label"] for system in tests["systems"]] == ["first", "second"]
    assert not any({"audio", "uri", "seconds"} & row.keys() for row in tests["utterances"])
    html = report(runs[:1], tmp_path / "report.html", evaluation=["beam"]).read_text()
    assert "no evaluation fits --evaluation beam" in html and data_of(html) == []


def test_what_is_refused(chain: tuple[list[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, _ = chain
    out = tmp_path / "report.html"
    with pytest.raises(UserError, match="nothing to report: name run directories, or a manifest with --data"):
        report([], out)
    with pytest.raises(UserError) as refused:
        report([runs[0], runs[0], tmp_path / "none"], out)
    assert len(refused.value.lines) == 2 and "named twice" in str(refused.value) and "none" in str(refused.value)
    with pytest.raises(UserError, match="no such manifest"):
        report(runs, out, data=[tmp_path / "none.jsonl.gz"])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "asrkit.reporting.page.render", raising=False)
    with pytest.raises(UserError, match=r"pip install 'asrkit\[report\]'"):
        report(runs, out)
    assert list(tmp_path.iterdir()) == []


def test_a_single_evaluation_is_a_yardstick(chain: tuple[list[Path], Path], tmp_path: Path) -> None:
    runs, _ = chain
    elsewhere = runs[1] / "evaluation" / "test-ctc"
    html = report([runs[0], elsewhere], tmp_path / "report.html", sounds=0).read_text()
    (tests,) = data_of(html)
    assert [system["label"] for system in tests["systems"]] == ["first", "test-ctc"]
    assert "test-ctc against first" in html and not any("audio" in row for row in tests["utterances"])


@needs_chromium
def test_in_a_browser(written: Path) -> None:
    """It loads without an error or a request; search, filters, orders, sound, spectrogram and sorted tables work."""
    with opened(written) as seen:
        page = seen.page
        ids = page.locator(".card .id")
        assert ids.count() == 12 and page.locator("#count").inner_text().startswith("12 of 12")
        errors = [int(text.split()[0]) for text in page.locator(".card header .quiet").all_inner_texts()]
        assert errors == sorted(errors, reverse=True) and errors[0] == 3
        page.check("#wrong")
        assert ids.count() == 9
        page.fill("#search", "three ALERT(3)")
        assert ids.all_inner_texts() == [f"cut-2 {HOSTILE[2]}"] and page.locator("#count").inner_text().startswith(
            "1 of 12"
        )
        page.fill("#search", "")
        page.uncheck("#wrong")
        page.select_option("#languages", "fr")
        assert ids.count() == 6
        page.select_option("#languages", "")
        page.select_option("#sort", "order")
        assert ids.first.inner_text() == f"cut-0 {HOSTILE[0]}"
        page.select_option("#sort", "late")
        assert ids.first.inner_text() == "cut-11"
        lost = page.locator(".card", has=page.get_by_text("cut-11", exact=True)).locator("td.del")
        assert lost.all_inner_texts() == ["–"] * 6  # three words of two systems
        page.check("#audible")
        assert ids.count() == 6
        card = page.locator(".card").first
        card.get_by_role("button", name="Spectrogram").click()
        assert card.locator(".see img").is_visible() and card.locator(".track span").count() > 0
        assert card.locator(".see img").evaluate("image => image.naturalHeight") == 80
        button = card.locator(".play")
        button.focus()
        page.keyboard.press("Enter")
        until(page, "playing && playing.audio.currentTime > 0.2")
        assert button.inner_text() == "■ Stop"
        until(page, "playing === null")  # it ends by itself
        assert button.inner_text() == "▶ Play"
        page.click("#layers th >> text=bytes")
        column = [
            int(text.replace(",", ""))
            for text in page.locator("#layers details[open] td:nth-child(6)").all_inner_texts()
        ]
        assert len(column) > 5 and column == sorted(column)
        page.locator(".tree a").last.click()
        assert page.locator("details[open] >> text=training.steps").is_visible()
        assert seen.said == [] and seen.asked == []


@needs_chromium
def test_a_recording_that_is_not_embedded_is_played_from_its_file(
    chain: tuple[list[Path], Path], tmp_path: Path
) -> None:
    written = report(chain[0], tmp_path / "report.html", sounds=0)
    with opened(written) as seen:
        seen.page.select_option("#sort", "long")
        seen.page.locator(".play").first.click()
        until(seen.page, "playing && playing.audio.currentTime > 0.1")
        assert seen.page.evaluate("playing.audio.src").startswith((chain[1].parent / "11.wav").as_uri())
        assert seen.said == [] and seen.asked == []


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_but_tables_is_wider_than_the_screen(written: Path, scheme: str) -> None:
    with opened(written, 390, 844, scheme) as seen:
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 390
        paper = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
        assert len(seen.page.pdf()) > 10_000 and seen.said == []


def test_a_pretrained_encoder_has_its_stage_and_curves(chain: tuple[list[Path], Path], tmp_path: Path) -> None:
    _, manifest = chain
    asrkit(
        "pretrain", "--manifest", manifest, "--out", tmp_path / "encoder", "--max-duration", 20,
        *sets(*(one for one in QUICK if one != "loss.backend=torch"), "training.steps=2", "model.size=tiny",
              "model.num_layers=1", "model.dim=32", "model.feedforward_dim=16"),
    )  # fmt: skip
    (tmp_path / "text.txt").write_text("one two\nthree\n")
    asrkit(
        "train-lm", "--kind", "ngram", "--unit", "word", "--text", tmp_path / "text.txt", "--out", tmp_path / "ngram"
    )
    html = report([tmp_path / "encoder", tmp_path / "ngram"], tmp_path / "report.html").read_text()
    assert open_run(tmp_path / "ngram").lineage[-1]["arpa_sha256"] in html
    assert "pretrain" in html and "Training loss" in html and data_of(html) == [] and 'id="layers"' not in html
