"""The process of a dry run that accepts Transformer Engine, because its double runs."""

from megatron_dynmoe import run
from megatron_dynmoe.dry_run.__main__ import main

prepare = run.prepare


def prepare_and_accept() -> None:
    prepare()
    from megatron_dynmoe.dry_run import training  # it imports Megatron

    training._WITHOUT_A_GPU += ("transformer_engine",)


run.prepare = prepare_and_accept
main()
