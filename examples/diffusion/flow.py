"""Flow matching and its sampler, for any model that returns a velocity.

A sample moves on a straight line from noise at time 0 to the image at time 1::

    x_t = (1 - t) * noise + t * image          dx_t / dt = v = image - noise

The model learns v(x_t, t, class) by mean squared error. The sampler integrates it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def noised(image: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The point at ``time`` on the line from noise to image, and the velocity there.

    Args:
        image, noise: [..., C, H, W] of one shape.
        time: [...] in [0, 1].
    """
    time = time[..., None, None, None]
    return (1 - time) * noise + time * image, image - noise


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,
    classes: Tensor,
    *,
    steps: int,
    guidance: float = 1.0,
    null_class: int | None = None,
) -> Tensor:
    """Integrate from noise to images in Euler steps, with classifier-free guidance.

    Each step moves by ``v_null + guidance * (v_class - v_null)``. With guidance 1 that is the
    velocity of the class, and the null class is not computed.

    Args:
        velocity: maps x [B, C, H, W], time [B] and classes [B] int64 to [B, C, H, W].
        noise: [B, C, H, W].
        classes: [B] int64.
        steps: how many steps, from 1.
        null_class: the number that stands for no class; needed unless guidance is 1.

    Returns:
        [B, C, H, W].
    """
    if guidance != 1 and null_class is None:
        raise ValueError(f"guidance is {guidance}: give null_class, which it needs, or use 1")
    x = noise
    for step in range(steps):
        time = x.new_full((len(x),), step / steps)
        if guidance == 1:
            v = velocity(x, time, classes)
        else:  # both in one batch
            both = torch.cat([classes, torch.full_like(classes, null_class)])
            v_class, v_null = velocity(x.repeat(2, 1, 1, 1), time.repeat(2), both).chunk(2)
            v = v_null + guidance * (v_class - v_null)
        x = x + v / steps
    return x
