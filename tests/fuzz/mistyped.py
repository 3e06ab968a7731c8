"""Command lines that train, with one value mistyped as hands do it."""

from __future__ import annotations

from random import Random

from tests.fuzz.command_lines import BASE, CommandLine, Flags

# What is added to the base, each on its own: all of it trains together, too.
VALID: Flags = {
    "--moe-dynamic-routing": "dtop_p",
    "--moe-dynamic-target-experts-per-token": "2",
    "--moe-dynamic-max-experts-per-token": "3",
    "--moe-dynamic-balance-loss-coeff": "0.001",
    "--moe-ffn-hidden-size": "48",
    "--moe-layer-freq": "1",
    "--moe-z-loss-coeff": "0.001",
    "--moe-router-topk": "2",
    "--kv-channels": "8",
    "--num-query-groups": "2",
    "--norm-epsilon": "1e-5",
    "--rotary-base": "10000",
    "--rotary-percent": "0.5",
    "--init-method-std": "0.02",
    "--hidden-dropout": "0.1",
    "--attention-dropout": "0.1",
    "--seed": "1234",
    "--min-lr": "1e-4",
    "--lr-decay-style": "cosine",
    "--lr-decay-iters": "2",
    "--lr-warmup-iters": "1",
    "--lr-warmup-init": "1e-5",
    "--weight-decay": "0.1",
    "--clip-grad": "1.0",
    "--adam-beta1": "0.9",
    "--adam-beta2": "0.95",
    "--adam-eps": "1e-8",
    "--optimizer": "adam",
    "--split": "90,5,5",
    "--tensorboard-log-interval": "1",
    "--eval-global-batch-size": "4",
    "--exit-interval": "10",
    "--exit-duration-in-mins": "60",
    "--dataloader-type": "single",
    "--tensor-model-parallel-size": "1",
    "--pipeline-model-parallel-size": "1",
    "--context-parallel-size": "1",
    "--expert-model-parallel-size": "1",
    "--recompute-granularity": "full",
    "--recompute-method": "uniform",
    "--recompute-num-layers": "1",
}
# These make no sense alone: what starts so needs all of them.
TOGETHER = {
    "--recompute": ("--recompute-granularity", "--recompute-method", "--recompute-num-layers"),
    "--moe-dynamic": ("--moe-dynamic-routing", "--moe-dynamic-target-experts-per-token"),
}
# What is so large trains for minutes, on a machine that has the memory.
LARGEST = 200


def mistyped(random: Random) -> CommandLine:
    """A sound command line with one mistake."""
    names = set(random.sample(list(VALID), random.randint(0, 6)))
    for start, others in TOGETHER.items():
        if any(name.startswith(start) for name in names):
            names |= set(others)
    flags = BASE | {name: VALID[name] for name in VALID if name in names}
    valued = [name for name, value in flags.items() if value is not None]
    flag = random.choice([name for name in valued if name in names] or valued)
    if random.random() < 0.4:
        flag = random.choice(valued)
    value = flags[flag] or ""
    others = [
        name
        for name in valued
        if name != flag and _number(flags[name]) != _number(value) and _is_small(flags[name])
    ]
    if _is_small(value) and random.random() < 0.3:
        other = random.choice(others)
        flags[flag], flags[other] = flags[other], value
        return CommandLine(1, tuple(flags.items()))
    wrong = random.choice(_slips(value))
    if random.random() < 0.1:  # the old value was left in the line
        return CommandLine(1, (*flags.items(), (flag, wrong)))
    flags[flag] = wrong
    return CommandLine(1, tuple(flags.items()))


def _slips(value: str) -> list[str | None]:
    """What may be typed in place of a value; None forgets it."""
    if _number(value) is None:
        middle = len(value) // 2
        return ["", None, value[:middle] + value[middle + 1 :], value.upper(), value + " x", "1"]
    slips = ["", None, "0", "-1", "1e6", "4k", "2,5", "/data/text_document", value + "x", "nan"]
    if value.isdigit():
        number = int(value)
        near = [number + 1, number - 1, number // 2, number * 2 if number < LARGEST else 3, 0, 7]
        slips += [value + ".5", *map(str, near), *map(str, near)]  # the numbers twice as often
    else:
        slips += ["-" + value, "1", "2", value.replace(".", ",")]
    return [slip for slip in slips if slip != value]


def _number(value: str | None) -> float | None:
    try:
        return float(value or "")
    except ValueError:
        return None


def _is_small(value: str | None) -> bool:
    number = _number(value)
    return number is not None and number < LARGEST
