"""Profiles: which checkpoint has which, what a route gets of it, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_files import edit_json
from checkpoints import make_qwen_vl
from generic_checkpoints import make_generic_images
from generic_parts import needs_release
from pdf_files import text_pdf

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.profiles import (
    NO_PROFILE,
    Profile,
    ProfileChoice,
    choose_profile,
    named_profile,
    read_profile,
    shipped_profiles,
    template_reads,
)
from nanovllm.checkpoints.template_files import template_variables
from nanovllm.cli.main import main
from nanovllm.engine.text.prompt_encoder import PromptEncoder
from nanovllm.errors import ConfigurationError, InvalidRoutes
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER
from nanovllm.pipeline.documents.model_profile import ModelProfile, heeded_sampling, model_profile, served_profile
from nanovllm.pipeline.documents.page_task import PageTask, beyond_profile, page_task
from nanovllm.pipeline.documents.schema_forms import empty_values, nuextract_template, unshown
from nanovllm.pipeline.route_checks import check_routes
from nanovllm.pipeline.routing.routes import load_routes
from nanovllm.pipeline.stages.admit import sampling_defaults
from nanovllm.settings.engine import EngineSettings
from nanovllm.settings.routes import LadderStep, Route
from nanovllm.settings.worker import Settings
from nanovllm.vision.documents.pages import PageInfo

MATCH = {"bucket": "inbox", "key": "**/*.pdf"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "vendor": {"type": "string"},
        "day": {"type": "string", "format": "date"},
        "total": {"type": ["number", "null"]},
        "paid": {"type": "boolean"},
        "currency": {"enum": ["EUR", "USD", None]},
        "tags": {"type": "array", "items": {"enum": ["food", "fuel"]}},
        "rows": {"type": "array", "items": {"$ref": "#/$defs/row"}},
    },
    "$defs": {"row": {"type": "object", "properties": {"count": {"anyOf": [{"type": "null"}, {"type": "integer"}]}}}},
}
A4 = PageInfo(1, 595.0, 842.0)


def of(name: str, **template_kwargs: Any) -> ModelProfile:
    """A model with the profile ``name``."""
    return ModelProfile(ProfileChoice(shipped_profiles()[name], "for the test"), None, template_kwargs)


def route(**fields: Any) -> Route:
    return Route.model_validate({"name": "r", "match": MATCH, **fields})


@pytest.mark.parametrize("profile", shipped_profiles().values(), ids=lambda profile: profile.name)
def test_a_shipped_profile_says_where_its_facts_are_from_and_can_be_asked(profile: Profile) -> None:
    assert all(re.search(r"\b20\d\d\b|\b[0-9a-f]{7,8}\b|[0-9]\.[0-9]|PaddleX", one) for one in profile.sources)
    for task in profile.tasks:
        schema = {"response_schema": SCHEMA} if task == "schema" else {}
        asked = page_task(route(task=task, **schema), of(profile.name))
        assert asked.prompt == profile.tasks[task].prompt
        assert asked.read("").is_unparsed is False
        assert asked.prompt.count(IMAGE_PLACEHOLDER) == 1
        assert asked.prompt_of(2).count(IMAGE_PLACEHOLDER) == 2


def test_a_file_that_is_no_profile_is_told(tmp_path: Path) -> None:
    good = {"name": "p", "title": "t", "sources": ["s 2026"], "match": {"model_types": ["m"]}}
    for wrong in (
        {"name": "other"},
        {"tasks": {"text": {"prompt": "no place"}}},
        {"tasks": {"schema": {"prompt": "<|image|>"}}},
        {"sampling": {"temperature": "hot"}},
        {"sources": []},
        {"unknown": 1},
    ):
        (tmp_path / "p.yaml").write_text(yaml.safe_dump({**good, **wrong}))
        with pytest.raises(ValueError, match=r"p.yaml holds|has no single|schema_as|temperature|sources|unknown"):
            read_profile(tmp_path / "p.yaml")
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(good))
    assert read_profile(tmp_path / "p.yaml").name == "p"


@pytest.mark.parametrize(
    ("name", "model_type", "profile"),
    [
        ("datalab-to/chandra-ocr-2", "qwen3_5", "chandra-ocr-2"),
        ("datalab-to/surya-ocr-2", "qwen3_5", "surya-2"),
        ("lightonai/LightOnOCR-3-0.8B", "qwen3_5", "lightonocr-3"),
        ("lightonai/LightOnOCR-3-4B-base", "qwen3_5", "lightonocr-3"),
        ("lightonai/LightOnOCR-3-1B", "mistral3", "lightonocr-3-1b"),
        ("lightonai/LightOnOCR-2-1B-bbox", "mistral3", "lightonocr-1b"),
        ("lightonai/LightOnOCR-1B-1025", "lighton_ocr", "lightonocr-1b"),
        ("numind/NuExtract3", "qwen3_5", "nuextract3"),
        ("numind/NuExtract-2.0-8B", "qwen2_5_vl", "nuextract-2"),
        ("numind/NuExtract-2.0-2B", "qwen2_vl", "nuextract-2"),
        ("infly/Infinity-Parser2-Pro", "qwen3_5_moe", "infinity-parser2"),
        ("Qwen/Qwen3.5-4B", "qwen3_5", "qwen3.5"),
        ("zai-org/GLM-OCR", "glm_ocr", "glm-ocr"),
        ("deepseek-community/DeepSeek-OCR-2", "deepseek_ocr2", "deepseek-ocr-2"),
        ("PaddlePaddle/PaddleOCR-VL-1.6", "paddleocr_vl", "paddleocr-vl"),
        ("opendatalab/MinerU2.5-2509-1.2B", "qwen2_vl", "mineru2.5"),
        ("ibm-granite/granite-docling-258M", "idefics3", "granite-docling"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", "qwen2.5-vl"),
        ("allenai/olmOCR-2-7B-1025-FP8", "qwen2_5_vl", "olmocr-2"),
        ("nanonets/Nanonets-OCR2-3B", "qwen2_5_vl", "nanonets-ocr2"),
        ("Qwen/Qwen3-VL-2B-Instruct", "qwen3_vl", "qwen3-vl"),
        ("somebody/invoices", "qwen3_5", "qwen3.5"),
        ("somebody/invoices", "glm_ocr", "glm-ocr"),
        ("somebody/chandra-ocr-2", "llama", None),
        ("HuggingFaceTB/SmolVLM-256M", "idefics3", None),
        ("somebody/Qwen2-VL-2B", "qwen2_vl", None),
    ],
)
def test_a_name_that_fits_the_type_decides_else_the_family_does(
    name: str, model_type: str, profile: str | None
) -> None:
    choice = choose_profile([name], {"model_type": model_type})
    assert (choice.profile.name if choice.profile else None) == profile


def test_what_is_chosen_by_the_family_names_the_fine_tunes() -> None:
    reason = choose_profile(["/models/mine"], {"model_type": "qwen2_5_vl"}).reason
    assert reason == (
        "by its model_type, qwen2_5_vl; a fine-tune of it has one by its name, or by engine.profile: "
        "nanonets-ocr2, nuextract-2, olmocr-2"
    )
    assert choose_profile([], None).reason == "the model has no name: engine.profile names one"
    assert choose_profile(["a/B"], None).reason == "no profile is of the name b: engine.profile names one"
    assert choose_profile(["x"], {"model_type": "llama"}).reason == "there is none for model_type llama itself"


@pytest.mark.parametrize(
    ("files", "fields", "profile"),
    [
        ({"tokenizer.json": {"added_tokens": [{"content": "<doctag>"}]}}, {"model_type": "idefics3"},
         "granite-docling"),
        ({"tokenizer.json": {"added_tokens": []}}, {"model_type": "idefics3"}, None),
        ({"tokenizer_config.json": {"chat_template": "{{ template }}"}}, {"model_type": "qwen2_5_vl"}, "nuextract-2"),
        ({"chat_template.json": {"chat_template": "{{\ntemplate }}{{ mode }}"}}, {"model_type": "qwen3_5"},
         "nuextract3"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "{{ templates }}"}]}},
         {"model_type": "qwen2_5_vl"}, "qwen2.5-vl"),
        ({"chat_template.json": "broken"}, {"model_type": "qwen2_5_vl"}, "qwen2.5-vl"),
        ({"chat_template.jinja": "{#- the template of a fine-tune -#}{{ 'template' }}{% set template = 1 %}"},
         {"model_type": "qwen2_5_vl"}, "qwen2.5-vl"),
        ({"chat_template.jinja": "{% if template %}"}, {"model_type": "qwen2_5_vl"}, "qwen2.5-vl"),
        ({"tokenizer_config.json": 100_000 * "["}, {"model_type": "qwen2_5_vl"}, "qwen2.5-vl"),
        ({}, {"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, None),
        ({}, {"model_type": "mistral3", "text_config": None}, None),
    ],
)  # fmt: skip
def test_files_tell_a_fine_tune_from_its_family(
    files: dict[str, Any], fields: dict[str, Any], profile: str | None, tmp_path: Path
) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text if text != "broken" else "{", encoding="utf-8")
    choice = choose_profile(["mine"], fields, tmp_path)
    assert (choice.profile.name if choice.profile else None) == profile


def test_files_of_two_profiles_are_said_to_be_of_both() -> None:
    choice = choose_profile(["mine"], {"model_type": "mistral3", "text_config": {"model_type": "qwen3"}})
    assert (choice.profile, choice.reason) == (
        None,
        "there is none for model_type mistral3 itself; its files are those of lightonocr-1b, lightonocr-3-1b alike: "
        "engine.profile names one",
    )


@pytest.mark.parametrize(
    ("template", "variables"),
    [
        ("{% generation %}{{ m }}{% endgeneration %}{% for mode in x %}{{ mode }}{% endfor %}", {"m", "x"}),
        ("{{ template | unknown is unknown }}{% set mode = mode or 'a' %}{% for a in b %}{% break %}{% endfor %}",
         {"template", "mode", "b"}),
        ("{{ 9 ** 9 ** 9 ** 9 }}{{ 'a' * 10 ** 12 }}{{ 'a' | center(10 ** 12) }}{{ 'a%999999999999d' % 1 }}", set()),
        (f"{{{{ {5_000 * '('}a{5_000 * ')'} }}}}", set()),
        (f"{5_000 * '{% if a %}'}{5_000 * '{% endif %}'}", set()),
        (f"{{{{ {9 * 10**5} {20_000 * '+ 1'} }}}}", set()),
        (f"{{{{ {10_000 * '9'} }}}}", set()),
        ("{{ template", set()),
        ("{% unknown %}", set()),
    ],
)  # fmt: skip
def test_variables_of_a_template_are_read_and_nothing_of_it_runs(template: str, variables: set[str]) -> None:
    assert template_variables(template) == variables


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("Qwen/Qwen3-VL-8B-Instruct", "qwen3-vl"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl"),
        ("datalab-to/chandra-ocr-2-FP8", "chandra-ocr-2"),
        ("nanonets/Nanonets-OCR2-1.5B-exp", "nanonets-ocr2"),
        ("opendatalab/MinerU2.5-Pro-2604-1.2B", "mineru2.5"),
        ("PaddlePaddle/PaddleOCR-VL-1.5", "paddleocr-vl"),
        ("glm-ocr:latest", "glm-ocr"),
        ("glm-ocr.gguf", "glm-ocr"),
        ("datalab-to/surya-ocr-2.5", None),
        ("datalab-to/chandra-ocr-20", None),
        ("zai-org/GLM-OCR-2", None),
        ("zai-org/GLM-OCR-2.0-9B", None),
        ("zai-org/GLM-OCR-v2", None),
        ("PaddlePaddle/PaddleOCR-VL-2", None),
    ],
)
def test_the_name_at_servers_decides_to_a_words_end_and_its_version(name: str, profile: str | None) -> None:
    choice = choose_profile([name], None)
    assert (choice.profile.name if choice.profile else None) == profile


def test_settings_and_routes_name_a_profile_in_its_place(tmp_path: Path) -> None:
    checkpoint = str(make_qwen_vl(tmp_path / "m"))
    chosen = model_profile(EngineSettings(model=checkpoint))
    assert chosen.profile is not None
    assert chosen.profile.match.is_family
    named = model_profile(EngineSettings(model=checkpoint, profile="olmocr-2"))
    assert (named.profile, named.choice.reason) == (shipped_profiles()["olmocr-2"], "by engine.profile")
    assert model_profile(EngineSettings(model=checkpoint, profile=NO_PROFILE)).profile is None
    assert named.of(route(prompt="p")) is named.profile
    assert named.of(route(prompt="p", profile="glm-ocr")) is shipped_profiles()["glm-ocr"]
    assert named.of(route(prompt="p", profile=NO_PROFILE)) is None
    with pytest.raises(ConfigurationError, match=r"engine.profile 'olm' is none of none, chandra-ocr-2, "):
        named_profile("olm", "engine.profile")
    servers = model_profile(EngineSettings(backend="openai", model="datalab-to/chandra-ocr-2"))
    assert servers.profile is shipped_profiles()["chandra-ocr-2"]


def test_an_alias_has_the_profile_of_its_checkpoint(tmp_path: Path) -> None:
    make_qwen_vl(tmp_path / "olmOCR-2-7B")
    edit_json(tmp_path / "olmOCR-2-7B" / "config.json", model_type="qwen2_5_vl")
    settings = EngineSettings(model="reader", model_aliases={"reader": str(tmp_path / "olmOCR-2-7B")})
    assert model_profile(settings).profile is shipped_profiles()["olmocr-2"]


def test_sampling_of_a_profile_stands_below_settings_and_above_the_checkpoint() -> None:
    settings = Settings.model_validate({"sampling": {"top_p": 0.5}, "admission": {"max_tokens": 1_000}})
    of_profile = heeded_sampling(shipped_profiles()["granite-docling"], frozenset({"stop", "top_p"}))
    assert of_profile.keys() == {"temperature", "max_tokens", "stop"}  # the engine heeds no skip_special_tokens
    found = sampling_defaults(settings, {"temperature": 0.6, "top_k": 20, "top_p": 0.9}, of_profile)
    assert (found.temperature, found.top_k, found.top_p, found.max_tokens) == (0.0, 20, 0.5, 1_000)
    assert found.stop == ("</doctag>", "<|end_of_text|>")


def test_variables_of_the_template_are_those_that_it_reads_below_the_settings(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% if enable_thinking %}{% endif %}")
    qwen = shipped_profiles()["qwen3.5"]
    choice = ProfileChoice(qwen, "for the test")
    assert ModelProfile(choice, tmp_path, {}).template_kwargs(qwen) == {"enable_thinking": False}
    assert ModelProfile(choice, tmp_path, {"enable_thinking": True}).template_kwargs(qwen) == {"enable_thinking": True}
    (tmp_path / "chat_template.jinja").write_text("{{ enable_thinking_hard }}")
    assert ModelProfile(choice, tmp_path, {"x": 1}).template_kwargs(qwen) == {"x": 1}
    assert not template_reads(tmp_path, "enable_thinking")


def test_a_route_with_a_task_is_asked_as_the_profile_says_where_it_says_nothing() -> None:
    task = page_task(route(task="tables", sampling={"temperature": 0.5}), of("mineru2.5"))
    assert task.prompt == "<|image|>\nTable Recognition:"
    assert task.sampling == {"frequency_penalty": 0.005, "temperature": 0.5}
    assert (task.parser, task.tables_alone) == ("otsl", False)
    assert page_task(route(task="tables"), of("chandra-ocr-2")).tables_alone
    own = page_task(route(task="markdown", prompt="Write it down."), of("qwen2.5-vl"))
    assert (own.prompt, own.parser) == ("Write it down. <|image|>", "as_written")


def test_a_prompt_that_is_the_profiles_own_is_that_task() -> None:
    task = page_task(route(prompt="Convert this page to docling."), of("granite-docling"))
    assert (task.prompt, task.parser) == ("<|image|>Convert this page to docling.", "doctags")


def test_pages_are_as_large_as_route_ladder_or_profile_say() -> None:
    plain = route(task="markdown")
    first, higher = LadderStep(), LadderStep(dpi=300, max_pixels=10)
    surya, olm = page_task(plain, of("surya-2")), page_task(plain, of("olmocr-2"))
    assert (surya.dpi(plain, first, A4), surya.max_pixels(plain, first)) == (192, None)
    assert round(olm.dpi(plain, first, A4) * 842 / 72) == 1_288
    assert olm.max_pixels(plain, first) == 1_288**2
    assert (olm.dpi(plain, higher, A4), olm.max_pixels(plain, higher)) == (300, 10)
    own = route(task="markdown", pages={"dpi": 100, "max_pixels": 99})
    assert (olm.dpi(own, first, A4), olm.max_pixels(own, first)) == (100, 99)
    assert PageTask("p").dpi(plain, first, A4) == 150


def test_a_schema_is_nuextracts_template_with_the_types_that_the_model_knows() -> None:
    asked = page_task(route(task="schema", response_schema=SCHEMA), of("nuextract3"))
    prompt, variables = asked.for_schema(asked.prompt, SCHEMA)
    assert prompt == "<|image|>"
    assert variables.pop("enable_thinking") is False
    assert json.loads(variables.pop("template")) == {
        "vendor": "string", "day": "date", "total": "number", "paid": "boolean", "currency": ["EUR", "USD"],
        "tags": [["food", "fuel"]], "rows": [{"count": "integer"}],
    }  # fmt: skip
    assert variables == {}
    older = shipped_profiles()["nuextract-2"].tasks["schema"].schema_types
    template = nuextract_template(SCHEMA, frozenset(older))
    assert (template["day"], template["paid"]) == ("date-time", "string")


def test_a_template_of_ones_own_stays() -> None:
    asked = page_task(route(task="schema", response_schema=SCHEMA), of("nuextract-2", template="{}"))
    assert asked.for_schema(asked.prompt, SCHEMA)[1] == {"template": "{}"}


def test_a_schema_stands_in_the_prompt_as_empty_values() -> None:
    asked = page_task(route(task="schema", response_schema=SCHEMA), of("glm-ocr"))
    prompt, variables = asked.for_schema(asked.prompt, SCHEMA)
    words, _, example = prompt.partition("\n")
    assert words == "<|image|>请按下列JSON格式输出图中信息:"
    assert json.loads(example)["rows"] == [{"count": ""}]
    assert variables == {}


@pytest.mark.parametrize(
    ("schema", "form"),
    [
        ({"type": "object", "properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
         {"a": "string", "b": "string"}),
        ({"allOf": [{"properties": {"a": {"type": "integer"}}}, {"$ref": "#/$defs/b"}],
          "$defs": {"b": {"type": "object", "properties": {"b": {}}}}}, {"a": "integer", "b": "string"}),
        ({"properties": {"a": {"maximum": 9}}, "allOf": [{"properties": {"a": {"type": "integer"}}}]},
         {"a": "integer"}),
        ({"properties": {"a": {}}, "oneOf": [{"type": "null"}, {"properties": {"b": {}}}, {"properties": {"c": {}}}]},
         {"a": "string", "b": "string"}),
        ({"allOf": [{"$ref": "#"}, {"properties": {"a": {"allOf": [{"$ref": "#/properties"}]}}}]}, {"a": "string"}),
    ],
)  # fmt: skip
def test_fields_are_shown_wherever_the_schema_has_them(schema: dict[str, Any], form: dict[str, str]) -> None:
    assert nuextract_template(schema, frozenset({"integer"})) == form
    assert empty_values(schema) == dict.fromkeys(form, "")
    assert list(unshown(schema)) == []


def test_a_field_that_is_called_as_the_place_of_a_page_is_none() -> None:
    schema = {"type": "object", "properties": {IMAGE_PLACEHOLDER: {"type": "string"}}}
    asked = page_task(route(task="schema", response_schema=schema), of("glm-ocr"))
    prompt, _ = asked.for_schema(asked.prompt, schema)
    assert prompt.count(IMAGE_PLACEHOLDER) == 1
    assert json.loads(prompt.partition("\n")[2]) == {IMAGE_PLACEHOLDER: ""}


def test_a_schema_within_itself_ends() -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}, "broken": {"$ref": "#/x"}}}
    assert nuextract_template(tree, frozenset()) == {"left": "string", "right": "string", "broken": "string"}
    assert empty_values(tree) == {"left": "", "right": "", "broken": ""}


@pytest.mark.parametrize(
    ("profile", "fields", "place", "why"),
    [
        ("glm-ocr", {"prompt": "What is the total?"}, ("prompt",),
         "prompt: the profile glm-ocr follows its own prompts alone: write task in its place (text, markdown, tables, "
         "schema)"),
        ("chandra-ocr-2", {"task": "text"}, ("task",),
         "task text: the profile chandra-ocr-2 has no such task; it has markdown, tables: write one of them"),
        ("qwen3-vl", {"task": "tables"}, ("task",),
         "task tables: the profile qwen3-vl has no such task; it has markdown: write one of them, or a prompt"),
        ("qwen3.5", {"task": "text"}, ("task",),
         "task text: the profile qwen3.5 has no such task; it has none of its own: write one of them, or a prompt"),
        ("olmocr-2", {"task": "markdown", "text": "hint"}, ("text",),
         "text hint: the profile olmocr-2 takes no text beside its own prompts: write text: ignore"),
        ("glm-ocr", {"task": "schema", "response_schema": SCHEMA, "text": "only_if_clean"}, ("text",),
         "text only_if_clean: the profile glm-ocr takes no text beside its own prompts: write text: ignore"),
        ("qwen2.5-vl", {"task": "tables", "prompt": "Its tables.", "text": "only_if_clean"}, ("text",),
         "text only_if_clean: a text layer has lines and no tables, as task tables wants: write ignore"),
        ("glm-ocr", {"task": "schema", "response_schema": {"type": "string"}}, ("response_schema",),
         "response_schema: the profile glm-ocr asks for fields by their names, and the whole has none: write its"),
        ("nuextract3", {"task": "schema", "response_schema": {"type": "array", "items": {"type": "object"}}},
         ("response_schema",),
         "response_schema: the profile nuextract3 asks for fields by their names, and /0 has none: write its"),
        ("lightonocr-3", {"task": "markdown", "pages": {"request": "document"}}, ("pages", "request"),
         "pages.request document: the profile lightonocr-3 takes one page in a prompt: write page"),
        ("glm-ocr", {"prompt": "p", "profile": "glm"}, ("profile",), "profile 'glm' is none of none, chandra-ocr-2, "),
    ],
)  # fmt: skip
def test_what_a_profile_cannot_do_is_refused_with_the_remedy(
    profile: str, fields: dict[str, Any], place: tuple[str, ...], why: str
) -> None:
    found = list(beyond_profile(route(**fields), of(profile)))
    assert [(where, text[: len(why)]) for where, text in found] == [(place, why)]
    with pytest.raises(ConfigurationError, match="route r: "):
        page_task(route(**fields), of(profile))


def test_a_schema_with_a_prompt_is_refused_where_the_model_answers_none() -> None:
    found = list(beyond_profile(route(prompt="p", response_schema=SCHEMA), of("chandra-ocr-2")))
    assert [place for place, _ in found] == [("prompt",), ("response_schema",)]
    assert found[1][1] == (
        "response_schema: the profile chandra-ocr-2 answers no schema: leave it out, or take another model"
    )


def test_a_task_without_any_profile_is_refused_and_a_prompt_is_not() -> None:
    nothing = ModelProfile(ProfileChoice(None, "for the test"), None, {})
    assert [why for _, why in beyond_profile(route(task="text"), nothing)] == [
        "task text: the model has no profile; write a prompt, or name a profile"
    ]
    assert page_task(route(prompt="p"), nothing) == PageTask("p <|image|>")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "has neither prompt nor task"),
        ({"task": "schema"}, "has one"),
        ({"task": "text", "response_schema": {}}, "has one"),
    ],
)
def test_a_route_asks_for_something_and_for_a_schema_by_its_task(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        route(**fields)


def test_servers_have_the_profile_of_their_models_name(tmp_path: Path) -> None:
    file = tmp_path / "routes.yaml"
    head = "routes:\n- name: r\n  match: {bucket: inbox, key: '*.pdf'}\n"

    def settings(model: str, dialect: str) -> Settings:
        engine = {"backend": "openai", "model": model}
        return Settings.model_validate({"engine": engine, "remote": {"endpoints": ["http://x/v1"], "dialect": dialect}})

    file.write_text(f"{head}  task: markdown\n")
    (check,) = check_routes(load_routes(file), settings("datalab-to/chandra-ocr-2", "vllm")).values()
    assert check.profile == "chandra-ocr-2"
    file.write_text(f"{head}  prompt: What is the total?\n")
    with pytest.raises(InvalidRoutes, match=r"routes.yaml:4: route r: prompt: the profile chandra-ocr-2 follows"):
        check_routes(load_routes(file), settings("datalab-to/chandra-ocr-2", "vllm"))
    file.write_text(f"{head}  task: schema\n  response_schema: {{type: object, properties: {{a: {{type: string}}}}}}\n")
    check_routes(load_routes(file), settings("numind/NuExtract3", "vllm"))
    with pytest.raises(InvalidRoutes, match=r"has schemas in its chat template, which remote.dialect cannot"):
        check_routes(load_routes(file), settings("numind/NuExtract3", "openai"))
    general = served_profile(settings("Qwen/Qwen3.5-4B", "openai"))
    assert general.profile is shipped_profiles()["qwen3.5"]
    assert general.template_kwargs(general.profile) == {}


@needs_release
def test_routes_check_names_the_line_of_what_the_profile_cannot_do(tmp_path: Path) -> None:
    settings = Settings.model_validate({"engine": {"model": str(make_generic_images(tmp_path / "m", "glm_ocr"))}})
    file = tmp_path / "routes.yaml"
    head = "routes:\n- name: r\n  match: {bucket: inbox, key: '*.pdf'}\n"
    file.write_text(f"{head}  prompt: What is the total?\n  sampling: {{max_tokens: 64}}\n")
    with pytest.raises(InvalidRoutes) as refused:
        check_routes(load_routes(file), settings)
    assert [line.split(": ", 1)[0] for line in refused.value.refusals] == [f"{file}:4"]
    file.write_text(f"{head}  task: text\n  sampling: {{max_tokens: 64}}\n  pages: {{max_pixels: 2304}}\n")
    (check,) = check_routes(load_routes(file), settings).values()
    assert check.budget is not None
    assert (check.budget.dpi, check.profile) == (200, "glm-ocr")


@needs_release
@pytest.mark.parametrize(
    ("make", "prompt", "turn"),
    [
        (lambda at: make_generic_images(at, "glm_ocr"), "<|image|>Text Recognition:", "Text Recognition:"),
        (lambda at: make_generic_images(at, "qwen2_vl"), "<|image|>\nText Recognition:", "\nText Recognition:"),
    ],
)
def test_a_prompt_reaches_the_model_behind_its_picture_as_it_was_trained(
    make: Callable[[Path], Path], prompt: str, turn: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(make(tmp_path / "m"))
    tokenizer = checkpoint.tokenizer()
    image = checkpoint.config.image_token_id
    encoder = PromptEncoder(tokenizer, max_model_len=512, image_token_id=image)
    tokens = encoder.untrusted(prompt)
    assert tokens.count(image) == 1
    assert turn in tokenizer.decode(tokens[tokens.index(image) + 1 :])


@needs_release
def test_a_model_that_writes_anything_leaves_a_marked_record(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(text_pdf("one page"))
    checkpoint = make_generic_images(tmp_path / "m", "idefics3")
    (tmp_path / "worker.yaml").write_text(
        f"engine: {{model: {checkpoint}, profile: granite-docling, kv_cache_bytes: 4194304}}\n"
    )
    (tmp_path / "routes.yaml").write_text(
        "routes:\n- name: r\n  match: {bucket: inbox, key: '*'}\n  task: markdown\n  sampling: {max_tokens: 16}\n"
    )
    records = tmp_path / "records.jsonl"
    arguments = ["extract", str(tmp_path / "a.pdf"), "--routes", str(tmp_path / "routes.yaml"), "--route", "r"]
    assert main([*arguments, "-o", str(records), "--config", str(tmp_path / "worker.yaml")]) == 0
    (record,) = map(json.loads, records.read_text().splitlines())
    assert record["pages"][0]["unparsed"] is True
    assert record["text"]
