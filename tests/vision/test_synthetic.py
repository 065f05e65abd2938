import json
from collections import Counter

import numpy as np
import pytest

from nanovllm.training import synthetic
from nanovllm.training.synthetic import FIELDS, PROMPTS, Split, generator, is_heldout, receipt, sample, shape


def pixels(one: synthetic.Sample) -> bytes:
    return b"".join(image.tobytes() for image in one.images)


@pytest.mark.parametrize("kind", [None, *PROMPTS])
def test_a_sample_is_a_function_of_index_seed_and_split(kind: str | None) -> None:
    first, again = (sample(7, seed=3, split="heldout", kind=kind) for _ in range(2))

    assert (first.kind, first.prompt, first.answer, first.fields) == (
        again.kind,
        again.prompt,
        again.answer,
        again.fields,
    )
    assert pixels(first) == pixels(again)


@pytest.mark.parametrize(("index", "seed", "split"), [(8, 3, "heldout"), (7, 4, "heldout"), (7, 3, "train")])
def test_another_index_seed_or_split_is_another_picture(index: int, seed: int, split: Split) -> None:
    here = sample(7, seed=3, split="heldout", kind="json")
    there = sample(index, seed=seed, split=split, kind="json")

    assert here.answer != there.answer
    assert pixels(here) != pixels(there)


def test_training_never_draws_a_heldout_vendor_and_heldout_draws_both() -> None:
    trained = [sample(index, seed=1, split="train", kind="vendor") for index in range(120)]
    held_out = [sample(index, seed=1, split="heldout", kind="vendor") for index in range(120)]

    assert all(one.vendor_seen for one in trained)
    assert not any(is_heldout(one.answer) for one in trained)
    seen = Counter(one.vendor_seen for one in held_out)
    assert seen[True] > 40
    assert seen[False] > 15


def test_no_receipt_can_be_drawn_in_both_splits() -> None:
    def identities(split: Split) -> set[str]:
        fields = [sample(index, seed=1, split=split, kind="json").fields or {} for index in range(60)]
        return {"/".join(one[name] for name in FIELDS[1:]) for one in fields}

    assert not any(is_heldout(identity) for identity in identities("train"))
    assert all(is_heldout(identity) for identity in identities("heldout"))


def test_both_the_list_and_the_invented_names_have_heldout_vendors() -> None:
    drawn = {sample(index, seed=1, split="heldout", kind="vendor").answer for index in range(100)}
    held_out = {name for name in drawn if is_heldout(name)}

    assert len(synthetic.VENDORS) == len(set(synthetic.VENDORS)) == 96
    assert held_out & set(synthetic.VENDORS)
    assert held_out - set(synthetic.VENDORS)


def test_every_kind_about_a_receipt_tells_the_same_truth() -> None:
    for index in range(15):
        by_kind = {kind: sample(index, seed=5, split="heldout", kind=kind) for kind in ("json", "text", *FIELDS)}
        fields = json.loads(by_kind["json"].answer)

        assert list(fields) == list(FIELDS)
        assert {name: by_kind[name].answer for name in FIELDS} == fields
        assert all(value in by_kind["text"].answer for value in fields.values())
        assert by_kind["json"].answer == json.dumps(fields)


def test_the_characters_are_drawn_where_and_as_the_truth_says() -> None:
    for index in range(15):
        drawn = receipt(generator(index, seed=5, split="train"), "train")
        rows: dict[int, list[synthetic.Glyph]] = {}
        for glyph in drawn.glyphs:
            rows.setdefault(glyph.y, []).append(glyph)
        image = np.asarray(drawn.image.convert("L"), dtype=float)

        assert ["".join(glyph.character for glyph in rows[y]) for y in sorted(rows)] == [
            line.replace(" ", "") for line in drawn.lines
        ]
        paper = np.median(image)
        for y in rows:
            ink = np.abs(image[max(0, y - 9) : y + 9] - paper).max()
            assert ink > 40, "a line must be visible where its glyphs are said to stand"


def test_no_patch_meets_more_than_three_characters_or_two_lines() -> None:
    for index in range(60):
        drawn = receipt(generator(index, seed=9, split="train"), "train")
        patches = Counter((glyph.x // 32, glyph.y // 32) for glyph in drawn.glyphs)
        lines = {(glyph.y // 32, glyph.y) for glyph in drawn.glyphs}

        assert max(patches.values()) <= 3
        assert len(lines) == len({row for row, _ in lines}) == len(drawn.lines)
        assert all(0 <= glyph.x < 224 and 0 <= glyph.y < 224 for glyph in drawn.glyphs)


def test_a_shape_has_the_colour_and_the_background_that_it_is_said_to_have() -> None:
    for index in range(60):
        drawn = shape(generator(index, seed=2, split="train"), "train")
        image = np.asarray(drawn.image, dtype=int).reshape(-1, 3)
        # Uneven light darkens by 25, jitter by 14, noise by three deviations of 10.
        near = {
            name: (np.abs(image - colour).max(axis=1) < 75).sum()
            for name, colour in {**synthetic.COLOURS, **synthetic.BACKGROUNDS}.items()
        }
        assert near[drawn.colour] > 400
        assert near[drawn.background] > 10_000


def test_a_comparison_is_the_same_only_where_colour_and_form_agree() -> None:
    answers = [sample(index, seed=6, split="heldout", kind="compare").answer for index in range(60)]

    for answer in answers:
        names, verdict = answer.split(": ")
        first, second = names.split(" and ")
        assert verdict == ("same" if first == second else "different")
    assert 10 < sum(answer.endswith("same") for answer in answers) < 45


def test_prompts_hold_one_placeholder_per_image() -> None:
    for kind, prompt in PROMPTS.items():
        one = sample(0, seed=1, split="train", kind=kind)
        assert one.prompt == prompt
        assert prompt.count("<|image|>") == len(one.images)
        assert {image.size for image in one.images} == {(224, 224)}
        assert {image.mode for image in one.images} == {"RGB"}


def test_an_unknown_kind_or_split_is_refused() -> None:
    with pytest.raises(ValueError, match="kind"):
        sample(0, seed=1, split="train", kind="poem")
    with pytest.raises(ValueError, match="split"):
        sample(0, seed=1, split="validation")  # type: ignore[arg-type]
