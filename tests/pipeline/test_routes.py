"""Routes as they are read: defaults, lines of refusals, one route for an object, no loop."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import combinations, pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from nanovllm.errors import InvalidRoutes
from nanovllm.pipeline.documents.model_profile import NO_MODEL_PROFILE
from nanovllm.pipeline.documents.page_task import page_task
from nanovllm.pipeline.routing import key_sets
from nanovllm.pipeline.routing.key_sets import KeySet
from nanovllm.pipeline.routing.routes import Routes, load_routes
from nanovllm.settings.routes import LadderStep, Match, PagePolicy, Route, RoutesFile, Sidecar

Write = Callable[[str], Path]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "routes.yaml"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of routes; returns its path."""

    def put(text: str) -> Path:
        (tmp_path / "routes.yaml").write_text(text)
        return tmp_path / "routes.yaml"

    return put


@pytest.fixture
def load(write: Write) -> Callable[[str], Routes]:
    """Reads routes from their text."""
    return lambda text: load_routes(write(text))


@pytest.fixture
def refusals(write: Write) -> Callable[[str], list[str]]:
    """The refusals of a text, each without the file's directory."""

    def refused(text: str) -> list[str]:
        with pytest.raises(InvalidRoutes) as error:
            load_routes(write(text))
        return [one.rpartition("/routes.yaml:")[2] if "s3:" not in one else one.split("/routes.yaml:")[1]
                for one in error.value.refusals]  # fmt: skip

    return refused


Load = Callable[[str], Routes]
Refused = Callable[[str], list[str]]


def routes(*pairs: tuple[str, str], more: str = "") -> str:
    """Routes r0, r1, … of a match and of further fields, each in flow style on one line of its own."""
    lines = [f"- {{name: r{at}, prompt: p, match: {{{match}}}{rest}}}" for at, (match, rest) in enumerate(pairs)]
    return "\n".join(["routes:", *lines, more])


def test_the_example_is_read_and_each_object_has_its_route() -> None:
    found = load_routes(EXAMPLE)
    receipts, totals = (entry.route for entry in found.entries)
    assert (receipts.name, totals.name) == ("receipts", "totals")
    assert found.route_of("inbox", "receipts/2026/a.pdf", "application/pdf") is receipts
    assert found.route_of("inbox", "receipts/a.png", "IMAGE/PNG; q=1") is receipts
    assert found.route_of("inbox", "orders/7/confirmation-1", "image/tiff", 10) is totals
    for nothing in (
        ("outbox", "receipts/a.pdf", "application/pdf"),
        ("inbox", "receipts/drafts/a.pdf", "application/pdf"),
        ("inbox", "receipts/a.json", "application/json"),
        ("inbox", "receipts/a.pdf"),
        ("inbox", "invoices/a.pdf", "application/pdf", 20_000_001),
        ("inbox", "invoices/a.pdf", "application/pdf"),
    ):
        assert found.route_of(*nothing) is None, nothing
    assert found.needs_head("inbox", "receipts/a.pdf")
    assert not found.needs_head("inbox", "elsewhere/a.pdf")


def test_defaults_fill_what_a_route_leaves_unset_and_nothing_else() -> None:
    receipts, totals = (entry.route for entry in load_routes(EXAMPLE).entries)
    assert receipts.sampling == {"temperature": 0.0, "max_tokens": 128, "loop_tokens": 32}
    assert totals.sampling["regex"]
    assert totals.sampling["max_tokens"] == 128
    assert receipts.match.bucket == totals.match.bucket == ("inbox",)
    assert receipts.sidecar is not None
    assert receipts.sidecar.template == "s3://{bucket}/{key}.json"
    assert receipts.response_schema is not None
    assert list(receipts.response_schema["properties"]) == ["vendor", "number", "date", "total"]
    assert receipts.job_sampling["json_schema"] == receipts.response_schema
    assert page_task(totals, NO_MODEL_PROFILE).prompt == "What is the total? <|image|>"
    assert page_task(receipts, NO_MODEL_PROFILE).prompt == receipts.prompt


@pytest.mark.parametrize(
    ("own", "schema"),
    [("", {"const": 1}), ("response_schema: {const: 2}", {"const": 2}), ("response_schema: null", None)],
)
def test_a_schema_of_a_route_replaces_the_whole_of_the_defaults(
    load: Load, tmp_path: Path, own: str, schema: object
) -> None:
    (tmp_path / "s.json").write_text('{"const": 1}')
    text = "defaults: {response_schema_file: s.json}\nroutes:\n- name: r\n  prompt: p\n  match: {bucket: bkt, key: k}\n"
    assert load(f"{text}  {own}\n").entries[0].route.response_schema == schema


def test_values_are_jsons_and_names_are_as_they_are_written(load: Load) -> None:
    (entry,) = load(
        "routes:\n- name: r\n  prompt: p\n  match: {bucket: bkt, key: k}\n  response_schema:\n"
        "    properties:\n      no: {enum: [no, yes, 2026-01-31, 1:30, 0o7]}\n"
        "      1: {const: true}\n      on: {const: 1.5}\n"
    ).entries
    assert entry.route.response_schema == {
        "properties": {
            "no": {"enum": ["no", "yes", "2026-01-31", "1:30", "0o7"]},
            "1": {"const": True},
            "on": {"const": 1.5},
        }
    }


MATCH = "bucket: bkt, key: a"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1: holds no mapping"),
        ("routes: []", "1: routes: Tuple should have at least 1 item"),
        ("version: 2\n" + routes((MATCH, "")), "1: version: Input should be 1"),
        ("routes:\n  - name: [", "2: is no valid YAML"),
        ("routes:\n- {name: r, name: s}", "2: name is there twice"),
        ("routes:\n- !!python/name:os.system x", "2: the tag"),
        (routes((MATCH, ", prompts: 1")), "2: route r0: unknown name prompts"),
        (routes((MATCH, ""), (MATCH + ", keys: b", "")), "3: route r1: unknown name match.keys"),
        (routes(("key: a", "")), "2: route r0: match.bucket: Field required"),
        (routes(("bucket: b*, key: a", "")), "2: route r0: match.bucket.0: is no name of a bucket"),
        (routes(("bucket: bkt, key: a/", "")), "2: route r0: match.key.0: ends with a slash"),
        (routes(("bucket: bkt, key: 's3://bkt/a'", "")), "2: route r0: match.key.0: is a URI"),
        (routes((MATCH + ", content_type: pdf", "")), "2: route r0: match.content_type.0: is no content type"),
        (routes((MATCH + ", min_bytes: 9, max_bytes: 8", "")), "2: route r0: match: max_bytes (8) is below"),
        (routes((MATCH, ", pages: {range: 0-2}")), "2: route r0: pages.range: is no list of pages"),
        (routes((MATCH, ", pages: {range: 7-3}")), "2: route r0: pages.range: has a range that ends before"),
        (routes((MATCH, ", pages: {range: -1--2}")), "2: route r0: pages.range: has a range that ends before"),
        (routes((MATCH, ", sampling: {temperature: -1}")), "2: route r0: sampling: temperature:"),
        (routes((MATCH, ", sampling: {n: 2, temperature: 1}")), "2: route r0: sampling: n: 2 outputs"),
        (routes((MATCH, ", sampling: {json_schema: {}}")), "2: route r0: sampling: json_schema: a route has"),
        (routes((MATCH, ", response_schema: {}, sampling: {regex: a}")), "2: route r0: the route: response_schema and"),
        (routes((MATCH, ", on_invalid: review")), "2: route r0: the route: review_topic is unset"),
        (routes((MATCH, ", on_incomplete: retry")), "2: route r0: the route: ladder is empty"),
        (routes((MATCH, ", result_topic: 'a b'")), "2: route r0: result_topic: is no name of a topic"),
        (routes((MATCH, ", sidecar: {place: 's3://bkt/x'}")), "2: route r0: sidecar: place has {key} once"),
        (routes((MATCH, ", sidecar: {place: 's3://{key}/x'}")), "2: route r0: sidecar: place"),
        (routes((MATCH, ", sidecar: {place: 's3://bkt/{name}/{key}'}")), "2: route r0: sidecar: place has {name}"),
        (routes((MATCH, ", sidecar: {place: '{bucket}/{key}'}")), "2: route r0: sidecar: place is no s3://"),
        (routes((MATCH, ", response_schema_file: no.json")), "2: no.json cannot be read: No such file"),
        (routes((MATCH, ", prompt_file: p.txt")), "2: prompt_file and prompt exclude each other"),
        (routes((MATCH, ""), more="page_store: here"), "3: page_store: has the form"),
        ("defaults: {name: x}\n" + routes((MATCH, "")), "1: defaults are fields of a route"),
        ("defaults:\n  pages:\n    dpi: 9\n" + routes((MATCH, ""), (f"{MATCH}b", "")), "3: defaults: pages.dpi:"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_line_number(refusals: Refused, text: str, expected: str) -> None:
    (found,) = refusals(text)
    assert found.startswith(expected)
    assert "\n" not in found


def test_a_place_without_a_slash_and_a_prompt_of_two_pages_are_refused(refusals: Refused) -> None:
    (found,) = refusals(routes((MATCH, ", sidecar: {place: 's3://{bucket}'}")))
    assert "place has {key} once" in found
    (found,) = refusals("routes:\n- name: r\n  match: {bucket: bkt, key: a}\n  prompt: <|image|> and <|image|>")
    assert found.startswith("4: route r: prompt: has 2 image placeholders")


@pytest.mark.parametrize("pages", ["all", "3", "1-3,7,-1", "5-", "-3--1", "2--1, -1"])
def test_ranges_of_pages(load: Load, pages: str) -> None:
    assert load(routes((MATCH, f", pages: {{range: '{pages}'}}"))).entries[0].route.pages.range == pages


def test_every_mistake_is_told_at_once_in_the_line_of_its_own_value(refusals: Refused) -> None:
    found = refusals(
        "routes:\n- name: one\n  prompt: p\n  match:\n    bucket: bkt\n    key:\n      - ok\n      - wrong/\n"
        "- name: two words\n  prompt: p\n  match: {bucket: bkt, key: k}\n  priority: high\n"
    )
    assert [line.split(":")[0] for line in found] == ["8", "9", "12"]


def test_a_schema_file_that_is_no_json_is_named_with_its_own_line(refusals: Refused, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{\n "a": }')
    (found,) = refusals("routes:\n- name: r\n  prompt: p\n  match: {bucket: b, key: k}\n  response_schema_file: s.json")
    assert found == "5: s.json is no valid JSON in line 2: Expecting value"


def test_yaml_that_repeats_itself_without_end_is_refused(refusals: Refused) -> None:
    (found,) = refusals("a: &a [*a]\n")
    assert "levels" in found
    bomb = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
    names = "abcdefg"
    bomb += "".join(f"{to}: &{to} [{', '.join([f'*{at}'] * 9)}]\n" for at, to in pairwise(names))
    (found,) = refusals(bomb)
    assert "values" in found


@pytest.mark.parametrize(
    ("one", "other", "example"),
    [
        ("bucket: bkt, key: 'in/**'", "bucket: [other, bkt], key: '**/*.pdf'", "s3://bkt/in/.pdf"),
        ("bucket: bkt, key: '*a*b*'", "bucket: bkt, key: '*b*a*'", "s3://bkt/bab"),
        (
            "bucket: bkt, key: a, content_type: 'image/*', max_bytes: 9",
            "bucket: bkt, key: '?', content_type: [application/pdf, '*/png'], min_bytes: 9",
            "s3://bkt/a",
        ),
    ],
)
def test_an_object_that_two_routes_take_is_refused_with_an_example(
    refusals: Refused, one: str, other: str, example: str
) -> None:
    (found,) = refusals(routes((one, ""), (other, "")))
    assert found.startswith(f"3: route r1: takes {example}, which route r0 (line 2) takes too")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("bucket: bkt, key: 'in/**'", "bucket: other, key: 'in/**'"),
        ("bucket: bkt, key: 'in/**', exclude: '**/*.pdf'", "bucket: bkt, key: '**/*.pdf'"),
        ("bucket: bkt, key: '**', content_type: 'image/*'", "bucket: bkt, key: '**', content_type: application/pdf"),
        ("bucket: bkt, key: '**', max_bytes: 9", "bucket: bkt, key: '**', min_bytes: 10"),
    ],
)
def test_routes_that_share_no_object_stand_beside_each_other(load: Load, one: str, other: str) -> None:
    assert len(load(routes((one, ""), (other, ""))).entries) == 2


def test_globs_that_cannot_be_compared_are_refused_not_passed(
    refusals: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_sets, "MAX_STATES", 2)
    (found,) = refusals(routes(("bucket: bkt, key: 'a?c*'", ""), ("bucket: bkt, key: '*b*d'", "")))
    assert found.startswith("3: route r1: takes objects of s3://bkt that cannot be told apart (the globs are")


def test_two_routes_of_one_name_are_refused(refusals: Refused) -> None:
    text = routes(("bucket: bkt, key: a", ""), ("bucket: bkt, key: b", "")).replace("r1", "r0")
    assert refusals(text) == ["3: route r0: the name is that of the route in line 2"]


@pytest.mark.parametrize(
    ("match", "sidecar", "loop"),
    [
        ("bucket: bkt, key: '**'", "{}", "s3://bkt/"),
        ("bucket: bkt, key: 'in/**/*.json'", "{format: json}", "s3://bkt/in/.json.json"),
        ("bucket: bkt, key: '*/*'", "{place: 's3://bkt/{key}'}", "s3://bkt/"),
        (
            "bucket: bkt, key: '**/out/*', exclude: '**/*.md'",
            "{place: 's3://bkt/x/out/{key}.md.json'}",
            "s3://bkt/x/out/out/",
        ),
        ("bucket: bkt, key: '**/*.md'", "{format: markdown, place: 's3://bkt/md/{key}.md'}", "s3://bkt/md/.md.md"),
    ],
)
def test_a_route_that_takes_its_own_sidecars_is_refused(refusals: Refused, match: str, sidecar: str, loop: str) -> None:
    (found,) = refusals(routes((match, f", sidecar: {sidecar}")))
    assert found.startswith(f"2: the sidecar of route r0 is written to {loop}")
    assert "route r0 (line 2) takes: a loop" in found


@pytest.mark.parametrize(
    ("reader", "writer"),
    [
        ("bucket: out, key: 'json/**'", "{place: 's3://out/json/{key}.json'}"),
        ("bucket: out, key: '**/bkt/**'", "{place: 's3://out/{bucket}/{key}.json'}"),
        ("bucket: out, key: '*.json', content_type: application/json", "{place: 's3://out/{key}.json'}"),
    ],
)
def test_a_route_that_takes_what_another_writes_is_refused(refusals: Refused, reader: str, writer: str) -> None:
    (found,) = refusals(routes((reader, ""), ("bucket: bkt, key: '*.pdf'", f", sidecar: {writer}")))
    assert found.startswith("3: the sidecar of route r1 is written to s3://out/")
    assert "route r0 (line 2) takes: a loop" in found


@pytest.mark.parametrize(
    ("match", "sidecar"),
    [
        ("bucket: bkt, key: '**/*.pdf'", "{}"),
        ("bucket: bkt, key: '**', content_type: application/pdf", "{format: markdown}"),
        ("bucket: bkt, key: '**', exclude: 'out/**'", "{place: 's3://bkt/out/{key}.json'}"),
        ("bucket: bkt, key: '**'", "{place: 's3://out/{key}.json'}"),
        # Two levels more than the key has, of which the last but one is no `out`.
        ("bucket: bkt, key: 'out/*'", "{place: 's3://bkt/x/{key}.json'}"),
    ],
)
def test_sidecars_that_no_route_takes_are_written(load: Load, match: str, sidecar: str) -> None:
    assert load(routes((match, f", sidecar: {sidecar}"))).entries


def test_finished_pages_where_a_route_reads_are_a_loop(refusals: Refused, load: Load) -> None:
    text = routes(("bucket: bkt, key: '**', exclude: 'parts/**'", ""), more="page_store: 's3://bkt/PLACE'")
    (found,) = refusals(text.replace("PLACE", "pages"))
    assert found.startswith("3: a finished page (page_store) is written to s3://bkt/pages/a, which route r0 (line 2)")
    assert load(text.replace("PLACE", "parts")).page_store == "s3://bkt/parts"
    (found,) = refusals(text.replace("/PLACE", ""))
    assert "a loop" in found
    one_key = routes(("bucket: bkt, key: parts", ""), more="page_store: 's3://bkt/parts'")
    assert load(one_key).entries, "pages lie below their prefix"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("bucket: [one, two], key: a", None),
        ("bucket: one, key: 'a/*'", "bucket: two, key: '*/b'"),
        ("bucket: one, key: a", "bucket: two, key: a"),
    ],
)
def test_two_records_at_one_place_are_refused(refusals: Refused, load: Load, one: str, other: str | None) -> None:
    place = ", sidecar: {place: 's3://out/{key}.json'}"
    text = routes(*((match, place) for match in (one, other) if match))
    (found,) = refusals(text)
    assert "are both written to s3://out/a" in found
    assert load(text.replace("{key}.json", "{bucket}/{key}.json")).entries


def test_the_digest_names_what_decides_the_records(load: Load, tmp_path: Path) -> None:
    def digest(more: str = "", match: str = MATCH) -> str:
        return load(routes((match, more))).entries[0].route.digest

    same = digest()
    assert len(same) == 64
    for more in ("priority: 3", "deadline_s: 9", "result_topic: t", "on_missing: drop"):
        assert digest(f", {more}") == same, more
    for default in ("text: ignore", "pages: {dpi: 150}", "merge: per_document"):
        assert digest(f", {default}") == same, default
    assert digest(match="bucket: other, key: b") == same
    changes = ("text: hint", "pages: {dpi: 151}", "merge: per_row", "ladder: [{dpi: 99}]", "sampling: {temperature: 1}")
    changes += ("sidecar: {}", "sidecar: {format: markdown}")
    changes += ("response_schema: {properties: {a: {}, b: {}}}", "response_schema: {properties: {b: {}, a: {}}}")
    others = [digest(f", {more}") for more in changes]
    assert len({same, *others}) == len(others) + 1
    assert digest(", sidecar: {place: 's3://out/{key}'}") == digest(", sidecar: {}"), "where it lies decides nothing"


def test_the_page_names_every_field_and_its_files_are_read(load: Load, tmp_path: Path) -> None:
    page = (EXAMPLE.parents[1] / "docs" / "routes.md").read_text(encoding="utf-8")
    models = (RoutesFile, Route, Match, PagePolicy, LadderStep, Sidecar)
    names = {name for model in models for name in model.model_fields}
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []
    (tmp_path / "receipt.schema.json").write_text("{}")
    snippets = re.findall(r"```yaml\n(routes:.*?)```", page, re.DOTALL)
    assert snippets
    assert all(load(snippet).entries for snippet in snippets)


LEVELS = st.sampled_from(["**", "*", "a", "b*", "*.a", "[!a]", "a?"])
GLOBS = st.lists(LEVELS, min_size=1, max_size=3).map("/".join)
SIDECARS = st.sampled_from([None, "s3://bkt/{key}.a", "s3://bkt/a/{key}", "s3://bkt/b{key}/b", "s3://out/{key}"])
MATCHES = st.tuples(GLOBS, st.one_of(st.none(), GLOBS), SIDECARS)
SHORT_KEYS = ["".join(key) for length in range(1, 5) for key in product("ab/.", repeat=length)]


@given(st.lists(MATCHES, min_size=1, max_size=3))
@examples(150)
def test_routes_are_refused_exactly_where_objects_show_why(matches: list[tuple[str, str | None, str | None]]) -> None:
    texts = [json.dumps({"bucket": "bkt", "key": key, "exclude": [out] if out else []}) for key, out, _ in matches]
    pairs = [
        (text[1:-1], f", sidecar: {{place: '{place}'}}" if place else "")
        for text, (*_, place) in zip(texts, matches, strict=True)
    ]
    with TemporaryDirectory() as directory:
        file = Path(directory) / "routes.yaml"
        file.write_text(routes(*pairs))
        try:
            entries, said = load_routes(file).entries, ""
        except InvalidRoutes as error:
            entries, said = (), str(error)
    sets = [KeySet.of([key], [out] if out else []) for key, out, _ in matches]
    taken = [{key for key in SHORT_KEYS if keys.matches(key)} for keys in sets]
    written = [
        {place.replace("{key}", key) for key in keys} if place else set()
        for keys, (*_, place) in zip(taken, matches, strict=True)
    ]
    twice = any(one & other for one, other in combinations(taken, 2))
    together = any(one & other for one, other in combinations(written, 2))
    uris = [uri for place in written for uri in place if uri.startswith("s3://bkt/")]
    loops = any(keys.matches(uri.removeprefix("s3://bkt/")) for keys in sets for uri in uris)
    # Each example that is named is one; what short keys show is refused.
    assert not entries or not (twice or together or loops)
    assert said.count("takes too") >= twice
    assert said.count("a loop") >= loops
    assert said.count("both written") >= together
    for key in re.findall(r"takes s3://bkt/(\S+), which", said):
        assert sum(keys.matches(key) for keys in sets) > 1
    for key in re.findall(r"is written to s3://bkt/(\S+), which", said):
        assert any(keys.matches(key) for keys in sets)


def test_many_routes_of_one_shape_are_compared_by_their_ends_first(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sets, "_search", lambda languages: pytest.fail("nothing is to be searched here"))
    lines = [
        f"- {{name: r{at}, match: {{key: ['dept-{at:02d}/**/*.pdf', 'scans/**/*.kind{at:02d}']}}}}" for at in range(60)
    ]
    text = "defaults: {prompt: p, sidecar: {}, match: {bucket: [one, two], exclude: '**/drafts/**'}}\nroutes:\n"
    assert len(load(text + "\n".join(lines)).entries) == 60
