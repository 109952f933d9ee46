"""What ``check`` measures: the student once, and the teacher with each context layout.

Legend: N completion tokens of all examples without padding.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch

from selfdistill.config import CheckConfig, default_learning_rate
from selfdistill.data import (
    Demonstration,
    Example,
    RowProblem,
    by_reason,
    context_of,
    default_scorer,
    doubt_about,
    is_scorable,
    notes_on,
    notes_on_rendered,
)
from selfdistill.errors import UserError
from selfdistill.evaluation.answers import Answers, answer, check_answers
from selfdistill.evaluation.check_result import Cost, Layout
from selfdistill.evaluation.distances import kl_along, summed_loss
from selfdistill.evaluation.episodes import encoded, note_on_unused_tools, player_of, rows_of
from selfdistill.evaluation.judge import judge_of
from selfdistill.evaluation.spill import (
    Anchors,
    Spill,
    Trial,
    Trials,
    TrialSettings,
    bytes_of_steps,
    drawn_anchors,
    named_anchors,
    task_loss,
)
from selfdistill.loss import CrossEntropy, Divergence
from selfdistill.methods import Completion, scorer_judges
from selfdistill.model import (
    ForwardPass,
    LoadedModel,
    PrefixCache,
    Sampling,
    prompts_at_a_time,
    refuse_float16,
    resolved_precision,
    rest_engine,
    rollout_factor,
    sample,
    sample_seed,
    tensor_bytes,
    with_lora,
)
from selfdistill.runtime import clock, free_memory, is_out_of_memory, peak_memory, say_note

LONG_REPLY = 24
"""Mean tokens of the demonstrations from which on ``exact`` by default is doubtful."""
KEPT_BYTES = 2**28
"""Bytes for the prefix cache of the student's prompts, and again for the teacher's in one layout."""
POSITIONS = 8
"""Number of leading completion tokens whose KL is listed individually."""


class Measure:
    """Evaluates the student once, and the teacher for each layout.

    Args:
        config: settings.
        demonstrations: the data.
        loaded: the model.
        anchors: prompts on which ``spill`` and ``hints`` measure, by source.

    Raises:
        UserError: rows or anchors are too long, or a scorer cannot use the answers.
    """

    def __init__(
        self,
        config: CheckConfig,
        demonstrations: list[Demonstration],
        loaded: LoadedModel,
        anchors: Anchors,
    ) -> None:
        self.config, self.pool, self.loaded = config, rows_of(config, demonstrations), loaded
        self.bfloat16 = resolved_precision(config.mixed_precision) == "bf16"
        self.chat = loaded.chat_for(config)
        self.forward_pass = ForwardPass(loaded)
        self.player = player_of(config, self.chat, batch_size=16)
        self.general = drawn_anchors(config, anchors, loaded, self.chat)
        """The prompts on which ``spill`` and ``hints`` measure."""
        self.general_named = named_anchors(anchors, len(self.general))
        by_scorer = scorer_judges(config)
        scorable = [row for row in self.pool if not by_scorer or is_scorable(row, config.scorer)]
        self.scored = bool(scorable)
        """Whether replies are scored; if not, teacher and student are compared by their distributions alone."""
        asked = scorable or self.pool
        chosen = random.Random(config.seed).sample(asked, min(config.sample, len(asked)))
        self.rows = self._encode(sorted(chosen, key=lambda d: d.row), None)
        self.dropped = len(chosen) - len(self.rows)
        measured = [row.demonstration for row in self.rows]
        if self.scored and by_scorer:
            check_answers(measured, config.scorer)
        for note in (*notes_on_rendered(measured, self.chat), *notes_on(self.rows, self.chat)):
            say_note(note)
        if by_scorer and (doubt := doubt_about(measured, config.scorer, self.chat) or self._word_for_word()):
            say_note(doubt, topic="scorer")
        self.prefix_cache = self.forward_pass.keep([row.student_ids for row in self.rows], KEPT_BYTES)
        self.student = self._answer([row.student_ids for row in self.rows], self.rows)
        rest_engine()
        for note in note_on_unused_tools(self.student.episodes):
            say_note(note)
        self.student_logp = self._logp([row.student_ids for row in self.rows], self.rows, self.prefix_cache)
        began = clock(loaded.device)
        rollouts = self._rollouts()
        at_once = prompts_at_a_time(loaded, self.player.batch_size) if self.player else len(self.rows)
        factor = rollout_factor(loaded.device.type, len(self.rows), config.batch_size, at_once)
        self.batch_rollout_s = factor * (clock(loaded.device) - began)
        rest_engine()
        self.teacher_said: dict[str, Answers] = {}  # by layout
        self.tried: dict[tuple[str, float], Trial | None] = {}  # by layout and share of the demonstration
        self.ran_out = False  # whether the steps of a trial ran out of memory
        self.rollout_of = {row.demonstration.row: r for row, r in zip(self.rows, rollouts, strict=True)}

    def _word_for_word(self) -> str | None:
        """A note that ``exact``, which nobody chose, compares long replies with the demonstrations; else None."""
        named = self.config.scorer or any(
            d.scorer or d.answer is not None for d in (row.demonstration for row in self.rows)
        )
        compared = [row for row in self.rows if default_scorer(row.demonstration, None) == "exact"]
        length = sum(len(row.completion_ids) for row in compared) / max(1, len(compared))
        if named or length < LONG_REPLY:
            return None
        return (
            f"replies count as right only if they repeat demonstrations of {length:.0f} tokens word for word (scorer "
            "exact); for chats and summaries name another, such as judge or a function of your own"
        )

    def _encode(self, rows: Sequence[Demonstration], context: str | None, hint: float = 1) -> list[Example]:
        """Encode the rows that fit the window, both with ``max_completion_length`` and with the demonstration."""
        config, window = self.config, self.loaded.window
        shown = None if context is None else context_of(context, hint)
        made, _ = encoded(config, rows, shown, self.chat, window, self.pool)
        if window is None:
            return made
        lengths = [len(row.teacher_ids or row.student_ids) + len(row.completion_ids) for row in made]
        kept = [row for row, length in zip(made, lengths, strict=True) if length <= window]
        if len(kept) < len(made) and (config.on_long_prompt == "error" or not kept):
            who = "prompt" if context is None else "teacher's prompt"
            before = f"{who} and demonstration have "
            after = f" tokens, limit {window} (the model's context window)"
            long = [pair for pair in zip(made, lengths, strict=True) if pair[1] > window]
            bad = [RowProblem(row.demonstration.source, before, str(length), after) for row, length in long]
            raise UserError(
                f"{len(bad)} of {len(made)} rows do not fit: {by_reason(bad)}; drop them with on_long_prompt drop"
            )
        return kept

    def _shown(self, context: str, hint: float = 1) -> list[Example]:
        """The rows that fit a layout, whose teacher sees the share ``hint`` of the demonstration.

        All shares have the same rows: those that fit with all of it.
        """
        rows = self._encode([row.demonstration for row in self.rows], context)
        return rows if hint == 1 else self._encode([row.demonstration for row in rows], context, hint)

    def accuracy_of(self, answers: Answers) -> float | None:
        """The share of correct replies; None if they are not scored."""
        return answers.accuracy if self.scored else None

    def student_on(self, context: str) -> tuple[list[bool] | None, float | None]:
        """On the rows that fit a layout: whether the student is right on each, and its mean log-probability of the
        demonstrations."""
        fits = {row.demonstration.row for row in self._shown(context)}
        rows, logp = self.rows, self.student_logp
        if len(fits) < len(rows):
            rows = [row for row in rows if row.demonstration.row in fits]
            logp = self._logp([row.student_ids for row in rows], rows, self.prefix_cache)
        if not self.scored:
            return None, logp
        right = zip(self.rows, self.student.correct, strict=True)
        return [is_right for row, is_right in right if row.demonstration.row in fits], logp

    def _arithmetic(self) -> AbstractContextManager[Any]:
        """The precision of the training run."""
        return torch.autocast(self.loaded.device.type, torch.bfloat16, enabled=self.bfloat16)

    def _answer(self, prompts: list[list[int]], rows: Sequence[Example], loaded: LoadedModel | None = None) -> Answers:
        asked, judge = loaded or self.loaded, judge_of(self.config)
        greedy = Sampling(self.config.max_completion_length, temperature=0)
        with self._arithmetic():
            if self.player:
                return self.player(asked, rows, prompts, greedy, judge=judge, scored=self.scored)
            return answer(
                asked,
                prompts,
                [row.demonstration for row in rows],
                self.chat,
                greedy,
                batch_size=16,
                scorer=self.config.scorer,
                judge=judge,
                scored=self.scored,
            )

    def _rollouts(self) -> list[Completion]:
        """One sample of the student per row, or one episode."""
        seeds = [sample_seed(self.config.seed, 0, row.demonstration.row, 0) for row in self.rows]
        prompts = [row.student_ids for row in self.rows]
        with self._arithmetic():
            if self.player:
                played = self.player(self.loaded, self.rows, prompts, self._sampling(), seeds, scored=False)
                return list(played.episodes)
            rollouts = sample(self.loaded, prompts, self._sampling(), seeds)
        return [Completion(row, r.ids, r.logps, r.truncated) for row, r in zip(self.rows, rollouts, strict=True)]

    @torch.no_grad()
    def _logp(
        self, contexts: list[list[int]], rows: Sequence[Example], prefix_cache: PrefixCache | None
    ) -> float | None:
        """Mean log-probability of the demonstrations, nats per token; None if no row has a completion."""
        pairs = [(ids, row) for ids, row in zip(contexts, rows, strict=True) if row.completion_ids]
        total, count = 0.0, 0
        for start in range(0, len(pairs), 8):
            seen, part = zip(*pairs[start : start + 8], strict=True)
            ids, own = [row.completion_ids for row in part], [row.is_own for row in part]
            with self._arithmetic():
                scores = self.forward_pass(self.loaded.model, seen, ids, prefix_cache)
                total -= float(summed_loss(CrossEntropy(), scores, ids, own=own)[0])
            count += sum(map(sum, own))
        return total / count if count else None

    @torch.no_grad()
    def layout(self, context: str, hint: float = 1) -> Layout:
        """Evaluate the teacher with one layout that shows the share ``hint`` of the demonstration.

        Raises:
            UserError: the layout does not fit the data or the window.
        """
        rows = self._shown(context, hint)
        prompts = [row.teacher_ids or [] for row in rows]
        prefix_cache = self.forward_pass.keep(prompts, KEPT_BYTES)
        answers = self._answer(prompts, rows)
        rest_engine()
        if hint == 1:
            self.teacher_said[context] = answers
        kl_N, place_N = [], []
        for start in range(0, len(rows), 8):
            part = slice(start, start + 8)
            rollouts = [self.rollout_of[row.demonstration.row] for row in rows[part]]
            ids, asked = [rollout.ids for rollout in rollouts], [row.student_ids for row in rows[part]]
            with self._arithmetic():
                student = self.forward_pass(self.loaded.model, asked, ids, self.prefix_cache)
                teacher = self.forward_pass(self.loaded.model, prompts[part], ids, prefix_cache)
                of_all_N = summed_loss(Divergence(), student, ids, teacher)[1]["loss"].cpu()
            is_own = [rollout.is_own for rollout in rollouts]
            kl_N.append(of_all_N[torch.tensor([one for row in is_own for one in row])])
            place_N += [place for row in is_own for place in range(sum(row))]
        kl, place = torch.cat(kl_N), torch.tensor(place_N)
        by_position = [float(kl[place == p].mean()) for p in range(POSITIONS) if bool((place == p).any())]
        return Layout(
            context=context,
            items=len(rows),
            accuracy=self.accuracy_of(answers),
            logp=self._logp(prompts, rows, prefix_cache),
            kl=float(kl.mean()),
            kl_by_position=by_position,
            length=sum(answers.lengths) / len(rows),
            truncated=answers.truncated / len(rows),
            prompt_length=sum(map(len, prompts)) / len(rows),
            turns=answers.turns,
            invalid_calls=answers.invalid_calls,
            hint=hint,
        )

    def closeness(self, context: str, tuned: LoadedModel | None) -> tuple[float, float | None, float | None]:
        """KL(teacher||base), the fine-tuned model's accuracy and KL(fine-tuned||base), the latter two None without it.

        Each KL is along the first model's own greedy replies, in nats per token.
        """
        rows = self._shown(context)
        prompts, base = [row.student_ids for row in rows], self.loaded
        said, seen = self.teacher_said[context], [row.teacher_ids or [] for row in rows]
        with self._arithmetic():
            teacher = kl_along(prompts, said.ids, base, base, seen, said.is_own)
        if tuned is None:
            return teacher, None, None
        answers = self._answer(prompts, rows, tuned)
        rest_engine()
        with self._arithmetic():
            return teacher, self.accuracy_of(answers), kl_along(prompts, answers.ids, tuned, base, own=answers.is_own)

    def cost(self, context: str) -> Cost:
        """The expected cost of a step of training.

        Measured with one forward and backward pass, unless full fine-tuning in float32 (16 bytes per weight) cannot fit
        beside what is measured already.

        Raises:
            UserError: the model cannot be adapted, with ``lora_rank``.
        """
        rank = self.config.lora_rank
        weights = sum(p.numel() for p in self.loaded.model.parameters()) * 4
        free = free_memory(self.loaded.device)
        has = None if free is None else free + tensor_bytes(self.loaded.model.parameters())
        if not rank and has is not None and 4 * weights > has:
            needed = f"{4 * weights / 2**30:.1f} GiB"
            return Cost(unknown=f"full fine-tuning needs more than {needed}, and there are {has / 2**30:.1f}")
        try:
            with with_lora(self.loaded, rank, self.config.seed) if rank else nullcontext(self.loaded) as student:
                return self._measured_cost(context, student.model)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return Cost(unknown="one forward and backward pass ran out of memory")
        finally:
            self.loaded.model.zero_grad(set_to_none=True)

    def _measured_cost(self, context: str, model: Any) -> Cost:
        """The same, for the model with the weights to be learnt; leaves their gradients."""
        rows = self._shown(context)[: self.config.batch_size]
        ids = [self.rollout_of[row.demonstration.row].ids for row in rows]
        device = self.loaded.device
        began = clock(device)
        task_loss(model, model, self.forward_pass, Divergence(), rows, ids, self._arithmetic).backward()
        scoring_s = clock(device) - began
        seconds = scoring_s / len(rows) * self.config.batch_size + self.batch_rollout_s
        learnt = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        # Plus AdamW's two moments and the teacher's average, in float32.
        return Cost(seconds, (peak_memory(device) + 3 * learnt) / 2**30, len(rows))

    def spill(self, context: str) -> Spill:
        """How far a few steps of SFT, and of SDFT with this context, move the model on the anchors."""
        sft, sdft = self._trial(CrossEntropy(), context), self.trial(context)
        if sft is None or sdft is None:
            return Spill(untried=self._untried(context))
        return Spill(sft=sft, sdft=sdft, prompts=self.general_named)

    def trial(self, context: str, hint: float = 1) -> Trial | None:
        """The effect of a few steps of SDFT whose teacher sees the share ``hint``; None where spill is not measured."""
        if (context, hint) not in self.tried:
            self.tried[context, hint] = self._trial(Divergence(), context, hint)
        return self.tried[context, hint]

    def _trial(self, loss: CrossEntropy | Divergence, context: str, hint: float = 1) -> Trial | None:
        if self._untried(context):
            return None
        try:
            return self._trials(loss, self._learnable(context, hint))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.ran_out = True
            return None

    def _untried(self, context: str) -> str | None:
        """Why no steps can be taken with a layout; None if they can."""
        if self.player:
            return "its steps need single replies, and this data has episodes"
        if not self.general:
            return "there are no anchors to measure on (setting 'anchors')"
        if not self._learnable(context):
            return "no row has a completion to measure the gain on"
        try:
            if not self.config.lora_rank:
                refuse_float16(self.loaded.model, self.loaded.name)
        except UserError as error:
            return str(error)
        return "its steps ran out of memory" if self.ran_out else self._shortage

    def _learnable(self, context: str, hint: float = 1) -> list[Example]:
        """The rows of a layout that have a completion."""
        return [row for row in self._shown(context, hint) if row.completion_ids]

    @cached_property
    def _shortage(self) -> str | None:
        """Why memory does not suffice for the steps of a trial; None if it does, as far as is known."""
        needed, has = bytes_of_steps(self.loaded, self.config.lora_rank), free_memory(self.loaded.device)
        if has is None or needed <= has:
            return None
        return f"its steps need more than {needed / 2**30:.1f} GiB, and there are {has / 2**30:.1f}"

    @cached_property
    def _trials(self) -> Trials:
        rank = self.config.lora_rank
        rate = self.config.learning_rate or default_learning_rate(rank)
        settings = TrialSettings(rate, self._sampling(), self.config.seed, rank, self._arithmetic)
        return Trials(self.loaded, self.forward_pass, self.general, self.chat, settings)

    def _sampling(self) -> Sampling:
        """The student's policy."""
        return Sampling(self.config.max_completion_length, self.config.temperature)
