"""Pre-trains a GPT with dynamic routing: Megatron's own loop, arguments and datasets.

    torchrun --standalone --nproc-per-node 8 -m megatron_dynmoe.pretrain \
        MEGATRON_FLAGS --moe-dynamic-routing dtop_p --moe-dynamic-target-experts-per-token 2

Takes every flag of Megatron's ``pretrain_gpt.py`` but those of its fine-tuning and distillation
modes. Without a GPU it runs on the CPU over gloo.
"""

from __future__ import annotations

import signal
import time

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # While nothing is trained, Ctrl-C ends this process without a stack of half an import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from torch.distributed.elastic.multiprocessing.errors import record

from megatron_dynmoe.run import prepare
from megatron_dynmoe.settings.messages.exits import exiting_on_misuse


@record  # so that torchrun, which speaks last, repeats what a rank died of
def main() -> None:
    """Parse the command line and train."""
    program_start = time.time()
    prepare()
    from megatron_dynmoe.training import loop

    with exiting_on_misuse():
        loop.train(program_start)


if __name__ == "__main__":
    main()
