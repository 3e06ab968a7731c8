"""Evaluates a checkpoint with Megatron's own loop and writes down what the model computed.

    python -m tests.conversion.dump_logits OUT.pt FLAGS...

OUT.pt holds, for the first batch of the validation: ``tokens`` [B, S], ``logits`` [B, S, V], and
of each layer with experts, in order, ``probs`` [S, B, E] and ``maps`` [S, B, E].
"""

import sys

from megatron_dynmoe.run import prepare


def main() -> None:
    out = sys.argv.pop(1)
    prepare()
    import time

    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_dynmoe.routing import router as dynamic
    from megatron_dynmoe.training.loop import train

    seen: dict[str, list] = {"probs": [], "maps": []}
    forward, select, routing = GPTModel.forward, dynamic.select, TopKRouter.routing

    def dump(self, input_ids, position_ids, attention_mask, *args, labels=None, **kwargs):
        if not self.training and "logits" not in seen:
            seen["logits"] = []
            logits = forward(self, input_ids, position_ids, attention_mask)
            sizes = (input_ids.shape[1], input_ids.shape[0], -1)
            torch.save(
                {
                    "tokens": input_ids,
                    "logits": logits,
                    **{name: [x.view(sizes) for x in seen[name]] for name in ("probs", "maps")},
                },
                out,
            )
        return forward(
            self, input_ids, position_ids, attention_mask, *args, labels=labels, **kwargs
        )

    def keep(probs, threshold, cap):
        chosen = select(probs, threshold, cap)
        seen["probs"].append(probs)
        seen["maps"].append(chosen)
        return chosen

    def keep_top_k(self, logits, *args, **kwargs):
        weights, chosen = routing(self, logits, *args, **kwargs)
        seen["probs"].append(weights)
        seen["maps"].append(chosen)
        return weights, chosen

    GPTModel.forward, dynamic.select, TopKRouter.routing = dump, keep, keep_top_k
    train(time.time())


if __name__ == "__main__":
    main()
