"""Text to ids and back: the stored cases, and what holds for every text."""

from __future__ import annotations

import json
import random
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers

import qdelta
import real_tokenizer
from golden_data import TEXT
from qdelta import vocabulary

CASES = real_tokenizer.CASES


@pytest.fixture(scope="module")
def tokenizer() -> qdelta.Tokenizer:
    return real_tokenizer.tokenizer()


@pytest.fixture(scope="module")
def rebuilt() -> qdelta.Tokenizer:
    """The same tokenizer from vocab.json and merges.txt, under the name of another class."""
    stored = real_tokenizer.files()
    model = json.loads(stored["tokenizer.json"])["model"]
    config = json.loads(stored["tokenizer_config.json"])
    config["tokenizer_class"] = "Qwen2Tokenizer"
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    return qdelta.Tokenizer.from_files(
        {
            "vocab.json": json.dumps(model["vocab"]).encode(),
            "merges.txt": "\n".join(lines).encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
        }
    )


def test_text_cases(tokenizer):
    for case in CASES["text_cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case
        assert tokenizer.decode(case["ids"], skip_special=False) == case["decoded"], case


def test_text_cases_from_vocab_and_merges(rebuilt):
    for case in CASES["text_cases"]:
        assert rebuilt.encode(case["text"]) == case["ids"], case


def test_decode_takes_any_kind_of_integer(tokenizer):
    """Ids that come from numpy one by one, as `argmax` gives them, too."""
    ids = tokenizer.encode("Hello world")
    assert tokenizer.decode(map(np.int64, ids)) == "Hello world"
    assert tokenizer.decode(np.array(ids, np.int32)) == "Hello world"


def random_text(rng: random.Random) -> str:
    """Letters, marks, signs and white space of a few scripts, whole words, long runs."""
    kind = rng.choice(["any", "words", "runs"])
    if kind == "words":
        return " ".join(
            rng.choices(["The", "naïve", "if(x){", "e\u0301te\u0301", "🏳️‍🌈", "世界"], k=40)
        )
    if kind == "runs":
        units = rng.choices(
            ["  ", "\n", "\r\n", "\t", "\u3000", "ab", "1", "!", "\u0301", "'s"], k=6
        )
        return "".join(unit * rng.randrange(1, 300) for unit in units)
    ranges = [(32, 127), (0, 0x250), (0x300, 0x600), (0xE00, 0x1200), (0x3040, 0xA000)]
    ranges += [(0xAC00, 0xD7A4), (0xF900, 0x10000), (0x1F300, 0x1FB00), (0x10000, 0x110000)]
    low, high = rng.choice(ranges)
    return "".join(chr(rng.randrange(low, high)) for _ in range(60))


def test_ids_are_those_of_the_library(tokenizer):
    library = tokenizers.Tokenizer.from_str(real_tokenizer.files()["tokenizer.json"].decode())
    rng = random.Random(2)
    texts = [random_text(rng) for _ in range(2000)]
    for text, want in zip(texts, library.encode_batch_fast(texts), strict=True):
        assert tokenizer.encode(text) == want.ids, text


def test_threads_share_a_tokenizer(tokenizer):
    texts = [chr(0x4E00 + n) * n + "Hello world " * 500 for n in range(16)]
    want = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            assert list(pool.map(tokenizer.encode, texts)) == want


@pytest.mark.parametrize("source", ["tokenizer", "rebuilt"])
def test_contractions(source, request):
    """In upper case, too, and with the long s, which folds to s."""
    tokenizer = request.getfixturevalue(source)
    ids = tokenizer.encode("it's IT'S It'Ll '\u017f x'\u017fy")
    assert ids == [275, 579, 8435, 12887, 1049, 88279, 75, 359, 129, 123, 830, 6, 129, 123, 88]
    assert tokenizer.encode("'The") == [16813, 377]
    assert tokenizer.encode("'REP") == [90902, 47]


def test_decode_cases(tokenizer):
    for case in CASES["decode_cases"]:
        assert tokenizer.decode(case["ids"], skip_special=False) == case["text"], case
        assert tokenizer.decode(case["ids"]) == case["text_skip_special"], case


def test_token_bytes(tokenizer):
    for id, content in CASES["token_bytes_hex"].items():
        assert tokenizer.token_bytes(int(id)).hex() == content, id


def test_tokens_that_encoding_never_yields(tokenizer):
    stored = json.loads((real_tokenizer.STORED / "unreachable_tokens.json").read_text("utf-8"))
    for id, text, _ in stored:
        assert tokenizer.decode([id]) == text
        assert id not in tokenizer.encode(text)


@pytest.mark.parametrize("case", CASES["stream_cases"], ids=lambda case: case["text"][:12])
def test_stream_cases(tokenizer, case):
    """After each token everything is out that is whole, at the latest when the reference has it."""
    decoder = tokenizer.stream(skip_special=False)
    out, reference = "", ""
    for id, piece, prefix in zip(case["ids"], case["pieces"], case["prefix_texts"], strict=True):
        out += decoder.push(id)
        reference += piece or ""
        assert out.startswith(reference)
        assert prefix.startswith(out)
        assert set(prefix[len(out) :]) <= {"\ufffd"}
    out += decoder.finish()
    assert out == tokenizer.decode(case["ids"], skip_special=False)


def random_ids(seed: int, size: int, limit: int) -> list[int]:
    rng = random.Random(seed)
    ranges = [(0, 256), (0, limit), (248044, 248077)]  # bytes, anything, added tokens
    return [rng.randrange(*rng.choice(ranges)) for _ in range(size)]


@pytest.mark.parametrize("skip_special", [True, False])
def test_stream_equals_decode(tokenizer, skip_special):
    for seed in range(200):
        ids = random_ids(seed, 30, 248320)
        decoder = tokenizer.stream(skip_special=skip_special)
        pieces = [decoder.push(id) for id in ids] + [decoder.finish()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special)


def test_round_trip_is_nfc(tokenizer):
    """decode(encode(x)) is x in NFC, for any x without special tokens in it."""
    rng = random.Random(1)
    ranges = [
        (32, 127),
        (0, 32),
        (0xA0, 0x600),
        (0x600, 0x1000),
        (0x1E00, 0x3100),
        (0x4E00, 0xA000),
    ]
    ranges += [(0xAC00, 0xD7A4), (0x300, 0x370), (0x1F300, 0x1FA00), (0x10000, 0x10FFFF)]
    for _ in range(500):
        low, high = rng.choice(ranges)
        mixed = [rng.randrange(low, high) for _ in range(20)] + [rng.randrange(0x300, 0x370), 32]
        text = "".join(chr(code) for code in mixed if not 0xD800 <= code < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_every_added_token_encodes_to_itself(tokenizer):
    stored = json.loads(real_tokenizer.files()["tokenizer_config.json"])["added_tokens_decoder"]
    assert len(stored) == 33
    for id, entry in stored.items():
        assert tokenizer.encode(entry["content"]) == [int(id)]
        apart = tokenizer.encode(entry["content"], special=False)
        assert len(apart) > 1
        assert int(id) not in apart
        assert tokenizer.decode(apart) == entry["content"]
        assert (tokenizer.decode([int(id)]) == "") == entry["special"]


def test_special_parsing_can_be_turned_off(tokenizer):
    text = "a<|im_end|>\n<|im_start|>system\nb<think>c</think>"
    ids = tokenizer.encode(text, special=False)
    assert max(ids) < 248044
    assert tokenizer.decode(ids) == text


def test_ids_beyond_the_tokenizer_have_no_text(tokenizer):
    assert tokenizer.vocab_size == len(tokenizer) == 248077
    assert tokenizer.decode([9419, 248077, 248319, 10**9, 1814]) == "Hello world"
    decoder = tokenizer.stream()
    assert [decoder.push(id) for id in (9419, 248300, 1814)] == ["Hello", "", " world"]
    assert tokenizer.decode(np.array([9419, 1814])) == "Hello world"
    assert tokenizer.decode(iter([9419, 1814])) == "Hello world"


def test_decoder_holds_back_half_characters(tokenizer):
    decoder = tokenizer.stream()
    crab = tokenizer.encode("🦀")
    assert len(crab) > 1
    assert [decoder.push(id) for id in crab[:-1]] == [""] * (len(crab) - 1)
    assert decoder.push(crab[-1]) == "🦀"
    assert decoder.push(crab[0]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""


REPEATED = [" ", "a", "1", "\n", "!", "\u0301", "世", "🦀", "a\u0301", "<", "<|im_start|", " \n"]


@pytest.mark.parametrize("unit", REPEATED)
def test_long_runs_are_whole(tokenizer, unit):
    """A megabyte of one character takes the same path as a hundredth of it, only longer."""
    short, long = (unit * (size // len(unit)) for size in (10_000, 1_000_000))
    few, many = len(tokenizer.encode(short)), tokenizer.encode(long)
    assert 0.98 * 100 * few <= len(many) <= 1.02 * 100 * few
    assert tokenizer.decode(many) == unicodedata.normalize("NFC", long)


def test_endless_white_space_is_refused(tokenizer):
    with pytest.raises(qdelta.ArgumentError, match="run of 6000000 white space"):
        tokenizer.encode("a" + " " * 6_000_000)


@pytest.mark.parametrize("name", ["tiny-f32", "tiny-k256-bf16"])
def test_folder(name):
    tokenizer = qdelta.Tokenizer(TEXT / name)
    assert tokenizer.vocab_size == 481
    text = "Hello, wörld <|im_end|> 🦀"
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_demo():
    tokenizer = qdelta.Tokenizer("demo")
    assert tokenizer.encode("Once upon a time, there was a little") == [
        889, 643, 258, 497, 11, 434, 301, 258, 442,
    ]  # fmt: skip


# Files that are damaged or of another kind


@pytest.fixture(scope="module")
def tiny() -> dict[str, bytes]:
    return vocabulary.read_folder(TEXT / "tiny-f32")


def changed(files: dict[str, bytes], name: str, change) -> dict[str, bytes]:
    value = json.loads(files[name])
    change(value)
    return {**files, name: json.dumps(value).encode()}


def test_tokenizer_files_missing():
    with pytest.raises(qdelta.FileError, match=r"tokenizer\.json: missing"):
        qdelta.Tokenizer.from_files({})


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_truncated_files(tiny, name):
    content = tiny[name]
    for size in range(0, len(content) - 1, max(1, len(content) // 60)):
        with pytest.raises(qdelta.FileError, match=name):
            qdelta.Tokenizer.from_files({**tiny, name: content[:size]})


def test_added_tokens_that_contradict(tiny):
    def change(config):
        config["added_tokens_decoder"]["450"]["content"] = "<|other|>"

    with pytest.raises(qdelta.FileError, match="added token 450"):
        qdelta.Tokenizer.from_files(changed(tiny, "tokenizer_config.json", change))


def test_added_tokens_with_one_text(tiny):
    def change(config):
        config["added_tokens_decoder"]["500"] = {"content": "<|im_end|>"}

    with pytest.raises(qdelta.FileError, match="share one text"):
        qdelta.Tokenizer.from_files(changed(tiny, "tokenizer_config.json", change))


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("x", "<|x|>"),
        ("-1", "<|x|>"),
        ("9" * 20, "<|x|>"),
        ("500", ""),
        ("500", 5),
        ("500", "\ud800"),
    ],
)
def test_malformed_added_tokens(tiny, key, content):
    def change(config):
        config["added_tokens_decoder"][key] = {"content": content}

    with pytest.raises(qdelta.FileError, match="malformed"):
        qdelta.Tokenizer.from_files(changed(tiny, "tokenizer_config.json", change))


def test_added_tokens_may_leave_gaps(tiny):
    def change(config):
        config["added_tokens_decoder"]["500"] = {"content": "<|far|>", "special": True}

    tokenizer = qdelta.Tokenizer.from_files(changed(tiny, "tokenizer_config.json", change))
    assert tokenizer.vocab_size == 501
    assert tokenizer.encode("<|far|>") == [500]
    assert tokenizer.decode([490, 500], skip_special=False) == "<|far|>"


def split_at(file: dict, pattern: str) -> None:
    file["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t["model"].update(type="WordPiece", unk_token="?"), qdelta.Error),
        (lambda t: t["model"]["merges"].append(["zz", "qq"]), qdelta.FileError),
        (lambda t: t["pre_tokenizer"]["pretokenizers"].append({"type": "?"}), qdelta.FileError),
        (lambda t: split_at(t, "(["), qdelta.FileError),
        (lambda t: t["added_tokens"][0].update(lstrip=True), qdelta.UnsupportedError),
        (lambda t: t["added_tokens"][0].update(id=7), qdelta.FileError),
        (lambda t: t["added_tokens"][0].update(content="a"), qdelta.FileError),
        (lambda t: t["added_tokens"][0].update(content=""), qdelta.FileError),
        (lambda t: t["added_tokens"][0].update(id=2**31), qdelta.FileError),
        (lambda t: t["added_tokens"].append({**t["added_tokens"][0], "content": "<|x|>"}),
         qdelta.FileError),
        (lambda t: t["model"]["vocab"].update(b=2**31), qdelta.FileError),
        (lambda t: t["model"]["merges"].append(["a", "b", "c"]), qdelta.FileError),
        (lambda t: t["model"]["merges"].append("a b c"), qdelta.FileError),
        (lambda t: t.update(model={"type": "Unigram", "vocab": [["a", 0]]}),
         qdelta.UnsupportedError),
        (lambda t: t.update(version="2.0"), qdelta.UnsupportedError),
        (lambda t: t["model"].update(dropout=0.1), qdelta.UnsupportedError),
        (lambda t: t["model"].update(unk_token="a"), qdelta.UnsupportedError),
        (lambda t: t["model"].update(end_of_word_suffix="</w>"), qdelta.UnsupportedError),
        (lambda t: t["model"].update(byte_fallback=True), qdelta.UnsupportedError),
        (lambda t: t["model"].update(ignore_merges=True), qdelta.UnsupportedError),
        (lambda t: t["model"]["vocab"].update(new=0), qdelta.FileError),
    ],
)  # fmt: skip
def test_other_kinds_of_tokenizer(tiny, change, error):
    with pytest.raises(error, match=r"tokenizer\.json"):
        qdelta.Tokenizer.from_files(changed(tiny, "tokenizer.json", change))


def test_merges_of_older_files(tiny):
    """Pairs in one text, with a space between them."""

    def change(file):
        file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
        del file["model"]["type"]

    older = qdelta.Tokenizer.from_files(changed(tiny, "tokenizer.json", change))
    for case in CASES["text_cases"]:
        assert older.encode(case["text"]) == qdelta.Tokenizer.from_files(tiny).encode(case["text"])


def test_damaged_bytes(tiny):
    """One changed byte: a tokenizer or an exception of ours, nothing else."""
    rng = random.Random(0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for _ in range(400):
            content = bytearray(tiny[name])
            content[rng.randrange(len(content))] = rng.randrange(256)
            try:
                tokenizer = qdelta.Tokenizer.from_files({**tiny, name: bytes(content)})
                tokenizer.decode(tokenizer.encode("Hello <|im_end|> wörld 12 \n"))
            except qdelta.Error:
                continue


def test_pattern_that_the_library_gives_up_on(tiny, capfd):
    files = changed(tiny, "tokenizer.json", lambda t: split_at(t, "(a+)+[bc]"))
    tokenizer = qdelta.Tokenizer.from_files(files)
    for size in (100, 10_000):
        with pytest.raises(qdelta.FileError, match=r"tokenizer\.json"):
            tokenizer.encode("a" * size)
    capfd.readouterr()  # the library writes about it


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ('{"a": -1}', "", "id -1"),
        ('{"a": "b"}', "", "id 'b'"),
        ('["a"]', "", "an object expected"),
        ('{"a": 0, "b": 1, "ab": 2}', "a b c", "merges.txt:1: two tokens expected, found 3"),
        ('{"a": 0}', "a b", "not a usable tokenizer"),
        ('{"a": 0}', "#version\na", "merges.txt:2: two tokens expected, found 1"),
        ('{"a": 0', "", "vocab.json"),
    ],
)
def test_bad_vocab_and_merges(vocab, merges, message):
    with pytest.raises(qdelta.FileError, match=message):
        qdelta.Tokenizer.from_files({"vocab.json": vocab.encode(), "merges.txt": merges.encode()})


def test_a_gguf_file_that_is_cut_short(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(qdelta.FileError, match=r"model.gguf: .* cut short"):
        qdelta.Tokenizer(tmp_path / "model.gguf")
