"""What a manifest of many cuts costs: to open it, and from the command to the first step of a training.

The manifests are made here, and point to 16 files of noise. Each row is measured in processes of its own, first with nothing
remembered of the manifest (``ASRKIT_CACHE`` is a new folder), then again. Seconds are of the clock and of the processor, memory is the
most that a process had.

    python benchmarks/manifest_scale.py --cuts 1 1000 20000 100000 1000000
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RATE, FILES, WORDS = 16000, 16, 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", nargs="+", type=int, default=[1, 1000, 20_000, 100_000])
    parser.add_argument("--what", nargs="+", choices=["open", "train"], default=["open", "train"])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    print(f"{'cuts':>9} {'':8} {'remembered':>10} {'s':>7} {'CPU s':>7} {'MB':>6}")
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder))
        for count in options.cuts:
            manifest = Path(folder) / f"{count}.jsonl.gz"
            make_manifest(manifest, count, files)
            for what in options.what:
                environment = {**os.environ, "ASRKIT_CACHE": f"{folder}/cache-{what}-{count}"}
                for remembered in ("no", "yes"):
                    command = [sys.executable, __file__, "--one", what, str(manifest)]
                    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
                    row = json.loads(output)
                    print(
                        f"{count:9d} {what:8} {remembered:>10} {row['seconds']:7.1f} {row['cpu']:7.1f} {row['memory']:6.0f}",
                        flush=True,
                    )
            manifest.unlink()


def make_files(folder: Path) -> list[tuple[Path, int]]:
    """Files of noise and their numbers of samples, 2 to 14 s."""
    import numpy as np
    import soundfile

    random, files = np.random.default_rng(0), []
    for number in range(FILES):
        samples = int((2 + 0.8 * number) * RATE)
        path = folder / f"{number}.flac"
        soundfile.write(path, 0.05 * random.normal(size=samples), RATE)
        files.append((path, samples))
    return files


def make_manifest(path: Path, count: int, files: list[tuple[Path, int]]) -> None:
    """A manifest of ``count`` cuts with random texts of two words a second."""
    import numpy as np

    from asrkit.data.manifests import make_cut

    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, random.integers(2, 9))) for _ in range(WORDS)]
    templates = []
    for file, samples in files:
        cut = make_cut("NAME", file, sampling_rate=RATE, num_samples=samples, text="TEXT", language="en", speaker="s")
        templates.append((json.dumps(cut.to_dict()), 2 * samples // RATE))
    with gzip.open(path, "wt", compresslevel=1) as out:
        for number in range(count):
            template, length = templates[number % FILES]
            text = " ".join(words[index] for index in random.integers(0, WORDS, length))
            out.write(template.replace("NAME", f"cut-{number:07d}").replace("TEXT", text) + "\n")


def measure(what: str, manifest: str) -> dict[str, float]:
    """Seconds and MB of this process, and of those it starts."""
    began = time.monotonic()
    if what == "open":
        from asrkit.data.manifests import open_cuts

        open_cuts(Path(manifest))
    else:
        with tempfile.TemporaryDirectory() as folder:
            words = ["train-backbone", "--manifest", manifest, "--out", f"{folder}/run"]
            settings = ["model.size=tiny", "training.steps=1", "bad_cuts=skip", "training.tensorboard=false"]
            options = [word for setting in settings for word in ("--set", setting)]
            subprocess.run([sys.executable, "-m", "asrkit", *words, *options], check=True, stderr=subprocess.DEVNULL)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in usage)
    memory = max(each.ru_maxrss for each in usage) / 1024
    return {"seconds": time.monotonic() - began, "cpu": cpu, "memory": memory}


if __name__ == "__main__":
    main()
