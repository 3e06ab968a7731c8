"""Looks into a checkpoint for what no loading would notice: copied experts, zeros, a wrong step.

parts.py          one tensor of one layer and expert, whatever the format
distributed.py    reads Megatron's torch_dist,
rank_files.py     its format torch, one file a rank,
hugging_face.py   and exported folders, part by part: memory holds one stored tensor at a time
values.py         what every part says: not finite, constant, the copy of another
structure.py      layers, experts and optimizer states against the saved arguments
progress.py       iteration, tracker, steps of the optimizer and the schedule, samples
controller.py     the routers' state against the law that moved it
look.py           all of them, as lines of the doctor's table

Nothing in a checkpoint is executed; see :mod:`megatron_dynmoe.storage.unpickle`.
"""
