"""A model for lm-eval that counts the experts of every token it reads, by task.

This module imports lm-eval, so it is imported only when an evaluation begins.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor

from megatron_dynmoe.huggingface.encoding import (
    added_ids,
    encode_continuation,
    encode_prompt,
    encode_text,
)
from megatron_dynmoe.use.load import ids_to_suppress


class CountingLM(HFLM):
    """An HFLM for one loaded model that sums its outputs' ``experts_per_token``.

    It counts only what the requests themselves make the model read, whatever the batches are: no
    padding, and nothing after the end of a generated answer while longer answers of the batch go
    on. If several requests share a text up to their last token, the model reads and counts it once.

    Attributes:
        tokens: for each task, how many tokens were counted.
        experts_L: for each task, int64 of shape [MoE layers]: the experts of all those tokens. Like
            ``tokens``, it is empty for a model whose outputs have no ``experts_per_token``.
        shortened: for each task whose answers may be longer than the model's positions allow, the
            most tokens that the task asks for, and the most that it gets.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        begin, _ = added_ids(tokenizer)
        logger = logging.getLogger("lm_eval")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of a model in memory, which is meant here
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            # This precedes a text without context, as the end of a document does in training.
            prefix_token_id=begin[-1] if begin else tokenizer.eos_token_id,
        )
        logger.setLevel(level)
        self.tokens: dict[str, int] = defaultdict(int)
        self.experts_L: dict[str, Tensor] = {}
        self.shortened: dict[str, tuple[int, int]] = {}
        self._task = ""
        self._begins_texts = True
        self._passes: list[Tensor] = []  # experts_per_token of the forward passes of one batch
        self._row = 0
        model.register_forward_hook(self._keep)

    def start_counting(self) -> None:
        """Forget all earlier counts."""
        self.tokens.clear()
        self.experts_L.clear()
        self.shortened.clear()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        # How much texts share would depend on the windows that meet in a batch. lm-eval itself puts
        # the begin token before the first window, and does not score it.
        self.logits_cache = self._begins_texts = False
        try:
            return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)
        finally:
            self.logits_cache = self._begins_texts = True

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """The ids of a prompt, without the tokens that the tokenizer would put after it."""
        if add_special_tokens is None:
            add_special_tokens = self._begins_texts
        encode = encode_prompt if add_special_tokens else encode_text
        ids = encode(self.tokenizer, string)
        if not self._begins_texts and ids[:1] == [self.prefix_token_id]:
            ids = ids[1:]  # the text itself spells the begin token out
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context, and those of what follows it, neither of them empty.

        lm-eval cuts the ids of both together after as many as the context alone has. If a token
        spans the join (``hello wor`` + ``ld``), that leaves out a part of the continuation or all
        of it, which lm-eval then scores without a word, or stops at. Such a continuation is encoded
        by itself. Spaces at the context's end belong to the continuation, as with lm-eval.
        """
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        if not bare:  # only spaces: the continuation begins the text
            return [self.prefix_token_id], encode_text(self.tokenizer, continuation)
        ids, whole = self.tok_encode(bare), self.tok_encode(bare + continuation)
        if whole[: len(ids)] == ids and len(whole) > len(ids):
            return ids, whole[len(ids) :]
        return ids, encode_continuation(self.tokenizer, continuation)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts as :meth:`tok_encode` does, padded: ids and mask, [B, S] int64."""
        rows = [
            self.tok_encode(string, left_truncate_len=left_truncate_len) or [self.prefix_token_id]
            for string in strings
        ]
        padded = self.tokenizer.pad(
            {"input_ids": rows}, padding_side=padding_side, return_tensors="pt"
        )
        return padded["input_ids"], padded["attention_mask"]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        requests = [self._fitting(request) for request in requests]
        return self._by_task(super().generate_until, requests, disable_tqdm)

    def _fitting(self, request: Any) -> Any:
        """If the answer would fill all the model's positions, limit it to half of them.

        lm-eval asks for 256 tokens unless a task says otherwise, and cuts off the beginning of a
        prompt that does not fit into the positions left. Here none would be left.
        """
        context, settings = request.args
        most = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
        if most < self.max_length:
            return request
        fits = max(1, self.max_length // 2)
        self.shortened[request.task_name] = most, fits
        return dataclasses.replace(request, arguments=(context, settings | {"max_gen_toks": fits}))

    def _by_task(
        self, run: Callable[..., list[Any]], requests: Sequence[Any], disable_tqdm: bool
    ) -> list[Any]:
        """Split the requests by task, since lm-eval passes them all and no batch may mix tasks."""
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
        """lm-eval calls this for each row of a batch, with its length without padding."""
        if self._passes:
            self._add(self._passes[-1][:, self._row, :inplen])
            self._row += 1
        return super()._select_cont_toks(logits, contlen, inplen)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> Tensor:
        self._passes.clear()
        kwargs.setdefault("suppress_tokens", ids_to_suppress(self.model, self.tokenizer))
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
                self._add(experts_LBS[:, row, prompt : prompt + answer - 1])  # last one is unread
        return output_BS

    def _answer_length(self, tokens_S: Tensor, prompt: int, stop: list[str]) -> int:
        """How many tokens this row would generate if it were alone in its batch."""
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
