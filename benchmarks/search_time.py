"""Processor time of the transducer's searches on a manifest: greedy, beam, and beam with what is given, in turn on one thread.

    python benchmarks/search_time.py exp/backbone dev.jsonl.gz --lm exp/lm4 --hotwords names.txt

The encoder runs once and is not counted; of the rounds, the smallest time of each search is printed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from asrkit.data.batch import evaluation_batches
from asrkit.data.checks import decodable_cuts
from asrkit.decoding.fusion import Fusion, FusionRequest, load_fusion
from asrkit.decoding.recognizer import load_recognizer
from asrkit.decoding.search import Method, search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--lm", type=Path, action="append", default=[], help="language model; repeatable")
    parser.add_argument("--hotwords", type=Path)
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recognizer = load_recognizer(options.run, "cpu")
    tokenizer, model = recognizer.tokenizer, recognizer.model
    cuts, _ = decodable_cuts(options.manifest, recognizer.languages, tokenizer)
    encoded = [
        model.encode(batch.features, batch.feature_lens, batch.languages) for batch in evaluation_batches(cuts, 200)
    ]
    requests = [FusionRequest(lm=path) for path in options.lm]
    requests += [FusionRequest(hotwords=options.hotwords)] if options.hotwords else []
    searches: dict[str, Fusion | None] = {"greedy": None, f"beam {options.beam}": None}
    for request in requests:
        searches[f"beam {options.beam} + {request.lm or request.hotwords}"] = load_fusion(
            request, tokenizer, recognizer.device
        )
    times: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(options.rounds):
        for name, fusion in searches.items():
            method: Method = "greedy" if name == "greedy" else "beam"
            began = time.process_time()
            for output in encoded:
                search(model, output, method, options.beam, tokenizer.special_ids, fusion)
            times[name].append(time.process_time() - began)
    audio = sum(cut.duration for cut in cuts)
    for name, seconds in times.items():
        print(f"{min(seconds):8.3f} s for {audio:.0f} s of audio  {name}")


if __name__ == "__main__":
    main()
