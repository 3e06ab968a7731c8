import functools

import pytest

from megatron_dynmoe.jobs.parse import read_args
from megatron_dynmoe.jobs.recipes import recipe_flags
from megatron_dynmoe.planning.layout import Layout
from megatron_dynmoe.planning.memory import MemoryModel
from megatron_dynmoe.settings.arguments import resolved_from_args


@pytest.fixture(scope="session")
def memory_model():
    """memory_model(recipe, flags, num_gpus) as the planner makes it."""

    @functools.cache
    def make(recipe: str, flags: str = "", num_gpus: int = 16) -> MemoryModel:
        words = [*recipe_flags(recipe), *flags.split()]
        args, layout = read_args(words), Layout.from_flags(words, num_gpus)
        return MemoryModel.from_args(args, layout, resolved_from_args(args, args.num_experts))

    return make
