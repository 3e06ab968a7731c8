"""Compares the rate of tools/preprocess_data.py with raw encoding of the same documents.

    python benchmarks/preprocess.py --tokenizer-model MODEL [--megatron-lm FOLDER]

Raw encoding is SentencePiece's own batch call on two threads with the documents in memory, to
Python lists and to NumPy arrays. Ours is the whole pipeline on two threads: reading, parsing,
encoding, writing, syncing. If you name a checkout of Megatron-LM, its tool runs, too, with two
workers; its start-up time (of a run on one document) is subtracted. All take turns in one run,
because the speed of a machine drifts; the ratio of a round compares with the faster raw call of
that round. Rows are appended to benchmarks/results/preprocess.csv.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sentencepiece import SentencePieceProcessor

from benchmarks import measure
from benchmarks.places import take_turns
from benchmarks.text import corpus
from megatron_dynmoe.data.preprocess import preprocess
from megatron_dynmoe.data.tokenizer import build_tokenizer
from megatron_dynmoe.settings.messages.command_line import CommandParser

RESULTS = measure.RESULTS / "preprocess.csv"
THREADS = 2


def main() -> None:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer-model", required=True)
    parser.add_argument("--megabytes", type=float, default=16, help="text to encode (default: 16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megatron-lm", type=Path, help="a checkout of Megatron-LM to compare")
    args = parser.parse_args()

    rows = measure.Rows(RESULTS, "sentencepiece", "numpy")
    documents = repeat_to(corpus(), args.megabytes * 1e6)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        providers = make_providers(documents, args.tokenizer_model, args.megatron_lm, Path(folder))
        taken = take_turns(
            {name: partial(rate_and_cost, run, megabytes) for name, run in providers.items()},
            args.rounds,
            warm_up=0,
        )
    rates = {name: [rate for rate, _ in values] for name, values in taken.items()}
    raw = [max(pair) for pair in zip(rates["raw to lists"], rates["raw to numpy"], strict=True)]
    workload = f"{len(documents)} documents, {megabytes:.1f} MB, {Path(args.tokenizer_model).name}"
    for name, values in rates.items():
        ratios = [value / best for value, best in zip(values, raw, strict=True)]
        cost = statistics.median(cost for _, cost in taken[name])
        rows.put(row(workload, name, values, ratios, cost))
        print(
            f"{name}: {statistics.median(values):.2f} MB/s, "
            f"{100 * statistics.median(ratios):.0f} % of raw "
            f"({', '.join(f'{100 * ratio:.0f}' for ratio in ratios)}), best "
            f"{max(values):.2f} MB/s, {cost:.3f} processor seconds/MB"
        )


def rate_and_cost(run: Callable[[], float], megabytes: float) -> tuple[float, float]:
    """Megabytes per second of one call, and processor seconds per megabyte."""
    before = time.process_time()
    rate = megabytes / run()
    return rate, (time.process_time() - before) / megabytes


def repeat_to(texts: list[str], num_bytes: float) -> list[str]:
    """`texts` repeated up to `num_bytes`; SentencePiece keeps nothing between documents."""
    repeated: list[str] = []
    size = 0
    while size < num_bytes:
        text = texts[len(repeated) % len(texts)]
        repeated.append(text)
        size += len(text.encode())
    return repeated


def make_providers(
    documents: list[str], model: str, megatron_lm: Path | None, folder: Path
) -> dict[str, Callable[[], float]]:
    """By name, functions that encode all documents once and return the seconds that it took."""
    processor = SentencePieceProcessor(model_file=model)
    tokenizer = build_tokenizer("Llama2Tokenizer", model)
    source, one = folder / "documents.jsonl", folder / "one.jsonl"
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    source.write_text("".join(lines))
    one.write_text(lines[0])

    def raw(return_type: type | str) -> float:
        started = time.perf_counter()
        processor.encode(documents, num_threads=THREADS, return_type=return_type)
        return time.perf_counter() - started

    def ours() -> float:
        return preprocess(
            [str(source)],
            str(folder / "ours"),
            tokenizer,
            append_eod=True,
            workers=THREADS,
            overwrite=True,
        ).seconds

    def megatron(path: Path) -> float:
        command = [sys.executable, "tools/preprocess_data.py", "--input", str(path)]
        command += ["--output-prefix", str(folder / "megatron"), "--workers", str(THREADS)]
        command += ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", model]
        started = time.perf_counter()
        subprocess.run([*command, "--append-eod"], cwd=megatron_lm, check=True, capture_output=True)
        return time.perf_counter() - started

    providers = {
        "raw to lists": lambda: raw(int),
        "ours": ours,
        "raw to numpy": lambda: raw("numpy"),
    }
    if megatron_lm:
        providers["Megatron-LM"] = lambda: megatron(source) - megatron(one)
    return providers


def row(
    workload: str, name: str, rates: list[float], ratios: list[float], cost: float
) -> dict[str, str]:
    spread = measure.spread(rates)
    return {
        "workload": workload,
        "provider": name,
        "rounds": str(len(rates)),
        "median_mb_per_s": f"{spread.median:.3f}",
        "p20_mb_per_s": f"{spread.p20:.3f}",
        "p80_mb_per_s": f"{spread.p80:.3f}",
        "best_mb_per_s": f"{max(rates):.3f}",
        "median_ratio_to_raw": f"{statistics.median(ratios):.3f}",
        # A subprocess's time is not counted.
        "processor_s_per_mb": f"{cost:.4f}" if name != "Megatron-LM" else "",
        "load_1min": measure.load(),
    }


if __name__ == "__main__":
    main()
