"""Text as it streams: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections import defaultdict

import pytest
from checkpoints import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from nanovllm.engine.text.detokenizer import MAX_UNREAD_TOKENS, REPLACEMENT, Detokenizer
from nanovllm.sampling_params import SamplingParams


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma have: words by ``▁``, bytes where there is no token for a character."""
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "e", "é", "日", "x", "▁▁"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(fallback)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TOKENIZER: PreTrainedTokenizerFast = make_tokenizer()
TOKENIZERS = {"bytes": TOKENIZER, "byte fallback": byte_fallback_tokenizer()}


def stream(
    text: str, tokenizer: PreTrainedTokenizerFast = TOKENIZER, **options: object
) -> tuple[list[str], Detokenizer]:
    """The chunks for the tokens of ``text``, up to a stop string."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(**options))  # type: ignore[arg-type]
    chunks = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        chunks.append(detokenizer.append(token))
        if detokenizer.is_stopped:
            break
    return [*chunks, detokenizer.finish()], detokenizer


WRITTEN = st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT + "▁")


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@examples(100)
@given(text=st.text(st.one_of(WRITTEN, st.sampled_from("日é👩🏽 ")), max_size=30))
def test_chunks_join_to_the_text_and_hold_whole_characters(kind: str, text: str) -> None:
    chunks, detokenizer = stream(text, TOKENIZERS[kind], skip_special_tokens=False)
    # The tokenizer begins each string with a space, which an output that continues a prompt keeps.
    expected = f" {text}" if text and kind == "byte fallback" else text
    assert "".join(chunks) == expected == detokenizer.text
    assert not any(REPLACEMENT in chunk for chunk in chunks)


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@examples(200)
@given(data=st.data(), skips=st.booleans())
def test_bytes_that_are_no_text_stop_nobody(kind: str, data: st.DataObject, skips: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    good = tokenizer.encode(" the x", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=skips))
    text = "".join([*(detokenizer.append(token) for token in (*tokens, *good)), detokenizer.finish()])
    assert text == detokenizer.text
    assert text.endswith("the x")


def test_a_character_that_was_cut_off_is_left_out() -> None:
    tokens = TOKENIZER.encode("a日", add_special_tokens=False)
    detokenizer = Detokenizer(TOKENIZER, SamplingParams())
    chunks = [detokenizer.append(token) for token in tokens[:-1]]
    assert "".join([*chunks, detokenizer.finish()]) == "a" == detokenizer.text


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (b"\xff\xfe|", "\ufffd\ufffd the"),
        (b"\xe6|", "\ufffd the"),
        (b"\xff\xe6\x97\xa5|", "\ufffd\ufffd\ufffd\ufffd the"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"|\xff", " the\ufffd"),
        (b"|\xff\xe6", " the\ufffd"),  # the second one may have become a character
        (b"\xe6\x97\xa5", "日"),
        (b"\xe6\x97\xa5\xe6\x97", "日"),
        # Where `decode` takes back a character, which was returned already, one U+FFFD stands for each other byte.
        (b"\xe6\x97\xa5\xff|", "日\ufffd the"),
        (b"A\xff\xff|", "A\ufffd\ufffd the"),
        (b"A" * 40 + b"\xff|", "A" * 40 + "\ufffd the"),
    ],
)
def test_bytes_that_are_no_character_are_as_many_replacements(written: bytes, expected: str) -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    the = tokenizer.get_vocab()["▁the"]
    tokens = [token for byte in written for token in ([the] if byte == ord("|") else byte_tokens(tokenizer, byte))]
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    assert "".join([*map(detokenizer.append, tokens), detokenizer.finish()]) == expected


@examples(200)
@given(data=st.data())
def test_random_bytes_are_decoded_as_by_the_tokenizer_of_a_byte_level_vocabulary(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=12))
    detokenizer = Detokenizer(TOKENIZER, SamplingParams())
    text = "".join([*map(detokenizer.append, tokens), detokenizer.finish()])
    whole = TOKENIZER.decode(tokens, skip_special_tokens=True)
    assert text in (whole, whole.removesuffix(REPLACEMENT))  # without the bytes of a character that was cut off


@examples(200)
@given(data=st.data())
def test_random_bytes_are_decoded_as_by_the_tokenizer_where_no_character_is_taken_back(data: st.DataObject) -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    vocab = tokenizer.get_vocab()
    # No run of bytes begins with a whole character.
    runs = [[], *([vocab[f"<0x{byte:02X}>"] for byte in run] for run in (b"\xff", b"\x80\x41", b"\xe6\x97", b"\xc3"))]
    word = st.sampled_from([vocab[name] for name in ("▁", "▁the", "e", "日", "x")])
    drawn = data.draw(st.lists(st.tuples(st.sampled_from(runs), word), max_size=8))
    tokens = [token for run, token in drawn for token in (*run, token)]
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    text = "".join([*map(detokenizer.append, tokens), detokenizer.finish()])
    assert text == tokenizer.decode([vocab["x"], *tokens]).removeprefix("x")


def words_tokenizer(decoder: decoders.Decoder | None) -> PreTrainedTokenizerFast:
    """Words that begin as each kind of decoder has it, of which one may write them together."""
    words = ["<unk>", "</s>", "the", "▁the", "##s", "▁", "é", "a▁b", "Ġx", "'", "."]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    if decoder is not None:
        tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


KINDS = {
    **TOKENIZERS,
    "metaspace": words_tokenizer(decoders.Metaspace()),
    "word pieces": words_tokenizer(decoders.WordPiece()),
    "none": words_tokenizer(None),
}


@pytest.mark.parametrize("kind", list(KINDS))
@examples(150)
@given(data=st.data(), skips=st.booleans(), stop=st.sampled_from([(), ("th", "x a"), (" ",)]))
def test_tokens_whose_text_is_known_beforehand_change_no_chunk(
    kind: str, data: st.DataObject, skips: bool, stop: tuple[str, ...]
) -> None:
    tokenizer = KINDS[kind]
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    quick, slow = (Detokenizer(tokenizer, SamplingParams(skip_special_tokens=skips, stop=stop)) for _ in range(2))
    slow._whole = defaultdict(str)  # type: ignore[assignment]
    for token in tokens:
        assert quick.append(token) == slow.append(token)
        assert (quick.is_stopped, quick.is_cut) == (slow.is_stopped, slow.is_cut)
        if quick.is_stopped:
            break
    assert quick.finish() == slow.finish()
    assert quick.text == slow.text


def test_special_tokens_are_left_out_unless_wanted() -> None:
    assert stream("a<|im_end|>b")[1].text == "ab"
    assert stream("a<|im_end|>b", skip_special_tokens=False)[1].text == "a<|im_end|>b"


@pytest.mark.parametrize(("stop", "expected"), [(("fox",), "the quick brown "), (("x j", "k b"), "the quic")])
def test_text_ends_before_the_first_stop_string(stop: tuple[str, ...], expected: str) -> None:
    chunks, detokenizer = stream("the quick brown fox jumps", stop=stop)
    assert detokenizer.is_stopped
    assert "".join(chunks) == expected == detokenizer.text


def test_no_chunk_shows_the_beginning_of_a_stop_string() -> None:
    text = "receipt total receipt tot receipt to"
    shown = ""
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(stop=("total invoice", "tot!")))
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        shown += detokenizer.append(token)
        assert not any(shown.endswith(stop[:length]) for stop in ("total invoice", "tot!") for length in (1, 2, 3))
    assert shown + detokenizer.finish() == text
    assert not detokenizer.is_stopped


def test_stop_strings_count_only_after_min_tokens() -> None:
    text = "stop it stop it"
    first = len(TOKENIZER.encode("stop it", add_special_tokens=False))
    assert stream(text, stop=("stop",), min_tokens=first)[1].text == "stop it "


def test_a_text_is_cut_where_a_stop_string_leaves_something_out() -> None:
    assert stream("x stop", stop=("stop",))[1].is_cut
    assert not stream("x stop", stop=("stop",), include_stop_str_in_output=True)[1].is_cut
    assert not stream("x stop", stop=("halt",))[1].is_cut


def test_overlapping_beginnings_of_a_stop_string_are_found() -> None:
    assert stream("xaaab", stop=("aab",))[1].text == "xa"


@examples(200)
@given(
    text=st.text("ab\n", max_size=12), stop=st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4)
)
def test_what_is_shown_after_each_token_is_all_that_no_stop_string_can_take_back(text: str, stop: list[str]) -> None:
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(stop=stop))
    so_far = ""
    for character in text:
        shown = detokenizer.append(TOKENIZER.get_vocab()[{"\n": "Ċ"}.get(character, character)])
        so_far += character
        found = [so_far.find(one) for one in stop if one in so_far]
        beginnings = [one[:length] for one in stop for length in range(1, len(one)) if so_far.endswith(one[:length])]
        expected = so_far[: min(found)] if found else so_far[: len(so_far) - max(map(len, beginnings), default=0)]
        assert detokenizer.text == expected
        assert detokenizer.text.endswith(shown)
        if detokenizer.is_stopped:
            break
    assert detokenizer.is_stopped == any(one in so_far for one in stop)
    assert detokenizer.is_stopped or detokenizer.text + detokenizer.finish() == so_far


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@pytest.mark.parametrize("what", ["continuation bytes", "first bytes", "special tokens", "both"])
def test_the_work_of_a_token_does_not_grow_with_those_that_are_no_text_yet(
    kind: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = TOKENIZERS[kind]
    byte = {"continuation bytes": b"\x80", "first bytes": b"\xc3"}.get(what, b"\xf0\x9f")
    tokens = [token for value in byte for token in byte_tokens(tokenizer, value)]
    if "special" in what or what == "both":
        tokens = [tokenizer.eos_token_id, *(tokens if what == "both" else ())]
    detokenizer = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=True))
    decode, decoded = detokenizer._decode, 0

    def counted(window: list[int]) -> str:
        nonlocal decoded
        decoded += len(window)
        return decode(window)

    monkeypatch.setattr(detokenizer, "_decode", counted)
    count = 2_000
    series = (tokens * count)[:count]
    text = "".join(detokenizer.append(token) for token in series)
    assert decoded < 200 * count
    whole = tokenizer.decode(series, skip_special_tokens=True)
    assert whole.startswith(text)
    # What is held back is what a later token could still complete.
    assert len(whole) - len(text) <= 2 * MAX_UNREAD_TOKENS
    assert text + detokenizer.finish() == detokenizer.text


def byte_tokens(tokenizer: PreTrainedTokenizerFast, value: int) -> list[int]:
    """The token of one byte."""
    named = tokenizer.get_vocab().get(f"<0x{value:02X}>")
    if named is not None:
        return [named]
    alphabet = {byte: char for char, byte in bytes_of_chars().items()}
    return [tokenizer.get_vocab()[alphabet[value]]]


def bytes_of_chars() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: the printable bytes as themselves, the others from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + i): byte for i, byte in enumerate(others)}}
