"""Grammars of constrained outputs, compiled by llguidance; and the process that tries each of them first.

llguidance 1.9 bounds neither time nor memory of a compilation: the intersection of two dozen patterns takes gigabytes
and does not end. ``python -m nanovllm.engine.sampling.grammars`` is fed by `grammar_compiler` and compiles each grammar
in a fork of its own, under limits of the kernel. No torch here: the process starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections import abc
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, BinaryIO, Self

from nanovllm.confinement import confine, take_over_streams
from nanovllm.engine.sampling.grammar_messages import refusal
from nanovllm.engine.sampling.json_schema import enforceable, unwrapped
from nanovllm.engine.sampling.schema_refusals import check_schema
from nanovllm.errors import ConfigurationError, UnsupportedConstraint
from nanovllm.sampling_params import Constraint

_JSON_STYLE = {
    # Where white space is free, a model that loops fills the output with it, and no token is ever forced.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
_MESSAGE_CHARS = 300


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llguidance reads it: ``tokenizer.json``, or where a token is its text, ``words`` by their ids."""

    tokenizer_json: str
    size: int
    end_token_ids: tuple[int, ...]
    bos_token_id: int | None
    special_token_ids: tuple[int, ...]
    words: tuple[str, ...] | None

    @classmethod
    def of(cls, tokenizer: Any, size: int, end_token_ids: abc.Sequence[int]) -> Self:
        """Of a fast tokenizer of transformers; ``size`` is the model's, which may be larger."""
        text = tokenizer.backend_tokenizer.to_str()
        state = json.loads(text)
        words: tuple[str, ...] | None = None
        if state["model"]["type"] == "WordLevel":
            known = {index: token for token, index in tokenizer.get_vocab().items()}
            words = tuple(known.get(index, "") for index in range(size))
        if state.get("padding") or state.get("truncation"):
            text = json.dumps({**state, "padding": None, "truncation": None})
        specials = tuple(tokenizer.all_special_ids)
        return cls(text, size, tuple(end_token_ids), tokenizer.bos_token_id, specials, words)

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """The inverse of ``json.dumps(asdict(vocabulary))``."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()
        }
        return cls(**fields)

    @cached_property
    def tokens(self) -> Any:
        """An ``llguidance.LLTokenizer``; takes a second where there are 150,000 tokens.

        Raises:
            UnsupportedConstraint: llguidance cannot read this tokenizer.
            ConfigurationError: the extra ``guided`` is not installed.
        """
        llguidance = _llguidance()
        try:
            if self.words is not None:
                return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Words(self)))
            ends = list(self.end_token_ids) or None
            return llguidance.LLTokenizer(self.tokenizer_json, n_vocab=self.size, eos_token=ends)
        except Exception as error:  # the library's own type is Exception
            raise UnsupportedConstraint(f"this checkpoint's tokenizer: {_first_line([str(error)])}") from None


class _Words:
    """A vocabulary whose tokens are their own text, as ``llguidance.TokenizerWrapper`` expects it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers import Tokenizer

        self.tokens = [word.encode() for word in vocabulary.words or ()]
        self.special_token_ids = list(vocabulary.special_token_ids)
        self.eos_token_id = next(iter(vocabulary.end_token_ids), None)
        self.bos_token_id = vocabulary.bos_token_id
        self._encode = Tokenizer.from_str(vocabulary.tokenizer_json).encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False).ids


def grammar_of(constraint: Constraint) -> str:
    """The grammar of a constraint in llguidance's form.

    Raises:
        UnsupportedConstraint: a schema, expression, list of choices or grammar that is malformed.
        ConfigurationError: the extra ``guided`` is not installed.
    """
    matcher = _llguidance().LLMatcher
    try:
        match constraint.kind:
            case "json_schema":
                schema = enforceable(unwrapped(json.loads(constraint.text)))
                check_schema(schema)
                return str(matcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_STYLE))
            case "regex":
                if len(constraint.text) - len(constraint.text.rstrip("\\")) & 1:  # llguidance drops it
                    raise ValueError("the last character, a backslash, escapes nothing: write two, or leave it out")
                return str(matcher.grammar_from_regex(constraint.text))
            case "choice":
                choices = " | ".join(json.dumps(choice) for choice in json.loads(constraint.text))
                return str(matcher.grammar_from_lark(f"start: {choices}"))
            case "grammar":
                return str(matcher.grammar_from_lark(constraint.text))
    except RecursionError:
        raise UnsupportedConstraint("nested too deeply") from None
    except Exception as error:  # a schema may hold anything under any keyword
        raise UnsupportedConstraint(_first_line([str(error)])) from None


def compile_grammar(vocabulary: Vocabulary, grammar: str) -> Any:
    """An ``llguidance.LLMatcher`` at its start. Raises UnsupportedConstraint for what it cannot enforce."""
    matcher, message = _compiled(vocabulary, grammar)
    if message is not None:
        raise UnsupportedConstraint(refusal(grammar, message, lambda part: _compiled(vocabulary, part)[1]))
    return matcher


def _compiled(vocabulary: Vocabulary, grammar: str) -> tuple[Any, str | None]:
    """The matcher, and what llguidance says against the grammar; None where it enforces all of it."""
    matcher = _llguidance().LLMatcher
    # Warnings are errors: a keyword that the library would leave out must not pass as enforced.
    failed, messages = matcher.validate_grammar_with_warnings(grammar, vocabulary.tokens)
    if failed or messages:
        return None, "\n".join(messages) or "refused"
    compiled = matcher(vocabulary.tokens, grammar, log_level=0)
    return compiled, str(compiled.get_error()) if compiled.is_error() else None


def _first_line(messages: abc.Sequence[str]) -> str:
    lines = (line for message in messages for line in message.splitlines() if line.strip())
    return next(lines, "refused")[:_MESSAGE_CHARS]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigurationError("guided output needs llguidance: pip install '.[guided]' in a clone") from None
    return llguidance


@dataclass(frozen=True)
class Trial:
    """A grammar and what its compilation may take."""

    grammar: str
    cpu_s: float
    memory_bytes: int
    niceness: int

    def line(self) -> bytes:
        """As one line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"


@dataclass(frozen=True)
class Verdict:
    """What came of a trial: the bytes that the grammar takes, or why it was refused; ``ran_out`` names the limit."""

    memory_bytes: int = 0
    refused: str | None = None
    ran_out: str | None = None


def main() -> None:
    """Try one grammar a line of stdin until it ends; the first line is the vocabulary."""
    requests, answers = take_over_streams()
    vocabulary = Vocabulary.from_json(requests.readline())
    try:
        _ = vocabulary.tokens
    except UnsupportedConstraint as error:
        _write(answers, Verdict(refused=str(error)))
        return
    _write(answers, Verdict())
    for line in requests:
        _write(answers, _try(vocabulary, Trial(**json.loads(line))))


def _write(stream: BinaryIO, verdict: Verdict) -> None:
    stream.write(json.dumps(asdict(verdict)).encode() + b"\n")
    stream.flush()


def _try(vocabulary: Vocabulary, trial: Trial) -> Verdict:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        _compile_and_exit(vocabulary, trial, write_end)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and said:
        return Verdict(**json.loads(said))
    is_time = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
    return Verdict(ran_out="time" if is_time else "memory")


def _compile_and_exit(vocabulary: Vocabulary, trial: Trial, write_end: int) -> None:
    """In the fork. The kernel ends it with SIGPROF after ``cpu_s``; Rust aborts where memory is refused."""
    try:
        before = _memory_bytes()
        os.nice(trial.niceness)
        confine(None if before is None else before[0] + trial.memory_bytes)
        signal.setitimer(signal.ITIMER_PROF, trial.cpu_s)
        try:
            matcher = compile_grammar(vocabulary, trial.grammar)
            matcher.compute_bitmask()
            if matcher.is_error():
                raise UnsupportedConstraint("no text conforms to it")
            after = _memory_bytes()
            verdict = Verdict(max(0, after[1] - before[1]) if before and after else 0)
        except UnsupportedConstraint as error:
            verdict = Verdict(refused=str(error))
        with os.fdopen(write_end, "wb") as pipe:
            _write(pipe, verdict)
    finally:
        os._exit(0)


def _memory_bytes() -> tuple[int, int] | None:
    """The process's address space and resident set; None outside Linux, where no limit of them would hold."""
    try:
        with open("/proc/self/statm") as file:
            size, resident, *_ = (int(pages) * resource.getpagesize() for pages in file.read().split())
    except OSError:
        return None
    return size, resident


if __name__ == "__main__":
    main()
