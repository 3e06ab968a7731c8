"""A model for lm-eval that counts, task by task, the experts of every token it reads.

Imports lm-eval: import this module only when an evaluation begins.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor


class CountingLM(HFLM):
    """HFLM for one loaded model, with the sums of its outputs' ``experts_per_token``.

    Counted is what the requests themselves make the model read, whatever the batches: no padding,
    and of a generated answer nothing after its end, while longer answers of the batch go on. A
    text that several requests share up to their last token is read, and counted, once.

    Attributes:
        tokens: for each task, how many tokens were counted.
        experts_L: for each task, int64 of shape [MoE layers]: the experts of all those tokens.
            Empty, as ``tokens``, for a model whose outputs have no ``experts_per_token``.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        bos = tokenizer.bos_token_id
        has_bos = bos is not None and bos in tokenizer("a")["input_ids"][:1]
        logger = logging.getLogger("lm_eval")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of what is meant here: a model in memory
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            # What comes before a text without a context: in training, the end of another document.
            prefix_token_id=None if has_bos else tokenizer.eos_token_id,
        )
        logger.setLevel(level)
        self.tokens: dict[str, int] = defaultdict(int)
        self.experts_L: dict[str, Tensor] = {}
        self._task = ""
        self._passes: list[Tensor] = []  # experts_per_token of the forward passes of one batch
        self._row = 0
        model.register_forward_hook(self._keep)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        # Sharing would depend on which windows meet in a batch.
        self.logits_cache = False
        try:
            return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)
        finally:
            self.logits_cache = True

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._by_task(super().generate_until, requests, disable_tqdm)

    def _by_task(
        self, run: Callable[..., list[Any]], requests: Sequence[Any], disable_tqdm: bool
    ) -> list[Any]:
        """lm-eval hands over the requests of all tasks at once: no batch may mix them."""
        places: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            places[request.task_name].append(place)
        responses: list[Any] = [None] * len(requests)
        for self._task, own in places.items():
            answers = run([requests[place] for place in own], disable_tqdm=disable_tqdm)
            for place, answer in zip(own, answers, strict=True):
                responses[place] = answer
        return responses

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        experts_LBS = getattr(output, "experts_per_token", None)
        if experts_LBS is not None:
            self._passes.append(experts_LBS)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._passes.clear()
        self._row = 0
        return super()._model_call(inps, *args, **kwargs)

    def _select_cont_toks(
        self, logits: Tensor, contlen: int | None = None, inplen: int | None = None
    ) -> Tensor:
        """Called for the rows of a batch in turn, with the length of each without its padding."""
        if self._passes:
            self._add(self._passes[-1][:, self._row, :inplen])
            self._row += 1
        return super()._select_cont_toks(logits, contlen, inplen)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> Tensor:
        self._passes.clear()
        output_BS = super()._model_generate(context, max_length, stop, **kwargs)
        if self._passes:
            experts_LBS = torch.cat(self._passes, dim=2)
            prompt = context.shape[1]
            if experts_LBS.shape[1:] != (len(output_BS), output_BS.shape[1] - 1):
                raise ValueError(
                    f"task {self._task}: its generation_kwargs make the model read more than one "
                    "continuation (beams, several samples), whose experts cannot be told apart: "
                    "take a task with greedy generation or simple sampling"
                )
            mask_BS = kwargs["attention_mask"].bool()
            for row, tokens_S in enumerate(output_BS):
                answer = self._answer_length(tokens_S, prompt, stop)
                self._add(experts_LBS[:, row, :prompt][:, mask_BS[row]])
                self._add(experts_LBS[:, row, prompt : prompt + answer - 1])  # the last is not read
        return output_BS

    def _answer_length(self, tokens_S: Tensor, prompt: int, stop: list[str]) -> int:
        """How many tokens are generated when this row is alone in its batch."""
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        criteria = stop_sequences_criteria(self.tokenizer, stop, prompt, 1)
        answer = tokens_S[prompt:].tolist()
        for length, token in enumerate(answer, 1):
            so_far = tokens_S[None, : prompt + length]
            if token in ends or any(criterion(so_far, None) for criterion in criteria):
                return length
        return len(answer)

    def _add(self, experts_LT: Tensor) -> None:
        sums_L = experts_LT.sum(dim=1)
        self.tokens[self._task] += experts_LT.shape[1]
        self.experts_L[self._task] = self.experts_L.get(self._task, 0) + sums_L
