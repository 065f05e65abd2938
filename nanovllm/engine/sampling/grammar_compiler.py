"""The grammar compiler: constraints to matchers, each tried in a process first, with a cache bounded in bytes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections import OrderedDict, abc
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from typing import Any

from nanovllm.confinement import environment
from nanovllm.engine.sampling.grammars import Trial, Verdict, Vocabulary, compile_grammar, grammar_of
from nanovllm.engine.sampling.structured_output import Matcher
from nanovllm.errors import UnsupportedConstraint
from nanovllm.sampling_params import Constraint

FIRST_TRIAL_CPU_S = 0.25
"""A grammar that takes longer waits for the second trial, behind others that do; quick ones pass it."""
SLOW_TRIAL_NICENESS = 19
"""The engine and what decodes for it come first."""
MAX_COMPILED_BYTES = 256 << 20
_OVERHEAD_BYTES = 16 << 10  # of a cached entry beside what it holds


class GrammarCompiler:
    """Compiles constraints for one tokenizer. Thread-safe; takes no process until the first constraint.

    Args:
        vocab_size: the model's, which may be larger than the tokenizer's.
        cpu_s: processor seconds that a compilation may take.
        memory_bytes: memory that it may take; all cached ones together take at most ``MAX_COMPILED_BYTES``.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        end_token_ids: abc.Sequence[int],
        *,
        cpu_s: float = 5.0,
        memory_bytes: int = 128 << 20,
    ) -> None:
        self._tokenizer, self._vocab_size, self._end_token_ids = tokenizer, vocab_size, end_token_ids
        self._cpu_s, self._memory_bytes = cpu_s, memory_bytes
        self._cache = _Cache()
        self._quick, self._slow = _TrialProcess(self), _TrialProcess(self)
        # One thread a process: what waits for a slow compilation takes no thread that others need.
        self._quick_thread = ThreadPoolExecutor(1, thread_name_prefix="nanovllm-grammar")
        self._slow_thread = ThreadPoolExecutor(1, thread_name_prefix="nanovllm-slow-grammar")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer in llguidance's form."""
        return Vocabulary.of(self._tokenizer, self._vocab_size, self._end_token_ids)

    def matcher(self, constraint: Constraint) -> Matcher:
        """A fresh matcher for one sequence; waits for its compilation.

        Raises:
            UnsupportedConstraint: what is malformed, too large, or beyond what llguidance can enforce.
            ConfigurationError: the extra ``guided`` is not installed.
        """
        return Matcher(self.compile(constraint).result().deep_copy())

    def compile(self, constraint: Constraint) -> Future[Any]:
        """The compilation of ``constraint``, which other calls may share; raises what ``matcher`` says."""
        return self._cache.get(constraint, self._begin)

    def close(self) -> None:
        """Kill the processes; compilations under way are refused."""
        for process in (self._quick, self._slow):
            process.close()
        for thread in (self._quick_thread, self._slow_thread):
            thread.shutdown(wait=False)

    def _begin(self, constraint: Constraint, compiled: Future[Any]) -> None:
        def attempt(process: _TrialProcess, cpu_s: float) -> None:
            try:
                grammar = grammar_of(constraint)
                niceness = 0 if process is self._quick else SLOW_TRIAL_NICENESS
                verdict = process.run(Trial(grammar, cpu_s, self._memory_bytes, niceness))
                if verdict.ran_out == "time" and process is self._quick and cpu_s < self._cpu_s:
                    self._slow_thread.submit(attempt, self._slow, self._cpu_s)
                    return
                if verdict.ran_out is not None:
                    limit = f"{cpu_s:g} s" if verdict.ran_out == "time" else f"{self._memory_bytes} bytes"
                    raise UnsupportedConstraint(f"compiling it takes more than the {limit} allowed")
                if verdict.refused is not None:
                    raise UnsupportedConstraint(verdict.refused)
                matcher = compile_grammar(self.vocabulary, grammar)
                self._cache.charge(constraint, verdict.memory_bytes)
            except UnsupportedConstraint as error:
                compiled.set_exception(UnsupportedConstraint(f"{constraint.kind}: {error}"))
            except BaseException as error:
                compiled.set_exception(error)
            else:
                compiled.set_result(matcher)

        self._quick_thread.submit(attempt, self._quick, min(FIRST_TRIAL_CPU_S, self._cpu_s))


class _Cache:
    """Compilations by constraint, least recently used first out, bounded in bytes; refusals are kept too."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Constraint, tuple[Future[Any], int]] = OrderedDict()
        self._lock = threading.Lock()
        self._bytes = 0

    def get(self, constraint: Constraint, begin: abc.Callable[[Constraint, Future[Any]], None]) -> Future[Any]:
        with self._lock:
            known = self._entries.get(constraint)
            if known is not None:
                self._entries.move_to_end(constraint)
                return known[0]
            compiled: Future[Any] = Future()
            compiled.set_running_or_notify_cancel()  # others may wait for it: no caller can cancel it
            self._entries[constraint] = compiled, 0
        self.charge(constraint, 0)
        begin(constraint, compiled)
        return compiled

    def charge(self, constraint: Constraint, memory_bytes: int) -> None:
        """Count ``memory_bytes`` for the constraint beside its own text, and drop what exceeds the bound."""
        nbytes = _OVERHEAD_BYTES + 4 * len(constraint.text) + memory_bytes
        with self._lock:
            if constraint not in self._entries:
                return
            compiled, before = self._entries[constraint]
            self._entries[constraint] = compiled, nbytes
            self._bytes += nbytes - before
            while self._bytes > MAX_COMPILED_BYTES and len(self._entries) > 1:
                _, (_, dropped) = self._entries.popitem(last=False)
                self._bytes -= dropped


class _TrialProcess:
    """A process that tries grammars one after another; started when it is needed, and again when it has died."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def run(self, trial: Trial) -> Verdict:
        for _ in range(2):  # one death may have another cause, such as memory that runs out on the machine
            try:
                process = self._process if self._process is not None else self._start()
                return self._exchange(process, trial.line())
            except OSError as error:
                self._kill()
                cause = error
        raise UnsupportedConstraint(f"it ended two processes that compile constraints ({cause})")

    def close(self) -> None:
        self._is_closed = True
        self._kill()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._is_closed:
            raise OSError("the engine is closed")
        process = self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "nanovllm.engine.sampling.grammars"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(), cwd="/",
            # Ctrl-C goes to the whole process group: the worker needs it until it has drained. In another session
            # niceness would have no effect (sched_autogroup).
            process_group=0,
        )  # fmt: skip
        verdict = self._exchange(process, json.dumps(asdict(self._compiler.vocabulary)).encode() + b"\n")
        if verdict.refused is not None:
            self._kill()
            raise UnsupportedConstraint(verdict.refused)
        return process

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes) -> Verdict:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line)
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise OSError("no answer")
        return Verdict(**json.loads(answer))

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError, ValueError):
                    if stream is not None:
                        stream.close()
