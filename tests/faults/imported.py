"""What a rank has to import, imported once: ranks are forked from a process that has done so.

Named to ``multiprocessing``'s fork server by :mod:`tests.faults.launching`.
"""

import os

import torch

from megatron_dynmoe.run import prepare

# Once a process has computed with several threads, those that are forked of it wait for them.
torch.set_num_threads(1)
prepare()
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    del os.environ[name]  # each rank is told its own

import matplotlib.pyplot  # noqa: E402, F401
import torch.distributed.launcher.api  # noqa: E402
import torch.utils.tensorboard  # noqa: E402

from tests.distributed.worker import warm_up  # noqa: E402

warm_up([])
