"""Validation of a record's value against its schema, whole.

Guidance enforces each output, but not what merging makes of several, nor outputs of a model without it. Validated is
the schema as guidance enforces it (``json_schema.enforceable``), so that both mean the same.

By ``jsonschema-rs``, because a job may bring the schema and the event loop waits: patterns are matched without
backtracking (``jsonschema`` uses Python's ``re``), and no reference is fetched. What neither bounds is the number of
evaluations: references that are followed twice a level double it with each. It is counted before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

from nanovllm.engine.sampling.json_schema import BRANCHES, NAMED, NESTED, enforceable, unwrapped
from nanovllm.errors import ConfigurationError, UnsupportedConstraint
from nanovllm.messages.document_record import SchemaError, ValidationOutcome
from nanovllm.pipeline.documents.fields import resolved
from nanovllm.pipeline.documents.json_spans import escaped

MAX_ERRORS = 20
MAX_EVALUATIONS = 1_000_000  # of subschemas, about 0.1 s
_DEFINITIONS = frozenset({"$defs", "definitions"})
_MAX_MESSAGE_CHARS = 200


class SchemaValidator:
    """Validator of one schema.

    Raises:
        UnsupportedConstraint: no valid schema, a reference out of it, or a pattern that only backtracking could match.
        ConfigurationError: the extra ``documents`` is not installed.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        try:
            import jsonschema_rs
        except ImportError:
            raise ConfigurationError(
                "document records need jsonschema-rs: pip install '.[documents]' in a clone"
            ) from None
        whole = unwrapped(dict(schema))
        evaluations = _count_evaluations(whole, whole, {})
        if evaluations > MAX_EVALUATIONS:
            raise UnsupportedConstraint(
                f"validating may take {evaluations} evaluations, of which {MAX_EVALUATIONS} are allowed: "
                "write references that are followed once"
            )
        canonical = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        self.schema_sha256 = hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()
        try:
            self._validator = jsonschema_rs.validator_for(
                enforceable(whole), validate_formats=True, offline=True, pattern_options=jsonschema_rs.RegexOptions()
            )
        except (ValueError, jsonschema_rs.ReferencingError) as error:
            raise UnsupportedConstraint(f"the schema cannot be validated against: {_first_line(error)}") from None

    def validate(self, value: Any) -> ValidationOutcome:
        """Whether ``value`` follows the schema, and where it does not, the first ``MAX_ERRORS`` places."""
        errors = tuple(
            SchemaError(
                path="".join(f"/{escaped(str(part))}" for part in error.instance_path),
                keyword=error.kind.name,
                message=_first_line(error),
            )
            for error in islice(self._validator.iter_errors(value), MAX_ERRORS)
        )
        return ValidationOutcome(schema_sha256=self.schema_sha256, ok=not errors, errors=errors)

    def refused(self, message: str) -> ValidationOutcome:
        """The outcome of an output that is no JSON."""
        error = SchemaError(path="", keyword="json", message=message[:_MAX_MESSAGE_CHARS])
        return ValidationOutcome(schema_sha256=self.schema_sha256, ok=False, errors=(error,))


def _count_evaluations(schema: Any, root: Any, known: dict[int, int]) -> int:
    """How often a subschema is evaluated for a value that has one item an array and does not recur."""
    if not isinstance(schema, dict) or not schema:
        return 1
    if id(schema) not in known:
        known[id(schema)] = 1
        parts = [part for key in NAMED - _DEFINITIONS for part in _values(schema.get(key))]
        parts += [part for key in BRANCHES | NESTED for part in _values(schema.get(key), is_list=True)]
        if "$ref" in schema:
            parts.append(resolved(schema, root))
        known[id(schema)] = 1 + sum(_count_evaluations(part, root, known) for part in parts)
    return known[id(schema)]


def _values(found: Any, *, is_list: bool = False) -> list[Any]:
    if is_list:
        return found if isinstance(found, list) else [found] if isinstance(found, dict) else []
    return list(found.values()) if isinstance(found, dict) else []


def _first_line(error: Exception) -> str:
    return str(getattr(error, "message", error)).split("\n")[0][:_MAX_MESSAGE_CHARS]
