"""Shar directories from a real web server and a real object store, by lhotse and smart_open."""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lhotse import CutSet

from asrkit.data.corpora.fetch import fetch_shar, shard_urls
from asrkit.data.cut_audio import cut_samples
from asrkit.data.manifests import open_cuts
from asrkit.errors import UserError
from asrkit.extras import EXTRAS
from helpers.commands import asrkit
from helpers.tones import make_corpus


class Quiet(SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 - of all requests
    broken = ""  # part of the names of files that break off

    def log_message(self, *words: Any) -> None: ...

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.broken and self.broken in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"0" * 600)
        else:
            super().do_GET()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server and its folder, which has a Shar directory of three shards."""
    folder = tmp_path / "served"
    (folder / "corpus").mkdir(parents=True)
    cuts = CutSet.from_cuts(open_cuts(make_corpus(tmp_path, 6)))
    cuts.to_shar(folder / "corpus", fields={"recording": "wav"}, shard_size=2)
    Quiet.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
        server.shutdown()
        thread.join()


def test_a_shar_directory_comes_from_a_server(served: tuple[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("smart_open")
    address, folder = served
    pattern, out = f"{address}/corpus/cuts.{{000000..000002}}.jsonl.gz", tmp_path / "copy"
    (folder / "corpus" / "recording.000001.tar").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"recording.000001.tar: cannot read it \(.*404.*\); check the URL"):
        fetch_shar(pattern, out)
    assert not list(out.glob("cuts.*")), "it is no Shar directory yet"
    (tmp_path / "away").rename(folder / "corpus" / "recording.000001.tar")
    copied = {path.name for path in out.glob("recording.*")}
    assert "recording.000000.tar" in copied
    Quiet.asked.clear()
    said = asrkit("data", "fetch", pattern, "--out", out)
    assert "6 cuts, 0.0 hours" in said and f"{out / 'recording.000002.tar'}\n{out / 'cuts.000000.jsonl.gz'}\n" in said
    assert not {path for path in Quiet.asked if Path(path).name in copied}
    for name in ("recording.000000.tar", "recording.000002.tar"):
        assert (out / name).read_bytes() == (folder / "corpus" / name).read_bytes()
    there, here = open_cuts(folder / "corpus"), open_cuts(out)
    assert [cut.id for cut in here] == [cut.id for cut in there]
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(cut_samples(one), cut_samples(other))
    Quiet.asked.clear()
    fetch_shar(pattern, out)
    assert not Quiet.asked


def test_a_shar_directory_comes_from_an_object_store(
    served: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the S3 protocol, with the address and the keys where boto3 looks for them: in the environment."""
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    pytest.importorskip("smart_open.s3")
    store = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    store.start()
    try:
        host, port = store.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="speech")
        files = sorted((served[1] / "corpus").iterdir())
        for path in files:
            client.upload_file(str(path), "speech", f"corpus/{path.name}")
        out = tmp_path / "copy"
        said = asrkit("data", "fetch", "s3://speech/corpus/cuts.{000000..000002}.jsonl.gz", "--out", out)
        assert "6 cuts, 0.0 hours" in said
        for path in files:
            copy, whole = (out / path.name).read_bytes(), path.read_bytes()
            assert copy == whole if path.suffix == ".tar" else gzip.decompress(copy) == gzip.decompress(whole)
        for number, (url, reason) in enumerate(
            {"s3://speech/corpus/cuts.9.jsonl": "NoSuchKey", "s3://none/corpus/cuts.0.jsonl": "NoSuchBucket"}.items()
        ):
            with pytest.raises(UserError, match=rf"recording.\d.tar: cannot read it \(.*{reason}.*\); check the URL"):
                fetch_shar(url, tmp_path / f"none-{number}")
    finally:
        store.stop()


def test_a_folder_has_shards_of_one_address(served: tuple[str, Path], tmp_path: Path) -> None:
    """Files of the same name would be taken for those asked for."""
    pytest.importorskip("smart_open")
    address, folder = served
    out = tmp_path / "copy"
    fetch_shar(f"{address}/corpus/cuts.000000.jsonl.gz", out)
    assert len(fetch_shar(f"{address}/corpus/cuts.{{000000..000002}}.jsonl.gz", out)) == 6
    Quiet.asked.clear()
    with pytest.raises(UserError, match="has shards of another address than .*/other; choose another --out"):
        fetch_shar(f"{address}/other/cuts.000000.jsonl.gz", out)
    with pytest.raises(UserError, match="did not copy; choose another --out"):
        fetch_shar(f"{address}/corpus/cuts.000000.jsonl.gz", folder / "corpus")
    assert not Quiet.asked
    # An address from which nothing came is none.
    with pytest.raises(UserError):
        fetch_shar(f"{address}/mistyped/cuts.000000.jsonl.gz", tmp_path / "new")
    assert fetch_shar(f"{address}/corpus/cuts.000000.jsonl.gz", tmp_path / "new")


@pytest.mark.parametrize("tar", [True, False])
def test_what_is_not_what_it_says_is_not_kept(served: tuple[str, Path], tmp_path: Path, tar: bool) -> None:
    """An answer that breaks off, and a page that asks for a password in place of the cuts; neither is a fault of the disk."""
    pytest.importorskip("smart_open")
    address, folder = served
    name, reason = ("recording.000000.tar", "IncompleteRead") if tar else ("cuts.000000.jsonl.gz", "Not a gzipped file")
    if not tar:
        (folder / "corpus" / name).write_text("<html>Who are you?</html>")
    Quiet.broken = "recording" if tar else ""
    try:
        with pytest.raises(UserError, match=rf"/corpus/{name}: cannot read it \(.*{reason}.*\); check the URL"):
            fetch_shar(f"{address}/corpus/cuts.000000.jsonl.gz", tmp_path / "copy")
    finally:
        Quiet.broken = ""
    assert not (tmp_path / "copy" / name).exists()


def test_a_page_in_place_of_a_tar_file_is_not_kept(served: tuple[str, Path], tmp_path: Path) -> None:
    """Once the server has the file, the same command copies it."""
    pytest.importorskip("smart_open")
    address, folder = served
    tar = folder / "corpus" / "recording.000000.tar"
    content = tar.read_bytes()
    tar.write_text("<html>Who are you?</html>")
    try:
        with pytest.raises(UserError, match=r"recording.000000.tar: the answer is not a tar file .*check the URL"):
            fetch_shar(f"{address}/corpus/cuts.000000.jsonl.gz", tmp_path / "copy")
    finally:
        tar.write_bytes(content)
    assert fetch_shar(f"{address}/corpus/cuts.000000.jsonl.gz", tmp_path / "copy")


def test_a_server_that_says_nothing_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("smart_open")
    monkeypatch.setattr("asrkit.data.corpora.fetch.TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait, none is accepted
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/cuts.000000.jsonl.gz"
        with pytest.raises(UserError, match=r"recording.000000.tar: cannot read it \(.*timed out.*\); check the URL"):
            fetch_shar(address, tmp_path / "copy")


def test_a_manifest_fetches_nothing(served: tuple[str, Path], tmp_path: Path) -> None:
    """What was fetched comes from strangers: it is refused where it would ask the network."""
    pytest.importorskip("smart_open")
    import json

    address, folder = served
    shard = folder / "corpus" / "cuts.000000.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(shard.read_bytes()).splitlines()]
    lines[0]["recording"]["sources"][0].update(type="url", source=f"{address}/secret.wav")
    shard.write_bytes(gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines)))
    with pytest.raises(UserError, match="a source of type url is not read"):
        fetch_shar(f"{address}/corpus/cuts.000000.jsonl.gz", tmp_path / "copy")
    assert not [path for path in Quiet.asked if "secret" in path]


def test_what_is_no_shard_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = "https://example.org/x"
    assert list(shard_urls(f"{base}/cuts.{{008..010}}.jsonl")) == [
        f"{base}/cuts.{n}.jsonl" for n in ("008", "009", "010")
    ]
    folder = "https://example.org/{0..1}"
    assert list(shard_urls(f"{folder}/cuts.{{1..2}}.jsonl")) == [f"{folder}/cuts.1.jsonl", f"{folder}/cuts.2.jsonl"]
    for url in ("pipe:touch made", "cuts.000000.jsonl.gz", "file:///cuts.000000.jsonl.gz"):
        with pytest.raises(UserError, match="give a URL that begins with one of https://"):
            fetch_shar(url, tmp_path)
    for url in (base, f"{base}/recording.000000.tar", f"{base}/cuts.{{a..b}}.jsonl.gz", f"{base}/cuts.1.jsonl.gz\n"):
        with pytest.raises(UserError, match="does not end as the cuts of a Shar directory do"):
            fetch_shar(url, tmp_path)
    with pytest.raises(UserError, match="is no range of at most"):
        fetch_shar(f"{base}/cuts.{{9..1}}.jsonl.gz", tmp_path)
    with pytest.raises(UserError, match="--field text: choose from recording, features"):
        fetch_shar(f"{base}/cuts.1.jsonl.gz", tmp_path, ("text",))
    monkeypatch.setitem(__import__("sys").modules, "smart_open", None)
    monkeypatch.setattr(
        "asrkit.data.corpora.fetch.open_best", lambda *_: (_ for _ in ()).throw(ValueError("smart_open"))
    )
    with pytest.raises(UserError, match=f"needs smart_open.*{EXTRAS['remote'].remedy[:20]}"):
        fetch_shar(f"{base}/cuts.1.jsonl.gz", tmp_path)
