"""Documents become records without Kafka: pages rendered, asked, merged, validated; text layers read in place."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from document_files import receipts_pdf
from inventories import put_inventory
from parts import S3Part
from pdf_files import PROSE, text_pdf

from nanovllm.cli.main import main
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.training.synthetic import DEMO_SEED, Receipt, generator, receipt

Capture = pytest.CaptureFixture[str]

SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string", "maxLength": 40} for name in ("vendor", "number", "date", "total")},
    "required": ["vendor", "number", "date", "total"],
    "additionalProperties": False,
}
ROUTES = """
version: 1
routes:
  - name: receipts
    match: {bucket: inbox, key: "receipts/*.pdf"}
    prompt: "Extract the fields as JSON: <|image|>"
    response_schema: SCHEMA
    merge: per_page
    pages: {dpi: 72}
    sampling: {temperature: 0, max_tokens: 96}
  - name: runaway
    match: {bucket: inbox, key: "runaway/**"}
    prompt: "Extract text from this document: <|image|>"
    pages: {dpi: 72}
    # A token that the model takes every time.
    sampling: {temperature: 0, max_tokens: 96, loop_tokens: 16, logit_bias: {"100": 100}}
  - name: letters
    match: {bucket: inbox, key: "letters/**"}
    prompt: "Extract text from this document: <|image|>"
    text: only_if_clean
    sampling: {temperature: 0, max_tokens: 8}
""".replace("SCHEMA", json.dumps(SCHEMA))


def drawn(count: int) -> list[Receipt]:
    return [receipt(generator(number, seed=DEMO_SEED, split="heldout"), "heldout") for number in range(count)]


@pytest.fixture
def routes(tmp_path: Path) -> str:
    file = tmp_path / "routes.yaml"
    file.write_text(ROUTES)
    return str(file)


def records_in(file: Path) -> dict[str, DocumentRecord]:
    found = [DocumentRecord.model_validate_json(line) for line in file.read_text().splitlines()]
    return {Path(record.document.uri).name: record for record in found}


def test_pages_of_receipts_become_valid_records_and_nothing_is_computed_twice(
    tmp_path: Path, routes: str, capsys: Capture
) -> None:
    inbox, output = tmp_path / "inbox", tmp_path / "records.jsonl"
    inbox.mkdir()
    known = drawn(3)
    documents = {"a.pdf": known[:1], "b.pdf": known}
    for name, pages in documents.items():
        (inbox / name).write_bytes(receipts_pdf([one.image for one in pages]))
    (inbox / "broken.pdf").write_bytes(b"%PDF-1.7 and nothing else")
    command = ["extract", str(inbox), "-r", routes, "--route", "receipts", "-o", str(output)]
    assert main(command) == 1, capsys.readouterr().err
    records = records_in(output)
    assert set(records) == set(documents)
    right = total = 0
    for name, pages in documents.items():
        record = records[name]
        assert record.status == "complete"
        assert record.timings_ms.fetch > 0
        assert record.constrained
        assert record.validation is not None
        assert record.validation.ok
        assert [page.number for page in record.pages] == list(range(1, len(pages) + 1))
        assert len(record.value) == len(pages)
        for found, one in zip(record.value, pages, strict=True):
            right += sum(found[field] == one.fields[field] for field in SCHEMA["properties"])
            total += len(SCHEMA["properties"])
        assert record.fields["/0/total"].logprob_min is not None
        assert record.fields["/0/total"].page == 1
    assert right >= 0.75 * total
    failures = [json.loads(line) for line in (tmp_path / "records.failures.jsonl").read_text().splitlines()]
    assert [(Path(one["uri"]).name, one["code"]) for one in failures] == [("broken.pdf", "invalid_document")]
    before = output.read_bytes()
    capsys.readouterr()
    assert main(command) == 1
    assert "2 done, 1 left" in capsys.readouterr().err
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"name": "a receipt"}, "route receipts: json_schema: 'name' at # is no keyword of JSON Schema"),
        (
            {"type": "object", "properties": {f"p{number}": {} for number in range(200)}, "maxProperties": 9},
            "route receipts: # has 200 leaves and cannot be split because of maxProperties",
        ),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_before_a_document_is_read(
    tmp_path: Path, capsys: Capture, schema: dict[str, Any], said: str
) -> None:
    routes, output = tmp_path / "routes.yaml", tmp_path / "records.jsonl"
    routes.write_text(ROUTES.replace(json.dumps(SCHEMA), json.dumps(schema)))
    (tmp_path / "a.pdf").write_bytes(receipts_pdf([one.image for one in drawn(1)]))
    assert main(["extract", str(tmp_path / "a.pdf"), "-r", str(routes), "--route", "receipts", "-o", str(output)]) == 2
    (refusal,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nanovllm: ")]
    assert said in refusal
    assert not (tmp_path / "records.failures.jsonl").read_text()


def test_a_clean_text_layer_is_read_and_no_model_is_asked(tmp_path: Path, routes: str) -> None:
    letter, output = tmp_path / "letter.pdf", tmp_path / "records.jsonl"
    letter.write_bytes(text_pdf([*PROSE, *PROSE], PROSE))
    assert main(["extract", str(letter), "-r", routes, "--route", "letters", "-o", str(output)]) == 0
    record = records_in(output)["letter.pdf"]
    assert [(page.source, page.attempts) for page in record.pages] == [("text_layer", 0)] * 2
    assert record.usage.output_tokens == 0
    assert record.text is not None
    assert PROSE[1] in record.text
    assert not record.constrained


def test_a_runaway_repetition_ends_early_with_its_own_code(tmp_path: Path, routes: str) -> None:
    document, output = tmp_path / "runaway.pdf", tmp_path / "records.jsonl"
    document.write_bytes(receipts_pdf([one.image for one in drawn(2)]))
    assert main(["extract", str(document), "-r", routes, "--route", "runaway", "-o", str(output)]) == 0
    record = records_in(output)["runaway.pdf"]
    assert record.status == "partial"
    for page in record.pages:
        assert (page.status, page.stop) == ("incomplete", "loop")
        assert page.tokens is not None
        assert page.tokens.output_tokens == 16
    assert record.timings_ms.saved > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.pdf", "--route", "receipts"], "no such file"),
        (["letter.pdf"], "name the route of files by --route"),
        (["letter.pdf", "--route", "recipes"], "--route recipes is none of receipts, runaway, letters"),
    ],
)
def test_a_users_mistake_is_one_line(
    tmp_path: Path, routes: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letter.pdf").write_bytes(text_pdf(PROSE))
    assert main(["extract", *arguments, "-r", routes, "-o", "records.jsonl"]) == 2
    err: Any = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.fixture
def store(s3: S3Part, monkeypatch: pytest.MonkeyPatch) -> S3Part:
    """The S3 server, which the command's settings name."""
    monkeypatch.setenv("NANOVLLM_S3__ENDPOINT_URL", s3.endpoint_url)
    monkeypatch.setenv("NANOVLLM_S3__ADDRESSING_STYLE", "path")
    return s3


def test_objects_have_sidecars_and_equal_pages_are_computed_once(
    tmp_path: Path, store: S3Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = store.make_bucket()
    known = drawn(2)
    pages = {"a.pdf": known[:1], "b.pdf": known}
    for name, shown in pages.items():
        store.put(bucket, f"receipts/{name}", receipts_pdf([one.image for one in shown]))
    routes, output = tmp_path / "routes.yaml", tmp_path / "records.jsonl"
    text = ROUTES.replace("bucket: inbox", f"bucket: {bucket}")
    text = text.replace("routes:", f"page_store: s3://{bucket}/kept\nroutes:", 1)
    routes.write_text(text.replace("    merge: per_page", "    sidecar: {format: json}\n    merge: per_page"))
    command = ["extract", f"s3://{bucket}/receipts/**", "-r", str(routes), "-o", str(output), "--sidecars"]
    monkeypatch.setenv("NANOVLLM_ENGINE__MAX_NUM_SEQS", "1")  # one document after another
    assert main(command) == 0
    records = records_in(output)
    assert not records["a.pdf"].pages[0].reused
    assert [page.reused for page in records["b.pdf"].pages] == [True, False]
    assert records["b.pdf"].value[0] == records["a.pdf"].value[0]
    for name in pages:
        sidecar = store.client.get_object(Bucket=bucket, Key=f"receipts/{name}.json")
        assert DocumentRecord.model_validate_json(sidecar["Body"].read()) == records[name]
    output.unlink()
    for more in ([], ["--route", "receipts"]):
        assert main([*command, *more]) == 0
        assert records_in(output) == {}, "each has a sidecar of its version and route, and a sidecar is no document"


def test_objects_of_an_inventory_are_extracted_as_they_are_now(tmp_path: Path, store: S3Part, capsys: Capture) -> None:
    bucket = store.make_bucket()
    letters = {f"letters/{name}.pdf": text_pdf([*PROSE, f"This is letter {name}."]) for name in ("a", "b c", "new")}
    for key, body in letters.items():
        store.put(bucket, key, body)
    store.put(bucket, "notes/d.pdf", letters["letters/a.pdf"])
    listed = ["letters/a.pdf", "letters/b c.pdf", "letters/gone.pdf", "notes/d.pdf"]
    manifest = put_inventory(store, bucket, listed)
    routes, output = tmp_path / "routes.yaml", tmp_path / "records.jsonl"
    routes.write_text(ROUTES.replace("bucket: inbox", f"bucket: {bucket}"))
    command = ["extract", f"s3://{bucket}", "--inventory", manifest, "-r", str(routes), "-o", str(output)]
    assert main(command) == 0
    assert set(records_in(output)) == {"a.pdf", "b c.pdf"}, "new.pdf is not in it yet, gone.pdf not in the bucket"
    for record in records_in(output).values():
        body = letters[record.document.uri.removeprefix(f"s3://{bucket}/")]
        assert record.document.etag == hashlib.md5(body).hexdigest(), "not the older one of the inventory"
    said = capsys.readouterr().err
    assert "1 object of the inventory left out, gone since" in said
    assert "1 object that no route takes left out" in said
    assert main(command) == 0
    assert "2 done, 0 left" in capsys.readouterr().err
    command[1] = f"s3://{bucket}/letters/a.pdf"
    assert main(command) == 2
    assert "--inventory lists those" in capsys.readouterr().err


def killed_when(is_time: Callable[[], bool], command: Sequence[str]) -> None:
    """Run the command in a process that is killed as soon as ``is_time()``."""
    with subprocess.Popen([sys.executable, "-m", "nanovllm.cli.main", *command], stderr=subprocess.DEVNULL) as process:
        while not is_time():
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
        process.kill()
    assert process.returncode < 0


def test_a_killed_extraction_does_only_the_documents_that_are_left(
    tmp_path: Path, routes: str, capsys: Capture
) -> None:
    inbox, output = tmp_path / "inbox", tmp_path / "records.jsonl"
    inbox.mkdir()
    for number, one in enumerate(drawn(12)):
        (inbox / f"{number}.pdf").write_bytes(receipts_pdf([one.image]))
    command = ["extract", str(inbox), "-r", routes, "--route", "receipts", "-o", str(output)]
    killed_when(lambda: output.exists() and output.read_bytes().count(b"\n") >= 2, command)
    before = output.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    done = before.count(b"\n")
    assert 2 <= done < 12
    assert main(command) == 0
    assert f"{done} done, {12 - done} left" in capsys.readouterr().err
    assert output.read_bytes().startswith(before)
    assert len(output.read_bytes().splitlines()) == len(records_in(output)) == 12


def test_a_killed_extraction_does_only_the_pages_that_are_left(tmp_path: Path, store: S3Part) -> None:
    bucket = store.make_bucket()
    routes, output, document = tmp_path / "routes.yaml", tmp_path / "records.jsonl", tmp_path / "long.pdf"
    routes.write_text(ROUTES.replace("routes:", f"page_store: s3://{bucket}/kept\nroutes:", 1))
    document.write_bytes(receipts_pdf([one.image for one in drawn(12)]))
    command = ["extract", str(document), "-r", str(routes), "--route", "receipts", "-o", str(output)]

    def kept() -> int:
        return int(store.client.list_objects_v2(Bucket=bucket, Prefix="kept/")["KeyCount"])

    killed_when(lambda: kept() >= 3, command)
    assert output.read_bytes() == b""
    finished = kept()
    assert finished < 12
    assert main(command) == 0
    record = records_in(output)["long.pdf"]
    assert sum(page.reused for page in record.pages) >= finished
    assert not all(page.reused for page in record.pages)
    assert kept() == 12
    assert record.usage.output_tokens == sum(page.tokens.output_tokens for page in record.pages if page.tokens)
    assert all((page.tokens is not None and page.tokens.output_tokens == 0) == page.reused for page in record.pages)
    assert record.timings_ms.saved > 0
