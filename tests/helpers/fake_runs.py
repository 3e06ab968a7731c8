"""Folders of runs with events that no training wrote."""

import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

MEGATRON = {
    "global_batch_size": 4,
    "seq_length": 8,
    "num_experts": 16,
    "moe_router_topk": 2,
    "num_layers": 2,
    "moe_layer_freq": 1,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "moe_ffn_hidden_size": None,
    "swiglu": True,
}


def write_events(run_dir, scalars, start=1000.0):
    """``scalars``: name -> list of (iteration, value); one second per iteration from ``start`` on.

    Returns:
        The file, whose name TensorBoard makes of the second, the host and the process.
    """
    folder = run_dir / "tensorboard"
    before = set(folder.iterdir()) if folder.exists() else set()
    writer = EventFileWriter(str(folder))
    for tag, points in scalars.items():
        for step, value in points:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(wall_time=start + step, step=step, summary=summary))
    writer.close()
    (path,) = set(folder.iterdir()) - before
    return path


def make_run(run_dir, routing, scalars, **megatron):
    """``routing``: the dynamic settings; ``megatron``: arguments that differ from the above."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "resolved.yaml").write_text(
        yaml.safe_dump({"dynamic_routing": routing, "megatron": MEGATRON | megatron})
    )
    write_events(run_dir, scalars)


def dtop_p_scalars(num_steps=20):
    """Off the target at first, 2 on average over the last fifth, and not over the last tenth."""
    last_fifth = {17: 1.97, 18: 1.97, 19: 2.05, 20: 2.01}
    steps = range(1, num_steps + 1)
    return {
        "lm loss": [(step, 9.0 - step / 10) for step in steps],
        "lm loss validation": [(10, 8.5), (20, 7.5), (20, 99.0)],  # the last: the test set's
        "dynmoe/experts_per_token": [
            (step, last_fifth.get(step, 5.0 if step <= 16 else 2.0)) for step in steps
        ],
        "dynmoe/std_experts_per_token": [(step, 0.7) for step in steps],
        "dynmoe/threshold": [(step, 0.3) for step in steps],
        "dynmoe_layers/experts_per_token_layer_1": [(step, 2.0) for step in steps],
    }
