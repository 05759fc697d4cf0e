"""What training and evaluation need to know about a base model.

A kind turns texts into token ids, ids into batches, and a batch into a loss, scores or text. It
knows nothing about adapters: it calls `model(**batch)` and `model.generate(**inputs)` with `tasks`,
the name of the task of each row of that forward. Each kind has its own file;
`polyroute.kinds.choose` finds the kind of a model.

Shape letters: B rows, C choices, N rows x their choices, U unique choices, L tokens, V vocabulary,
D embedding, T terms of a loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain, takewhile
from typing import Any, ClassVar, Literal

from datasets import Features, Value
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from polyroute.errors import InputError
from polyroute.kinds.batches import Ids, Row, evaluating, on_device_of, padded, token_ids
from polyroute.kinds.objectives import Objective, objective_of
from polyroute.kinds.packing import Packing
from polyroute.kinds.prompts import joined, rows_of, turns
from polyroute.kinds.search import PlainSearch, plain_search
from polyroute.saved.prompting import Prompting
from polyroute.settings import whole

__all__ = ["MAX_INPUT", "MAX_TARGET", "UNBOUNDED", "ModelKind"]

UNBOUNDED = 2**31 - 1
MAX_INPUT, MAX_TARGET = 256, 64
"""The most tokens that are read of a prompt and of a target, unless others are asked for."""


class ModelKind(ABC):
    """How a family of base models reads examples, learns from them and answers."""

    name: ClassVar[str]
    supports_generation: ClassVar[bool]
    auto_class: ClassVar[Any]
    """The transformers class that loads such a model."""

    one_sequence: ClassVar[bool] = False
    """Whether a prompt and its target share the positions of the model."""

    cut_part: ClassVar[str] = "their end"
    """What a prompt loses if it is too long."""

    features: ClassVar[Features] = Features(
        {
            "task": Value("string"),
            "prompt_ids": [Value("int32")],
            "target_ids": [Value("int32")],
            "choice_ids": [[Value("int32")]],
            "label": Value("int64"),
            "prompt_cut": Value("int32"),
            "target_cut": Value("int32"),
        }
    )
    """The columns of `encode`, for `Dataset.map(..., features=kind.features)`. Without them, if the
    first thousand rows have no choices, datasets infers a column of nulls and fails on the first
    row that has some."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_input: int = MAX_INPUT,
        max_target: int = MAX_TARGET,
        max_positions: int | None = None,
        objective: str | Objective = "lm",
    ) -> None:
        """Set the lengths, in tokens, and the objective.

        Args:
            tokenizer: the base model's tokenizer.
            max_input: the most tokens of a prompt, at least 2.
            max_target: the most tokens of a target or choice with its end token, at least 2.
            max_positions: the longest sequence that the model accepts; None for no limit.
            objective: the loss, by name or value; see `polyroute.kinds.objectives`.

        Raises:
            InputError: a length is below 2, the kind writes text but the tokenizer has no end
                token, or the kind does not support the objective.
        """
        if self.supports_generation and tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end token: set tokenizer.eos_token")
        for setting, value in (("max_input", max_input), ("max_target", max_target)):
            whole(2)(setting, value)
        self.objective = objective_of(objective)
        self.tokenizer = tokenizer
        self.max_positions = max_positions or UNBOUNDED
        self.max_input = min(max_input, self.max_positions)
        self.max_target = min(max_target, self.max_positions)

    @property
    def prompting(self) -> Prompting:
        """How the base model is prompted, for the card of what trains on it."""
        return Prompting("plain")

    def encode(self, examples: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Turn a batch of texts into token ids, as a function for `datasets.Dataset.map`.

        Equal tokenizers, lengths and objectives have equal fingerprints, so a second `map` uses
        the cache.

        Args:
            examples: the columns `task`, `instruction`, `input`, `target` and `choices` (a list
                of texts, or None). Conversations have `system` (a text, or None) and `history` (a
                list of messages with `role` and `content`, or None) too.

        Returns:
            The columns of `features`. `choice_ids` is empty for a row without choices; `label` is
            the index of the target among the choices, or -1. `prompt_cut` and `target_cut` are the
            numbers of tokens that the prompt, and the target or a choice, lost to be short enough.
        """
        choices = [row or [] for row in examples["choices"]]
        texts = list(dict.fromkeys(chain(examples["target"], *choices)))  # label sets repeat
        whole = dict(zip(texts, self._target_ids(texts), strict=True))
        ids = {text: self._cut_target(whole[text]) for text in texts}
        answers = [[target, *row] for target, row in zip(examples["target"], choices, strict=True)]
        longest = [max(len(ids[text]) for text in row) for row in answers]
        prompts = self._prompts(examples, longest)
        return {
            "task": list(examples["task"]),
            "prompt_ids": [cut for cut, _ in prompts],
            "target_ids": [ids[text] for text in examples["target"]],
            "choice_ids": [[ids[text] for text in row] for row in choices],
            "label": [
                row.index(target) if target in row else -1
                for row, target in zip(choices, examples["target"], strict=True)
            ],
            "prompt_cut": [max(0, length - len(cut)) for cut, length in prompts],
            "target_cut": [
                max(len(whole[text]) - len(ids[text]) for text in row) for row in answers
            ],
        }

    def text_ids(self, texts: list[str]) -> list[Ids]:
        """The token ids of prompts that are given as texts, which no chat template changes.

        They have the special tokens that the model reads around a prompt, and are not cut.
        """
        return self._tokens(texts, special=True)

    def remedy(self, setting: Literal["max_input", "max_target"]) -> str:
        """What helps where prompts (`max_input`) or answers (`max_target`) are too long: a clause.

        It names the limit that cuts them.
        """
        limit = self.max_input if setting == "max_input" else self.max_target
        if limit < self.max_positions:
            return f"raise {setting}, which is {limit}"
        return f"the base model has {limit} positions, so shorten the examples"

    def lengths(self, examples: Mapping[str, list[Any]]) -> list[tuple[int, int]]:
        """For each example the tokens of its prompt, and of its longest target or choice, uncut.

        Args:
            examples: see `encode`.
        """
        answers = [
            [target, *(choices or [])]
            for target, choices in zip(examples["target"], examples["choices"], strict=True)
        ]
        texts = list(dict.fromkeys(chain.from_iterable(answers)))
        length = {t: len(ids) for t, ids in zip(texts, self._target_ids(texts), strict=True)}
        longest = [max(length[text] for text in row) for row in answers]
        return list(zip(map(len, self._prompt_ids(examples)), longest, strict=True))

    def _prompts(
        self, examples: Mapping[str, list[Any]], longest: Sequence[int]
    ) -> list[tuple[Ids, int]]:
        """The token ids of the prompts of examples, cut to length, and their whole lengths.

        Args:
            examples: see `encode`.
            longest: for each example the number of tokens of its longest target or choice.
        """
        return [(self._cut(ids, self.max_input), len(ids)) for ids in self._prompt_ids(examples)]

    def _prompt_ids(self, examples: Mapping[str, list[Any]]) -> list[Ids]:
        """The token ids of the prompts of examples, however long they are."""
        return self.text_ids([joined(row.get("system"), turns(row)) for row in rows_of(examples)])

    @abstractmethod
    def _target_ids(self, texts: list[str]) -> list[Ids]:
        """The token ids of targets or choices, with the special tokens around them."""

    def _cut_target(self, ids: Ids) -> Ids:
        """A target of `max_target` tokens at most.

        One that is cut has no end token, or the model would learn to stop there.
        """
        return ids[: self.max_target]

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Make a training batch of encoded rows, on the CPU.

        Returns:
            Tensors, and in `tasks` the task name of each row. Each kind documents its tensors.

        Raises:
            InputError: the loss compares choices, and a row has none or its target is not one of
                them.
        """

    def collate_packed(self, rows: Sequence[Row], packing: Packing) -> dict[str, Any]:
        """A training batch as `collate` makes it, in the form that is cheapest to compute.

        It has little padding, and may hold tokens once that several examples begin with.

        Args:
            rows: encoded rows.
            packing: what `packing_of` found of the model.
        """
        return self.collate(rows)

    def packing_of(
        self, model: nn.Module, task: str, *, in_training_mode: bool = False
    ) -> Packing | None:
        """How a model computes batches from `collate_packed` as those from `collate`.

        Args:
            model: the routed model, on which it is tried.
            task: a task of its.
            in_training_mode: whether dropout and noise will be active, where the model has them.

        Returns:
            None if it cannot.
        """
        return None

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The training loss of a batch from `collate`: a scalar on the model's device."""

    @abstractmethod
    def row_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The terms of the loss of each row of a batch from `collate`: `[B, T]`, at least float32.

        Each term is a sum over the predictions that `row_counts` counts. The loss of a batch is the
        sum over its rows, weighted by `polyroute.kinds.objectives.term_weights` of `row_counts`; so
        the rows of a batch may be computed in any grouping.
        """

    @abstractmethod
    def row_counts(self, rows: Sequence[Row]) -> list[list[int]]:
        """The number of predictions that each row is scored on, in each of T terms."""

    def row_shape(self, row: Row) -> tuple[int, tuple[int, ...], Mapping[Any, int]]:
        """What one row adds to a batch.

        Returns:
            The number of copies of its sequences; their lengths, each of which is padded to the
            longest in the batch; and the lengths, by key, of sequences that rows of a batch share.
        """
        return 1, (len(row["prompt_ids"]), len(row["target_ids"])), {}

    @property
    @abstractmethod
    def needs_choices(self) -> bool:
        """Whether rows without choices cannot be learned from."""

    @abstractmethod
    def scores(self, model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        """Score every choice of every row; higher is better.

        Runs all rows in one batch, in evaluation mode without gradients.

        Returns:
            One float32 tensor `[C, 2]` per row: the log-probability of the choice, its end token
            included, and the same per token. Encoders return the scaled cosine in both columns.

        Raises:
            InputError: a row has no choices.
        """

    @abstractmethod
    def entropies(self, model: nn.Module, rows: Sequence[Row]) -> Tensor:
        """The entropy of the model's choice of each row, in nats: `[B]`, float32, with a gradient.

        Choices are as likely as the model finds them, by the sum over their tokens. The answers of
        the rows are not used.

        Raises:
            InputError: a row has no choices.
        """

    @abstractmethod
    def generate(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        *,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
    ) -> list[str]:
        """Answer each row with text, by greedy or beam search without sampling.

        Nothing of the base model's generation config applies but its start and end tokens.

        Args:
            model: the routed model.
            rows: encoded rows, all in one batch.
            max_new_tokens: the most tokens of an answer; None for `max_target`, or for what the
                positions of the base model leave to the answer of a row if that is less.
            num_beams: 1 for greedy search.

        Returns:
            One text per row, stripped and without special tokens.

        Raises:
            InputError: this kind cannot generate text, or a prompt leaves no room for that many
                tokens.
        """

    @property
    def _pad(self) -> int:
        """The padding id. The mask hides it, so any id will do if there is no pad token."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in ids if isinstance(i, int))

    @property
    def _ends(self) -> list[int]:
        """The tokens that end an answer."""
        return [self.tokenizer.eos_token_id]

    def _starts(self, model: nn.Module) -> dict[str, int]:
        """The tokens that begin an answer, by setting of `generate`, besides those of the model."""
        return {}

    def _tokens(self, texts: list[str], *, special: bool) -> list[Ids]:
        return token_ids(self.tokenizer, texts, special=special)

    def _cut(self, ids: Ids, length: int) -> Ids:
        """The first `length` ids; special tokens at the end, at most two, are kept."""
        if len(ids) <= length:
            return ids
        special = self.tokenizer.all_special_ids
        last = list(takewhile(special.__contains__, ids[: -1 - min(2, length) : -1]))[::-1]
        return ids[: length - len(last)] + last

    def inputs(
        self,
        sequences: Sequence[Ids],
        *,
        side: Literal["left", "right"] = "right",
        length: int = 0,
    ) -> dict[str, Tensor]:
        """Padded `input_ids` and `attention_mask`, both `[B, L]`; see `batches.padded`."""
        mask = [[1] * len(ids) for ids in sequences]
        return {
            "input_ids": padded(sequences, self._pad, side=side, length=length),
            "attention_mask": padded(mask, 0, side=side, length=length),
        }

    def search(self, model: nn.Module, *, max_new_tokens: int, num_beams: int = 1) -> PlainSearch:
        """The settings of greedy or beam search with a model; see `plain_search`."""
        return plain_search(
            model,
            ends=self._ends,
            pad=self._pad,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            starts=self._starts(model),
        )

    def _search(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        tasks: list[str],
        *,
        max_new_tokens: int,
        num_beams: int,
    ) -> Tensor:
        batch = on_device_of(model, inputs)
        settings = self.search(model, max_new_tokens=max_new_tokens, num_beams=num_beams)
        with evaluating(model):
            out: Tensor = model.generate(  # type: ignore[operator]  # nn.Module hides methods
                **batch, tasks=tasks, generation_config=settings
            )
        return out

    def _texts(self, ids: Tensor) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]
