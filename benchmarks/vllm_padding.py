"""Measures what padding to the cap costs in vLLM: throughput with several caps, in turns.

    .venv/vllm/bin/python benchmarks/vllm_padding.py --model DIR [--caps 2 4 8 16] [--rounds 7]

vLLM has as many slots for every token as the cap allows, and computes all of them. The model reads
its cap at every forward, so one engine measures all caps with the same weights. Each round runs
each cap once, in another order. Printed are medians over the rounds, as parts of the throughput
with the largest cap. The script needs the environment that ``make test-vllm`` makes.

Prefill: 16 prompts of 224 tokens, 1 new token. Decode: 16 prompts of 8 tokens, 32 new ones.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from pathlib import Path

# The engine in this process, so that the model's settings can be reached; and nothing from a hub.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

WORKLOADS = {"prefill": (16, 224, 1), "decode": (16, 8, 32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder of dynmoe convert")
    parser.add_argument("--caps", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

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
        base = statistics.median(seconds[largest])
        for cap in args.caps:
            ratios = [
                one / other for one, other in zip(seconds[largest], seconds[cap], strict=True)
            ]
            print(
                f"{name:8} cap {cap:3}: {statistics.median(seconds[cap]):7.3f} s, throughput "
                f"{base / statistics.median(seconds[cap]):.2f} of that with {largest} "
                f"(by rounds {min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
