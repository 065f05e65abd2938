"""Routes beside settings and models: topics, readable objects, schemas, token budgets, and the command line."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from checkpoints import QwenVL, make_llava, make_qwen3, make_qwen_vl
from generic_checkpoints import make_generic_images
from generic_parts import needs_release
from pdf_files import text_pdf

from nanovllm.cli.main import main
from nanovllm.errors import ConfigurationError, InvalidInput
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.pipeline import build
from nanovllm.pipeline.documents.page_sizes import A4, rendered_size
from nanovllm.pipeline.model_limits import ModelLimits, limits_of, model_limits, most_tokens, vllm_limits
from nanovllm.pipeline.route_checks import check_route, check_settings
from nanovllm.pipeline.routing.routes import Routes, load_routes
from nanovllm.settings.worker import Settings
from nanovllm.vision.images.preprocess import MOST_ELONGATED

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "routes.yaml"
TINY = Settings.model_validate({"engine": {"device": "cpu"}})
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Routes]:
    """Reads one route of further lines, each its own, from line 5 on."""

    def read(lines: str) -> Routes:
        file = tmp_path / "routes.yaml"
        file.write_text(
            f"routes:\n- name: r\n  prompt: Total?\n  match: {{bucket: inbox, key: 'in/**/*.pdf'}}\n{lines}"
        )
        return load_routes(file)

    return read


Load = Callable[[str], Routes]


@pytest.fixture(scope="module")
def tiny() -> Iterator[ModelLimits]:
    with model_limits(TINY) as limits:
        yield limits


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def qwen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    family: QwenVL = request.param
    model = make_qwen_vl(tmp_path_factory.mktemp("vl") / family, family=family, largest=2240 * 2240)
    return Settings.model_validate({"engine": {"model": str(model), "device": "cpu"}})


def refused(routes: Routes, limits: ModelLimits, settings: Settings = TINY) -> list[str]:
    found = [one for entry in routes.entries for one in check_route(routes, entry, limits, settings).refusals]
    return [one.split("/routes.yaml:")[1] for one in found]


def test_the_example_fits_the_shipped_model(tiny: ModelLimits) -> None:
    routes = load_routes(EXAMPLE)
    assert list(check_settings(routes, TINY)) == []
    for entry in routes.entries:
        check = check_route(routes, entry, tiny, TINY)
        assert check.refusals == ()
        assert check.budget is not None
        assert check.budget.total <= check.budget.max_model_len


@pytest.mark.parametrize(
    "make",
    [
        make_qwen_vl,
        make_llava,
        *(
            pytest.param(partial(make_generic_images, family=family), marks=needs_release, id=family)
            for family in ("idefics3", "glm_ocr", "qwen3_5")
        ),
    ],
)
def test_limits_read_from_files_are_those_of_the_loaded_engine(make: Callable[[Path], Path], tmp_path: Path) -> None:
    settings = Settings.model_validate({"engine": {"model": str(make(tmp_path / "m")), "device": "cpu"}})
    with model_limits(settings) as read, build.build_engine(settings.engine) as engine:
        loaded = limits_of(engine)
        assert (read.max_model_len, read.max_images) == (loaded.max_model_len, loaded.max_images)
        assert (read.transform, read.generation_defaults) == (loaded.transform, loaded.generation_defaults)
        assert read.image_token_id == loaded.image_token_id
        assert read.prompts.untrusted("a <|image|> b") == loaded.prompts.untrusted("a <|image|> b")
        for size in ((224, 224), (56, 112)):
            assert read.tokens_of(size) == loaded.tokens_of(size)


def test_a_small_kv_cache_lowers_what_fits(tiny: ModelLimits) -> None:
    small = TINY.model_copy(update={"engine": TINY.engine.model_copy(update={"kv_cache_bytes": 1 << 18})})
    with model_limits(small) as limits, build.build_engine(small.engine) as engine:
        assert engine.max_model_len <= limits.max_model_len < tiny.max_model_len


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("  response_schema: {type: [object, 7]}\n", "5: route r: response_schema does not compile: json_schema:"),
        (
            "  sampling: {max_tokens: 9}\n  response_schema:\n    type: nothing\n",
            "6: route r: response_schema does not",
        ),
        ("  sampling:\n    regex: '(a'\n", "6: route r: sampling.regex does not compile: regex:"),
        ("  sampling:\n    grammar: 'start: b'\n", "6: route r: sampling.grammar does not compile: grammar:"),
    ],
)
def test_a_constraint_that_does_not_compile_is_refused_in_its_line(
    load: Load, tiny: ModelLimits, lines: str, expected: str
) -> None:
    (found,) = refused(load(lines), tiny)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("lines", "line", "says"),
    [
        ("  sampling:\n    max_tokens: 500\n", 2, "the model takes 512"),
        ("  sampling:\n    max_tokens: 5000\n", 6, "above this worker's limit of 4096"),
        ("  sampling: {max_tokens: 100}\n  text: hint\n  hint_tokens: 400\n", 2, "400 of its text"),
        ("  pages:\n    max_pixels: 90000\n  sampling: {max_tokens: 480}\n", 6, "the model takes 512"),
    ],
)
def test_a_budget_that_does_not_fit_is_refused_in_its_line(
    load: Load, tiny: ModelLimits, lines: str, line: int, says: str
) -> None:
    (found,) = refused(load(lines), tiny)
    assert found.startswith(f"{line}: route r: ")
    assert says in found


def test_a_prompt_longer_than_the_context_is_refused(tmp_path: Path, tiny: ModelLimits) -> None:
    file = tmp_path / "routes.yaml"
    file.write_text(f"routes:\n- name: r\n  match: {{bucket: inbox, key: a}}\n  prompt: {'word ' * 20_000}\n")
    (found,) = refused(load_routes(file), tiny)
    assert found.startswith("4: route r: ")


def test_the_most_tokens_of_a_page_are_never_exceeded(qwen: Settings) -> None:
    drawn = random.Random(5)
    with model_limits(qwen) as limits:
        assert limits.transform is not None
        for _ in range(3_000):
            area = drawn.choice([4, 700, 10_000, 300_000, 9_000_000])
            ratio = MOST_ELONGATED ** drawn.uniform(-1, 1)
            width = min(area, max(1, int((area * ratio) ** 0.5)))
            height = area // width
            try:
                size = limits.transform.check(width, height)
            except InvalidInput:
                continue
            assert limits.tokens_of(size) <= most_tokens(limits, area), (width, height)
        assert most_tokens(limits, 10**9) == limits.transform.size[1] // limits.transform.size[2] ** 2


def test_the_area_that_a_refusal_recommends_fits(load: Load, qwen: Settings) -> None:
    lines = "  pages:\n    max_pixels: 4000000\n  sampling: {max_tokens: 256}\n"
    with model_limits(qwen) as limits:
        (found,) = refused(load(lines), limits, qwen)
        assert found.startswith("6: route r: ")
        fits = int(found.partition("pages.max_pixels ")[2].split()[0])
        assert refused(load(lines.replace("4000000", str(fits))), limits, qwen) == []
        assert refused(load(lines.replace("4000000", str(fits * 11 // 10))), limits, qwen)
        # Unset, a page may be as large as the model takes one.
        (found,) = refused(load("  sampling: {max_tokens: 256}\n"), limits, qwen)
        assert found.startswith("2: route r: ")


def test_a_ladder_counts_with_the_largest_of_its_pages(load: Load, qwen: Settings) -> None:
    lines = "  pages: {max_pixels: 500000}\n  sampling: {max_tokens: 9}\n"
    lines += "  ladder:\n  - {rotation: 90}\n  - max_pixels: AREA\n"
    with model_limits(qwen) as limits:
        assert refused(load(lines.replace("AREA", "600000")), limits, qwen) == []
        (found,) = refused(load(lines.replace("AREA", "4000000")), limits, qwen)
        assert found.startswith("9: route r: ")


def test_a_usual_page_that_the_model_refuses_is_told(load: Load, tiny: ModelLimits, qwen: Settings) -> None:
    routes = load("  pages: {max_pixels: 300000}\n  sampling: {max_tokens: 9}\n")
    with model_limits(qwen) as limits:
        (found,) = check_route(routes, routes.entries[0], limits, qwen, (10.0, 9000.0)).refusals
    assert "5: route r: a page of 10x9000 points at 150 dpi" in found
    assert "too narrow" in found
    assert check_route(routes, routes.entries[0], tiny, TINY, (10.0, 9000.0)).refusals == ()


def test_a_document_s_prompt_takes_as_many_pages_as_fit(load: Load, tiny: ModelLimits) -> None:
    def pages(lines: str, limits: ModelLimits = tiny) -> int:
        routes = load(lines)
        budget = check_route(routes, routes.entries[0], limits, TINY).budget
        assert budget is not None
        return budget.pages_a_prompt

    document = "  sampling: {max_tokens: 100}\n  pages: {request: document}\n"
    fits = pages(document)
    assert fits > 1
    text = len(tiny.prompts.untrusted("Total? " + "<|image|>" * fits)) - fits
    one = tiny.tokens_of((224, 224))
    assert text + fits * one + 100 <= tiny.max_model_len < text + (fits + 1) * one + 100
    assert pages(document, replace(tiny, max_images=2)) == 2
    assert pages("  sampling: {max_tokens: 100}\n") == 1


def test_a_model_without_images_is_refused(load: Load, tmp_path: Path, tiny: ModelLimits) -> None:
    says = "2: route r: the model takes no images: see engine.model and engine.max_images_per_request"
    assert refused(load(""), replace(tiny, max_images=0)) == [says]
    settings = Settings.model_validate({"engine": {"model": str(make_qwen3(tmp_path / "text")), "device": "cpu"}})
    with model_limits(settings) as limits:
        assert refused(load(""), limits, settings) == [says]


@pytest.mark.parametrize("topic", ["nanovllm.jobs", "nanovllm.metrics", "nanovllm.events", "nanovllm.jobs.retry-60s"])
def test_records_into_a_topic_of_another_use_are_refused(load: Load, topic: str) -> None:
    settings = Settings.model_validate({"retries": {"delays_s": [60]}})
    (found,) = check_settings(load(f"  priority: 1\n  result_topic: {topic}\n"), settings)
    assert "routes.yaml:6: route r: result_topic: the worker uses" in found
    assert list(check_settings(load("  result_topic: nanovllm.results\n"), settings)) == []


@pytest.mark.parametrize(
    ("allow", "example"),
    [
        (["s3://inbox/in"], None),
        (["s3://other", "s3://inbox"], None),
        (["s3://inbox/in/2026", "s3://inbox/in/2025"], "s3://inbox/in/.pdf"),
        (["s3://other"], "s3://inbox/in/.pdf"),
        (["s3://inbox/[i]n/*"], "s3://inbox/in/.pdf"),
    ],
)
def test_objects_that_no_worker_may_read_are_told(load: Load, allow: list[str], example: str | None) -> None:
    found = list(check_settings(load(""), Settings.model_validate({"s3": {"allow": allow}})))
    assert len(found) == (example is not None)
    assert not found or f"4: route r: takes {example}, which s3.allow" in found[0]


def test_a_page_with_a_hint_takes_as_many_tokens_as_its_budget_says(
    load: Load, tiny: ModelLimits, tmp_path: Path
) -> None:
    routes = load("  text: hint\n  hint_tokens: 64\n  sampling: {temperature: 0, max_tokens: 4}\n  pages: {dpi: 72}\n")
    budget = check_route(routes, routes.entries[0], tiny, TINY).budget
    assert budget is not None
    (tmp_path / "digits.pdf").write_bytes(text_pdf(["0123456789 " * 5] * 12))
    output = tmp_path / "records.jsonl"
    command = ["extract", str(tmp_path / "digits.pdf"), "-r", str(tmp_path / "routes.yaml"), "--route", "r"]
    assert main([*command, "-o", str(output)]) == 0
    record = DocumentRecord.model_validate_json(output.read_text())
    most = budget.total - budget.max_tokens
    assert most - 4 <= record.usage.input_tokens <= most


def test_all_that_is_wrong_with_a_file_is_told_in_one_go(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "routes.yaml"
    routes = [
        "- {name: malformed, prompt: p, match: {bucket: inbox, key: a, keys: b}}",
        "- {name: unread, prompt_file: none.txt, match: {bucket: inbox, key: b}}",
        "- {name: one, prompt: p, match: {bucket: inbox, key: 'c/**'}}",
        "- {name: other, prompt: p, match: {bucket: inbox, key: '**/d'}}",
        "- {name: topic, prompt: p, match: {bucket: inbox, key: e}, result_topic: nanovllm.jobs}",
        "- {name: schema, prompt: p, match: {bucket: inbox, key: f}, response_schema: {type: nothing}}",
    ]
    file.write_text("\n".join(["routes:", *routes]))
    assert main(["routes", "check", str(file)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [int(line.partition("routes.yaml:")[2].partition(":")[0]) for line in told] == [3, 2, 5, 6, 7]
    file.write_text("\n".join(["routes:", *routes[:2]]))
    assert main(["routes", "check", str(file)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_large_results_where_a_route_reads_are_a_loop(load: Load) -> None:
    for place, is_loop in (("s3://inbox/in", True), ("s3://inbox", True), ("s3://inbox/out", False)):
        settings = Settings.model_validate({"s3": {"large_results": place}})
        found = list(check_settings(load(""), settings))
        assert len(found) == is_loop
        assert not found or "4: a large result (s3.large_results)" in found[0]


def test_a_page_is_rendered_within_its_largest_area() -> None:
    assert rendered_size(A4, 72, 10**9) == (595, 842)
    assert rendered_size(A4, 144, 595 * 842) == (595, 842)
    width, height = rendered_size((72.0, 7200.0), 150, 10_000)
    assert width * height <= 10_000


def by_vllm(model: object, engine: dict[str, object] | None = None, **vllm: object) -> Settings:
    return Settings.model_validate({"engine": {"backend": "vllm", "model": str(model), **(engine or {})}, "vllm": vllm})


def test_prompts_and_pages_for_vllm_have_the_tokens_of_the_native_engine(qwen: Settings) -> None:
    prompt = "Extract <|image|> as JSON, not <|im_end|>"
    with model_limits(qwen) as native, vllm_limits(by_vllm(qwen.engine.model)) as limits:
        assert limits.text_tokens(prompt, {}) == native.text_tokens(prompt, {})
        for size in ((595, 842), (300, 300), (640, 80)):
            assert limits.page_tokens(*size) == native.page_tokens(*size)
        assert limits.max_model_len == 2048
        assert limits.max_images == 16
    with vllm_limits(by_vllm(qwen.engine.model, {"max_model_len": 700}), context=600) as limits:
        assert limits.max_model_len == 600


def test_routes_for_vllm_are_refused_for_what_it_has_not_and_what_does_not_fit(load: Load, qwen: Settings) -> None:
    settings = by_vllm(qwen.engine.model, {"max_model_len": 1024, "max_images_per_request": 3})
    document = (
        "  merge: per_document\n  response_schema: {type: object}\n  pages: {request: document, max_pixels: 50176}\n"
    )
    with vllm_limits(settings) as limits:

        def told(lines: str) -> list[str]:
            return refused(load(lines), limits, settings)

        assert told("  sampling: {max_tokens: 100}\n  pages: {max_pixels: 50176}\n") == []
        (loop,) = told("  sampling: {max_tokens: 100, loop_tokens: 16}\n  pages: {max_pixels: 50176}\n")
        assert loop == "5: route r: sampling.loop_tokens is set, and the backend vllm has no loop_tokens"
        (schema,) = told("  response_schema: {type: nothing}\n  pages: {max_pixels: 50176}\n")
        assert "response_schema does not compile" in schema
        (long,) = told("  sampling: {max_tokens: 100}\n  pages: {max_pixels: 2000000}\n")
        assert "and the model takes 1024: lower pages.max_pixels" in long
        routes = load(document + "  sampling: {max_tokens: 100}\n")
        budget = check_route(routes, routes.entries[0], limits, settings).budget
        assert budget is not None
        assert (budget.pages_a_prompt, budget.is_estimate) == (3, False)
    none = by_vllm(qwen.engine.model, {"max_images_per_request": 0})
    with vllm_limits(none) as limits:
        assert "the model takes no images" in refused(load(""), limits, none)[0]


def test_arguments_that_vllm_gives_the_processor_count_in_a_page(qwen: Settings) -> None:
    size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    with (
        vllm_limits(by_vllm(qwen.engine.model)) as usual,
        vllm_limits(by_vllm(qwen.engine.model, extra_args={"mm_processor_kwargs": {"size": size}})) as small,
    ):
        assert small.page_tokens(595, 842) < usual.page_tokens(595, 842)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("NANOVLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NANOVLLM_ENGINE__DEVICE", "cpu")


@pytest.mark.usefixtures("command")
def test_the_command_says_what_holds(capsys: Capture) -> None:
    assert main(["routes", "check", str(EXAMPLE), "--json"]) == 0
    rows = {(row["route"], row["what"]): row["is"] for row in json.loads(capsys.readouterr().out)}
    assert rows["receipts", "constraint"] == "json_schema compiles"
    assert rows["receipts", "asks by"] == "its prompt, profile none"
    assert rows["totals", "constraint"] == "regex compiles"
    assert rows["receipts", "tokens"].endswith("of 512")
    assert rows["", "s3.allow"].startswith("not set")
    assert len(rows["totals", "digest"]) == 64


@pytest.mark.usefixtures("command")
@pytest.mark.parametrize(
    ("route", "variable", "warns"),
    [
        ("task: markdown", None, True),
        ("task: markdown", "256", False),
        ("task: markdown\n  sampling: {max_tokens: 300}", None, False),
        ("prompt: Total?", None, False),
    ],
)
def test_whole_pages_that_would_end_after_the_default_are_warned_of(
    route: str, variable: str | None, warns: bool, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("NANOVLLM_SAMPLING__MAX_TOKENS", variable)
    file = tmp_path / "routes.yaml"
    where = "match: {bucket: inbox, key: 'in/*'}"
    file.write_text(f"routes:\n- name: pages\n  {where}\n  profile: qwen2.5-vl\n  {route}\n")
    assert main(["routes", "check", str(file), "--json"]) == 0
    rows = {row["what"]: row["is"] for row in json.loads(capsys.readouterr().out)}
    assert ("256 tokens, the default" in rows.get("warning", "")) == warns


@pytest.mark.usefixtures("command")
def test_the_command_measures_what_a_thousand_pages_take(capsys: Capture) -> None:
    measured = ["--measure", "--pages", "2", "--document-pages", "1", "--page", "224x224"]
    assert main(["routes", "check", str(EXAMPLE), *measured, "--json"]) == 0
    rows = {(row["route"], row["what"]): row["is"] for row in json.loads(capsys.readouterr().out)}
    for route in ("receipts", "totals"):
        least, most = map(float, rows[route, "by rounds"].split(" to "))
        assert 0 < least <= float(rows[route, "seconds of 1,000 pages"]) <= most
        assert " to " in rows[route, "answers"]


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["s3://inbox/receipts/a.pdf", "--content-type", "application/pdf"], 0, f"route receipts ({EXAMPLE}:18)"),
        (["s3://inbox/receipts/drafts/a", "--content-type", "image/png"], 1, "route receipts does not: exclude names"),
        (["s3://inbox/invoices/a", "--content-type", "image/png"], 1, "route totals does not: its size is not known"),
        (["s3://inbox/invoices/a", "--content-type", "text/html"], 1, "its content type is text/html"),
        (["s3://outbox/a"], 1, "route totals does not: its bucket is inbox"),
        (["inbox/a"], 2, "give the s3://bucket/key of one object"),
    ],
)
@pytest.mark.usefixtures("command")
def test_the_command_says_which_route_takes_an_object(capsys: Capture, more: list[str], code: int, says: str) -> None:
    assert main(["routes", "check", str(EXAMPLE), "--object", *more]) == code
    shown = capsys.readouterr()
    assert says in (shown.err if code else shown.out)


@pytest.mark.usefixtures("command")
def test_each_refusal_of_the_command_is_one_line_and_misuse(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "routes.yaml"
    file.write_text(
        "routes:\n"
        "- {name: a, prompt: p, match: {bucket: inbox, key: '**'}, sidecar: {}}\n"
        "- {name: b, prompt: p, match: {bucket: inbox, key: '*.pdf'}}\n"
    )
    assert main(["routes", "check", str(file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"{file}:3", f"{file}:2"]
    file.write_text(
        "routes:\n"
        "- {name: a, prompt: p, match: {bucket: inbox, key: a}, response_schema: {type: nothing}}\n"
        "- {name: b, prompt: p, match: {bucket: inbox, key: b}, "
        "sampling: {max_tokens: 500}, result_topic: nanovllm.jobs}\n"
    )
    assert main(["routes", "check", str(file)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nanovllm: ")]
    assert [line.split(": ")[1] for line in lines] == [f"{file}:3", f"{file}:2", f"{file}:3"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--page", "a9"], "--page a9: give a4, a3, letter, or WIDTHxHEIGHT"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
@pytest.mark.usefixtures("command")
def test_misuse_of_the_command_is_told(capsys: Capture, arguments: list[str], says: str) -> None:
    assert main(["routes", "check", str(EXAMPLE), *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.usefixtures("command")
def test_a_backend_without_tokens_proves_nothing(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_ENGINE__BACKEND", "echo")
    assert main(["routes", "check", str(EXAMPLE)]) == 2
    assert "engine.backend is echo" in capsys.readouterr().err


@needs_release
@pytest.mark.parametrize("option", [{"deterministic": True}, {"quantization": "int8"}, {"max_pixels": 10_000}])
def test_options_that_transformers_layers_do_not_have_are_refused_without_weights(option: dict[str, object]) -> None:
    settings = Settings.model_validate({"engine": {"backend": "generic", **option}})
    message = f"{next(iter(option))}=.*'tiny-receipts'.*: unset it"
    with pytest.raises(ConfigurationError, match=message), model_limits(settings):
        pass
