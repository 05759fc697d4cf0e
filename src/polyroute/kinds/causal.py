"""The kind of decoder-only models."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from polyroute.errors import InputError
from polyroute.kinds.base import MAX_INPUT, MAX_TARGET
from polyroute.kinds.batches import (
    IGNORED,
    Ids,
    Row,
    flat_tasks,
    on_device_of,
    padded,
    rounded,
    tasks_of,
)
from polyroute.kinds.chat import ChatTemplate, template_of
from polyroute.kinds.objectives import Objective
from polyroute.kinds.packing import Packing, can_pack, packed_rows
from polyroute.kinds.predictions import Predictions, has_own_terms, predict
from polyroute.kinds.prompts import PlainText, Prompter, fitted, prompt_text, rows_of
from polyroute.kinds.shared_prompts import (
    draws_numbers,
    longest_row,
    longest_shared,
    mask_for,
    shared_rows,
)
from polyroute.kinds.text import TextKind
from polyroute.saved.prompting import Prompting

__all__ = ["CausalKind"]


class CausalKind(TextKind):
    """Decoder-only models, such as Llama: one sequence of prompt, newline, target and end token.

    An instruct model is prompted by its chat template instead, and its target is the assistant's
    answer through the end of its turn.

    If a sequence is longer than `max_input + max_target` or than the model's positions, the
    beginning of its prompt is cut (a BOS token stays), never its target. A batch has `input_ids`,
    `attention_mask`, `labels` `[B, L]` and `tasks`; `labels` are -100 on prompt and padding. If
    choices are compared, each choice is a separate row with its own copy of the prompt, so B is
    N. Padding is on the right, so that positions count from 0 in every architecture; for generation
    it is on the left, because `generate` derives positions from the mask.
    """

    name = "causal"
    auto_class = AutoModelForCausalLM
    one_sequence = True
    cut_part = "the beginning of their input"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_input: int = MAX_INPUT,
        max_target: int = MAX_TARGET,
        max_positions: int | None = None,
        objective: str | Objective = "lm",
        prompt: str | ChatTemplate = "auto",
    ) -> None:
        """Set the lengths, in tokens, the objective and the prompts; see `ModelKind`.

        Args:
            tokenizer: see `ModelKind`.
            max_input: see `ModelKind`.
            max_target: see `ModelKind`.
            max_positions: see `ModelKind`.
            objective: see `ModelKind`.
            prompt: `"chat"`, `"plain"`, `"auto"`, or a chat template; see `polyroute.kinds.chat`.

        Raises:
            InputError: see `ModelKind` and `polyroute.kinds.chat.template_of`.
        """
        super().__init__(
            tokenizer,
            max_input=max_input,
            max_target=max_target,
            max_positions=max_positions,
            objective=objective,
        )
        self.limit = min(max_input + max_target, self.max_positions)
        self.max_target = min(max_target, self.limit - 1)  # a prompt token must precede it
        self.template = template_of(prompt, tokenizer)

    @property
    def prompting(self) -> Prompting:
        """See `ModelKind.prompting`."""
        if self.template is None:
            return Prompting("plain", newline=True)
        return Prompting("chat", self.template.system, left_out=self.template.left_out)

    def _prompts(
        self, examples: Mapping[str, list[Any]], longest: Sequence[int]
    ) -> list[tuple[Ids, int]]:
        rows, whole = rows_of(examples), self._prompt_ids(examples)
        found = []
        for row, ids, answer in zip(rows, whole, longest, strict=True):
            # A chat leaves room for the longest answer, as a chat server would have to.
            room = self.limit - (answer if self.template is None else self.max_target)
            if len(ids) > room:
                cut = fitted(self._prompter, row, room, self.remedy("max_input"))
                found.append((cut, len(ids)))
            else:
                found.append((ids, len(ids)))
        return found

    def text_ids(self, texts: list[str]) -> list[Ids]:
        """See `ModelKind.text_ids`; an answer is to follow, so they have no end token."""
        return PlainText(self.tokenizer).ids(texts)

    def remedy(self, setting: Literal["max_input", "max_target"]) -> str:
        """See `ModelKind.remedy`; a prompt and its answer share the positions."""
        has = f"the base model has {self.max_positions} positions for a prompt and its answer"
        total = self.max_input + self.max_target
        if setting == "max_target" and self.max_target == self.max_positions - 1:
            return f"{has}, so shorten the answers"
        if setting == "max_target" or total < self.max_positions:
            return super().remedy(setting)
        if self.template is None:
            return f"{has}, so shorten the examples"
        lower = f"lower max_target, which is {self.max_target}"
        if total == self.max_positions:
            return f"{has}, so raise max_input, which is {self.max_input}, and {lower}"
        return f"{has}, so {lower}"

    def _prompt_ids(self, examples: Mapping[str, list[Any]]) -> list[Ids]:
        rows = rows_of(examples)
        return self._prompter.ids([prompt_text(self._prompter, row) for row in rows])

    @property
    def _prompter(self) -> Prompter:
        return self.template or PlainText(self.tokenizer)

    @property
    def _ends(self) -> list[int]:
        own = [] if self.template is None else [self.template.end]
        return list(dict.fromkeys([*own, *super()._ends]))

    def _target_ids(self, texts: list[str]) -> list[Ids]:
        if self.template is not None:
            return self.template.answer_ids(texts)
        return [[*ids, self.tokenizer.eos_token_id] for ids in self._tokens(texts, special=False)]

    def _texts(self, ids: Tensor) -> list[str]:
        texts = super()._texts(ids)
        if self.template is None:
            return texts
        return [text.removeprefix(self.template.lead).lstrip() for text in texts]

    def _batch(
        self, prompts: Sequence[Ids], targets: Sequence[Ids], tasks: list[str]
    ) -> dict[str, Any]:
        pairs = list(zip(prompts, targets, strict=True))
        longest = max(len(prompt) + len(target) for prompt, target in pairs)
        length = rounded(longest, len(pairs), self.max_positions)
        labels = [[IGNORED] * len(prompt) + target for prompt, target in pairs]
        return {
            **self.inputs([prompt + target for prompt, target in pairs], length=length),
            "labels": padded(labels, IGNORED, length=length),
            "tasks": tasks,
        }

    def _targets(self, rows: Sequence[Row]) -> dict[str, Any]:
        targets = [row["target_ids"] for row in rows]
        return self._batch([row["prompt_ids"] for row in rows], targets, tasks_of(rows))

    def _choices(self, rows: Sequence[Row]) -> dict[str, Any]:
        prompts = [row["prompt_ids"] for row in rows for _ in row["choice_ids"]]
        choices = [choice for row in rows for choice in row["choice_ids"]]
        return self._batch(prompts, choices, flat_tasks(rows))

    def collate_packed(self, rows: Sequence[Row], packing: Packing) -> dict[str, Any]:
        """See `ModelKind.collate_packed`; for its tensors see `polyroute.kinds.packing`."""
        batch = packed_rows(
            [row["prompt_ids"] for row in rows],
            [row["target_ids"] for row in rows],
            tasks_of(rows),
            packing,
            pad=self._pad,
            limit=self.max_positions,
        )
        return self.collate(rows) if batch is None else {**batch, **self._term_weights(rows)}

    def packing_of(
        self, model: nn.Module, task: str, *, in_training_mode: bool = False
    ) -> Packing | None:
        """See `ModelKind.packing_of`; batches that compare choices are not packed."""
        if self.needs_choices or has_own_terms(model) or not can_pack(model, task):
            return None
        # A rule that is not fixed may look at a whole row, or count the gates of all tokens.
        is_fixed = getattr(getattr(model, "rule", None), "is_fixed", True)
        if not is_fixed or (in_training_mode and draws_numbers(model, task)):
            return Packing()
        return Packing(longest_shared(model, task))

    def _target_predictions(self, model: nn.Module, batch: dict[str, Any]) -> Predictions:
        if "places" in batch:
            places_n, labels_BT = batch.pop("places"), batch.pop("labels")
            if "attention_mask" in batch:
                batch["attention_mask"] = mask_for(model, batch["attention_mask"])
            return predict(model, batch, places_n, labels_BT)
        labels_BL = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        places_n = (labels_BL != IGNORED).flatten().nonzero()[:, 0]
        return predict(model, batch, places_n, labels_BL)

    def _choice_predictions(self, model: nn.Module, batch: dict[str, Any]) -> Predictions:
        return self._target_predictions(model, batch)

    def _mean_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        if has_own_terms(model):
            return super()._mean_loss(model, batch)
        return self._target_predictions(model, on_device_of(model, batch)).mean_loss()

    def _scored(self, model: nn.Module, rows: Sequence[Row]) -> Predictions:
        prompts, choices = ([row[name] for row in rows] for name in ("prompt_ids", "choice_ids"))
        if longest_row(prompts, choices) > longest_shared(model, rows[0]["task"]):
            return super()._scored(model, rows)
        shared = shared_rows(prompts, choices, pad=self._pad, limit=self.max_positions)
        batch = on_device_of(model, {**shared, "tasks": tasks_of(rows)})
        return self._target_predictions(model, batch)

    def generate(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        *,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
    ) -> list[str]:
        """See `ModelKind.generate`."""
        rooms = [self.max_positions - len(row["prompt_ids"]) for row in rows]
        for row, room in zip(rows, rooms, strict=True):
            if room < (max_new_tokens or 1):
                raise InputError(
                    f"a prompt of task {row['task']!r} has {len(row['prompt_ids'])} of the "
                    f"{self.max_positions} positions of the base model, which leaves no room for "
                    f"max_new_tokens={max_new_tokens or 1}: ask for fewer, or lower max_input"
                )
        most = [
            min(self.max_target, room) if max_new_tokens is None else max_new_tokens
            for room in rooms
        ]
        texts = [""] * len(rows)
        for new in dict.fromkeys(most):  # one, unless positions are scarce
            places = [place for place, one in enumerate(most) if one == new]
            some = [rows[place] for place in places]
            inputs = self.inputs([row["prompt_ids"] for row in some], side="left")
            out = self._search(
                model, inputs, tasks_of(some), max_new_tokens=new, num_beams=num_beams
            )
            found = self._texts(out[:, inputs["input_ids"].shape[1] :])
            for place, text in zip(places, found, strict=True):
                texts[place] = text
        return texts
