"""Transcribe a few recordings of a manifest with sherpa-onnx and an exported model, and print them beside the references.

python client.py --model exp/onnx --manifest data/prompts/test.jsonl.gz --count 5
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import sherpa_onnx
from lhotse import CutSet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="directory written by asrkit export, for whole recordings"
    )
    parser.add_argument("--manifest", type=Path, required=True, help="cuts to transcribe")
    parser.add_argument("--count", type=int, default=5, help="number of recordings")
    options = parser.parse_args()
    recognizer = sherpa_onnx.OfflineRecognizer.from_transducer(
        **{name: str(options.model / f"{name}.onnx") for name in ("encoder", "decoder", "joiner")},
        tokens=str(options.model / "tokens.txt"),
        decoding_method="modified_beam_search",
    )
    print(f"\nsherpa-onnx {sherpa_onnx.__version__}, {options.model}:")
    for cut in islice(CutSet.from_file(options.manifest), options.count):
        stream = recognizer.create_stream()
        stream.accept_waveform(cut.sampling_rate, cut.load_audio()[0])
        recognizer.decode_stream(stream)
        print(f"  said   {cut.supervisions[0].text}\n  heard  {stream.result.text.strip()}")
    print()


if __name__ == "__main__":
    main()
