"""Random work for the scheduler and its blocks: everything is audited after each step, contents and not only counts."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from strategies import examples

from nanovllm.engine.sampling.structured_output import Matcher
from nanovllm.engine.scheduling.batch import ScheduledBatch, ScheduledRow
from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.sequence import ImageSpan, Sequence
from nanovllm.engine.text.output_processor import extend
from nanovllm.sampling_params import SamplingParams

SIZE = 4
IMAGE_TOKEN = 9
NUM_BLOCKS = 12
Written = tuple[bytes, tuple[int, ...], tuple[tuple[bytes, int], ...]]


class _Text:
    """Stands where a Detokenizer would."""

    is_stopped = is_cut = False

    def append(self, _: int) -> str:
        return ""


class _Counting:
    """Stands where llguidance's matcher would: after an odd token the next two are forced."""

    def __init__(self) -> None:
        self.pending: list[int] = []

    def validate_tokens(self, tokens: list[int]) -> int:
        return len(tokens)

    def consume_token(self, token: int) -> bool:
        self.pending = self.pending[1:] if self.pending else [0, 0] if token == 1 else []
        return True

    def compute_ff_tokens(self) -> list[int]:
        return list(self.pending)

    def is_error(self) -> bool:
        return False

    def is_stopped(self) -> bool:
        return False

    def is_accepting(self) -> bool:
        return True


def make_sequence(prompt: list[int], max_tokens: int, **options: Any) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=1.0)
    return Sequence("", list(prompt), len(prompt), sampling, max_tokens, **options)


def content(sequence: Sequence, tokens: list[int], position: int) -> Written:
    """What decides the KV at ``position``: the salt, all tokens up to it, and which images stand where."""
    images = tuple((span.key, span.start) for span in sequence.images if span.start <= position)
    return sequence.cache_salt, tuple(tokens[: position + 1]), images


class World:
    """A scheduler with a model that is a function of the tokens, and a memory of what each slot was written with.

    The model answers what the text's hash says, so that a wrong draft, a stale block or a lost token changes a text.
    It computes steps in the order of their launches. ``is_ahead``: a step is launched before the tokens of the one
    before are read, unless a row has drafts or a matcher.
    """

    def __init__(self, *, is_ahead: bool = False, **options: Any) -> None:
        self.is_ahead = is_ahead
        self.num_ahead = 0
        self.in_flight: list[tuple[tuple[ScheduledRow, ...], dict[Sequence, list[int]]]] = []
        options = {"max_num_seqs": 4, "max_num_batched_tokens": 9, "num_speculative_tokens": 4, **options}
        self.scheduler = Scheduler(BlockManager(options.pop("num_blocks", NUM_BLOCKS), SIZE), **options)
        self.memory: dict[int, Written] = {}
        self.sequences: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.sequences.append(sequence)
        self.scheduler.add(sequence)

    @staticmethod
    def answer(sequence: Sequence, tokens: list[int]) -> int:
        """Repetitive enough for drafts to be right now and then, never in step with them."""
        return hash((sequence.index, tuple(tokens[-2:]), len(tokens) // 7)) % 3

    def step(self) -> None:
        """Launch what may be launched, and commit one step."""
        if not self.in_flight:
            self.launch(self.schedule())
        rows, answers = self.in_flight[0]
        is_followed = self.is_ahead and not any(row.drafts or row.sequence.matcher for row in rows)
        if is_followed and (behind := self.scheduler.schedule_behind(rows)).rows:
            assert sum(row.num_tokens for row in behind.rows) <= self.scheduler.max_num_batched_tokens
            self.launch(behind)
            self.num_ahead += 1
        for row in rows:
            if not row.sequence.is_finished:
                self.commit(row, answers, is_committed=is_followed)
        self.in_flight.pop(0)
        self.audit()

    def schedule(self) -> ScheduledBatch:
        """The rows of a step with nothing in flight, with every rule of what a step may do."""
        # A newcomer that goes before them waits for a seat or for blocks, but never loses what it has once it runs.
        first = min(self.scheduler.running or self.scheduler.waiting)
        scheduled = self.scheduler.schedule()
        assert scheduled.rows, "nothing was scheduled while work waits"
        assert sum(row.num_tokens for row in scheduled.rows) <= self.scheduler.max_num_batched_tokens
        assert len({id(row.sequence) for row in scheduled.rows}) == len(scheduled.rows)
        chosen = {id(row.sequence) for row in scheduled.rows}
        assert id(first) in chosen or self.follows(first, scheduled), "the first in order got nothing"
        return scheduled

    def launch(self, scheduled: ScheduledBatch) -> None:
        tokens = {row.sequence: self.tokens_of(row) for row in scheduled.rows}
        for row in scheduled.rows:
            self.write(row, tokens[row.sequence])
        for row in scheduled.rows:
            self.read(row, tokens[row.sequence])
        answers = {
            row.sequence: [
                self.answer(row.sequence, tokens[row.sequence][: row.end - len(row.drafts) + place])
                for place in range(row.num_samples)
            ]
            for row in scheduled.rows
        }
        self.in_flight.append((scheduled.rows, answers))

    def tokens_of(self, row: ScheduledRow) -> list[int]:
        """All tokens up to the row's end, the one among them that the step in flight samples."""
        ahead = self.in_flight[0][1][row.sequence] if row.sequence.pending is not None else []
        tokens = [*row.sequence.token_ids, *ahead, *row.drafts]
        assert len(tokens) == row.end or not row.is_sampled
        return tokens

    def follows(self, sequence: Sequence, scheduled: ScheduledBatch) -> bool:
        """Whether another row computes what the sequence waits for."""
        mine = set(sequence.block_hashes(SIZE))
        return any(mine & set(row.sequence.block_hashes(SIZE)[row.start // SIZE :]) for row in scheduled.rows)

    @staticmethod
    def slot(sequence: Sequence, position: int) -> int:
        return sequence.block_table[position // SIZE] * SIZE + position % SIZE

    def write(self, row: ScheduledRow, tokens: list[int]) -> None:
        assert row.num_tokens > len(row.drafts)
        for position in range(row.start, row.end):
            self.memory[self.slot(row.sequence, position)] = content(row.sequence, tokens, position)

    def read(self, row: ScheduledRow, tokens: list[int]) -> None:
        for position in range(row.end):
            assert self.memory[self.slot(row.sequence, position)] == content(row.sequence, tokens, position)

    def commit(self, row: ScheduledRow, answers: dict[Sequence, list[int]], *, is_committed: bool) -> None:
        reason, tokens = None, answers[row.sequence]
        row.sequence.pending = None
        if row.is_sampled:
            _, reason = extend(row, _Text(), tokens, [None] * len(tokens))  # type: ignore[arg-type]
        if not is_committed:
            self.scheduler.commit(row)
        if reason is not None:
            self.scheduler.finish(row.sequence)

    def audit(self) -> None:
        self.scheduler.audit()
        assert self.scheduler.running or self.scheduler.blocks.usage == 0.0
        for sequence in self.scheduler.running:
            for position in range(sequence.num_computed_tokens):
                assert self.memory[self.slot(sequence, position)] == content(sequence, sequence.token_ids, position)

    def finish_all(self) -> None:
        # Each step computes a token at least, and the first in order is never preempted: this bound is generous.
        for _ in range(200 * (1 + len(self.sequences))):
            if not self.scheduler.has_unfinished():
                break
            self.step()
        assert not self.scheduler.has_unfinished(), "something starves"
        self.audit()


tokens = st.lists(st.integers(0, 1), min_size=1, max_size=20)


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals of every kind, steps, aborts, preemptions, a forgotten prefix cache."""

    is_ahead = False

    def __init__(self) -> None:
        super().__init__()
        self.world = World(is_ahead=self.is_ahead)

    @rule(prompt=tokens, length=st.integers(1, 12), priority=st.integers(0, 2), n=st.integers(1, 3))
    def arrive(self, prompt: list[int], length: int, priority: int, n: int) -> None:
        for index in range(n):
            self.world.add(make_sequence(prompt, length, priority=priority, index=index))

    @rule(prompt=tokens, length=st.integers(1, 12), salt=st.sampled_from([b"", b"tenant"]))
    def arrive_constrained(self, prompt: list[int], length: int, salt: bytes) -> None:
        self.world.add(make_sequence(prompt, length, cache_salt=salt, matcher=Matcher(_Counting())))

    @rule(before=tokens, keys=st.lists(st.sampled_from([b"a" * 32, b"b" * 32]), min_size=1, max_size=2))
    def arrive_with_images(self, before: list[int], keys: list[bytes]) -> None:
        prompt, spans = list(before), []
        for key in keys:
            spans.append(ImageSpan(None, key, len(prompt), 5))  # type: ignore[arg-type]
            prompt += [IMAGE_TOKEN] * 5 + [0]
        self.world.add(make_sequence(prompt, 6, images=tuple(spans)))

    @precondition(lambda self: self.world.scheduler.has_unfinished())
    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.world.scheduler.has_unfinished():
                self.world.step()

    @precondition(lambda self: self.world.scheduler.has_unfinished())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        scheduler = self.world.scheduler
        sequence = data.draw(st.sampled_from(scheduler.running + scheduler.waiting))
        others = {block for other in scheduler.running if other is not sequence for block in other.block_table}
        own = set(sequence.block_table) - others
        free = scheduler.blocks.num_free
        scheduler.finish(sequence)
        assert scheduler.blocks.num_free == free + len(own), "an abort frees at once"

    @precondition(lambda self: self.world.scheduler.running and not self.world.in_flight)
    @rule()
    def preempt(self) -> None:
        self.world.scheduler._preempt_last()

    @rule()
    def forget(self) -> None:
        blocks = self.world.scheduler.blocks
        for block in list(blocks._block_of.values()):
            blocks._forget(block)

    @invariant()
    def books_are_right(self) -> None:
        self.world.audit()

    def teardown(self) -> None:
        self.world.finish_all()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = examples(60, stateful_step_count=50)


class AheadMachine(SchedulerMachine):
    """The same where the tokens of a step are read behind the launch of the next one."""

    is_ahead = True


TestAheadMachine = AheadMachine.TestCase
TestAheadMachine.settings = examples(60, stateful_step_count=50)


def draw_work(seed: int, count: int) -> list[Sequence]:
    draw = random.Random(seed)
    return [
        make_sequence(
            [draw.randrange(2) for _ in range(draw.randint(1, 24))],
            draw.randint(1, 16),
            priority=draw.randint(-1, 1),
            matcher=Matcher(_Counting()) if draw.random() < 0.2 else None,
        )
        for _ in range(count)
    ]


@examples(40)
@given(
    seed=st.integers(0, 10**6),
    budget=st.integers(1, 40),
    seats=st.integers(1, 6),
    num_blocks=st.integers(10, 24),
    is_ahead=st.booleans(),
)
def test_texts_depend_on_nothing_but_their_prompts(
    seed: int, budget: int, seats: int, num_blocks: int, is_ahead: bool
) -> None:
    together = World(is_ahead=is_ahead, max_num_batched_tokens=budget, max_num_seqs=seats, num_blocks=num_blocks)
    for sequence in draw_work(seed, 10):
        together.add(sequence)
    together.finish_all()
    for mine, alone in zip(together.sequences, draw_work(seed, 10), strict=True):
        world = World(num_speculative_tokens=0, num_blocks=100)
        world.add(alone)
        world.finish_all()
        assert mine.token_ids == alone.token_ids


@pytest.mark.parametrize("is_ahead", [False, True])
def test_thousands_of_operations_go_every_way(is_ahead: bool) -> None:
    """The machine above, driven without a goal; what it is there for must have happened many times."""
    draw = random.Random(0)
    world, arrivals, aborts = World(is_ahead=is_ahead), 0, 0
    scheduler = world.scheduler
    for _ in range(5000):
        deed = draw.random()
        if deed < 0.15 and len(scheduler.waiting) < 8:
            (sequence,) = draw_work(draw.randrange(40), 1)  # prompts come again
            sequence.cache_salt = draw.choice([b"", b"tenant"])
            world.add(sequence)
            arrivals += 1
        elif deed < 0.17 and scheduler.has_unfinished():
            scheduler.finish(draw.choice(scheduler.running + scheduler.waiting))
            aborts += 1
        elif deed < 0.18 and scheduler.running and not world.in_flight:
            scheduler._preempt_last()
        elif scheduler.has_unfinished():
            world.step()
        world.audit()
    world.finish_all()
    happened = (arrivals, aborts, scheduler.num_preemptions, scheduler.prefix_cache_hits // SIZE)
    assert min(*happened, scheduler.prompt_lookup.num_accepted) > 50
    assert (world.num_ahead > 50) is is_ahead
    assert all(sequence.is_finished for sequence in world.sequences)


@pytest.mark.parametrize("seed", range(3))
def test_drafts_are_made_accepted_and_taken_back(seed: int) -> None:
    world = World(max_num_batched_tokens=64, num_blocks=64)
    draw = random.Random(seed)
    for _ in range(8):
        world.add(make_sequence([draw.randrange(2) for _ in range(20)], 60))
    world.finish_all()
    lookup = world.scheduler.prompt_lookup
    assert 0 < lookup.num_accepted < lookup.num_drafted
