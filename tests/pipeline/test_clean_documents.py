"""A route of texts: pages whose text layer is clean cost the engine nothing."""

from __future__ import annotations

from document_bench import Documents
from pdf_files import PROSE, image_pdf, misread_pdf, scan, text_pdf

CLEAN = [text_pdf(*[PROSE] * pages) for pages in (1, 2, 7)]
MIXED = [image_pdf(scan()), misread_pdf(), text_pdf(PROSE, ())]


async def test_clean_pages_take_no_step_of_the_engine_and_the_record_says_where_they_are_from(
    documents: Documents,
) -> None:
    route = {
        "name": "texts",
        "match": {"bucket": documents.bucket, "key": "in/*"},
        "prompt": "Read the page.",
        "text": "only_if_clean",
        "sampling": {"temperature": 0, "max_tokens": 4},
        "pages": {"dpi": 72},
    }
    await documents.send(*(documents.put(f"in/{number}.pdf", body) for number, body in enumerate(CLEAN)))
    async with documents.working(**documents.settings(route)) as (worker, _):
        await documents.ended(len(CLEAN))
        clean = await documents.records(len(CLEAN))
        assert worker.engine.stats().steps == 0
        await documents.send(*(documents.put(f"in/mixed-{number}.pdf", body) for number, body in enumerate(MIXED)))
        await documents.ended(len(CLEAN) + len(MIXED))
        assert worker.engine.stats().steps > 0
    assert sorted(len(record.pages) for record in clean) == [1, 2, 7]
    for record in clean:
        assert record.status == "complete"
        assert all((page.status, page.source) == ("ok", "text_layer") for page in record.pages)
        assert record.usage.input_tokens == record.usage.output_tokens == 0
        assert (record.text or "").count(PROSE[0]) == len(record.pages)
    mixed = [one for one in await documents.records(len(CLEAN) + len(MIXED)) if "mixed" in one.document.uri]
    assert {record.document.uri[-5]: [page.source or page.status for page in record.pages] for record in mixed} == {
        "0": ["model"],  # scanned
        "1": ["model"],  # garbled
        "2": ["text_layer", "blank"],
    }
