"""GPT-2's byte-pair encoding: text to token ids and back (Radford et al. 2019, section 2.2).

A text is split into words (or numbers, or punctuation), so that no token spans two of them. Each
word becomes its UTF-8 bytes, and each byte is written as one printable character, a symbol.
Adjacent symbols are then merged into longer and longer ones, following a list of merges: the most
frequent pairs of the training text, found one after another (see `learn_merges` in
tests/tools/train_toy.py). "Neural Machine Translation of Rare Words with Subword Units" (Sennrich
et al. 2016), section 3.2. The vocabulary of 50,257 tokens is the 256 bytes, 50,000 merged pairs,
and `<|endoftext|>`.
"""

import codecs
import itertools
import json
from pathlib import Path

import regex

# What counts as a word. At each position of the text, the first of these alternatives that matches
# is used. (Python's re has neither \p{L}, any letter of Unicode, nor \p{N}, any number, even ½. \s
# is any whitespace, and (?!\S) means that what follows is whitespace or the end of the text. As
# VERBOSE ignores spaces, a space is written [ ].)
PATTERN = regex.compile(
    r"""
      '(?:s|t|re|ve|m|ll|d)    # the end of a contraction, in lowercase: "don't" is "don" and "'t"
    | [ ]?\p{L}+               # letters, with the space before them, if any
    | [ ]?\p{N}+               # numbers, with the space before them, if any
    | [ ]?[^\s\p{L}\p{N}]+     # other characters, with the space before them, if any
    | \s+(?!\S)                # whitespace, without its last character if a word follows, so that a
                               # last space goes with the word: "a  b" is "a", " ", " b"
    | \s+                      # what is left: a single whitespace character, not a space, in front
                               # of a word: "a\n\nb" is "a", "\n", "\n", "b"
    """,
    regex.VERBOSE,
)


def bytes_to_unicode():
    """Map each of the 256 bytes to a printable character.

    This way, any token, even a space or half a character, can be written in the text files
    encoder.json and vocab.bpe. A byte that is a visible Latin-1 character is written as that
    character (so "é", two bytes in UTF-8, becomes "Ã©"). The other 68 bytes take the characters
    from U+0100 on, in order: a space (32) is "Ġ", a newline (10) "Ċ". Returns {byte: character}.

    The order matters, because the place of a byte in this dict is its id in the vocabulary. The
    visible ones come first, so "!" (33) has id 0, and the space (32), after 188 visible bytes and 0
    to 31, has id 220.
    """
    visible = list(range(ord("!"), ord("~") + 1))
    visible += range(ord("¡"), ord("¬") + 1)  # between these two is the invisible soft hyphen
    visible += range(ord("®"), ord("ÿ") + 1)
    characters = {byte: chr(byte) for byte in visible}
    others = [byte for byte in range(256) if byte not in characters]
    for i, byte in enumerate(others):
        characters[byte] = chr(256 + i)
    return characters


class Encoder:
    """GPT-2's tokenizer.

    encoder: the vocabulary, {token: id}; a token is a string of `bytes_to_unicode` characters.
    bpe_merges: pairs of tokens, in the order in which they were learned.
    errors: how invalid UTF-8 is decoded, as in bytes.decode.

    "I don't", step by step, with only four merges:

    >>> merges = [("o", "n"), ("'", "t"), ("d", "on"), ("d", "o")]
    >>> tokens = [*bytes_to_unicode().values(), "on", "'t", "don", "do"]  # ids 0 to 255, 256 to 259
    >>> toy = Encoder({token: i for i, token in enumerate(tokens)}, merges)
    >>> PATTERN.findall("I don't")  # text -> words
    ['I', ' don', "'t"]
    >>> list(" don".encode())  # word -> bytes
    [32, 100, 111, 110]
    >>> "".join(toy.byte_encoder[byte] for byte in " don".encode())  # bytes -> symbols
    'Ġdon'
    >>> toy.bpe("Ġdon")  # Ġ d o n -> Ġ d on -> Ġ don, as "o n" was learned before "d o"
    'Ġ don'
    >>> [toy.encoder[token] for token in ["Ġ", "don"]]  # tokens -> ids
    [220, 258]
    >>> toy.encode("I don't")  # all of it
    [40, 220, 258, 257]
    >>> toy.decode([40, 220, 258, 257])
    "I don't"

    The released vocabulary has a token for " don": there, "I don't" is [40, 836, 470].
    """

    def __init__(self, encoder, bpe_merges, errors="replace"):
        self.encoder = encoder
        self.decoder = {i: token for token, i in encoder.items()}
        self.bpe_ranks = {pair: rank for rank, pair in enumerate(bpe_merges)}
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {character: byte for byte, character in self.byte_encoder.items()}
        self.errors = errors

    def bpe(self, token):
        """Split a word into tokens: "Ġdon" -> "Ġ don" in the example above.

        While any two adjacent symbols can be merged, merge the pair that was learned first (the one
        with the lowest rank) wherever it occurs, from left to right. The order matters, because
        each pair was learned after all earlier ones had been merged.

        token: a word, in characters of `bytes_to_unicode`. As in OpenAI's code, the parameter is
        called token, and the result is one string, with spaces between the tokens.
        """
        symbols = list(token)
        while True:
            pairs = [pair for pair in itertools.pairwise(symbols) if pair in self.bpe_ranks]
            if not pairs:
                return " ".join(symbols)
            best_pair = min(pairs, key=self.bpe_ranks.get)
            merged = []
            for symbol in symbols:
                if merged and (merged[-1], symbol) == best_pair:
                    merged[-1] += symbol  # "aaa" gives "aa a": "aa" no longer matches
                else:
                    merged.append(symbol)
            symbols = merged

    def encode(self, text):
        """Text -> list of token ids. `<|endoftext|>` is treated as text, not as the special token.

        What UTF-8 cannot encode (lone surrogates, as from a command line in another encoding)
        becomes "?".
        """
        ids = []
        for word in PATTERN.findall(text):
            utf8 = word.encode("utf-8", errors="replace")
            symbols = "".join(self.byte_encoder[byte] for byte in utf8)
            tokens = self.bpe(symbols).split(" ")
            ids += [self.encoder[token] for token in tokens]
        return ids

    def decode(self, ids):
        """Token ids -> text. Invalid UTF-8 becomes U+FFFD (or whatever `errors` says).

        Raises KeyError for an id outside the vocabulary.
        """
        return "".join(self.decode_each(ids))

    def decode_each(self, ids):
        """Yield the text piece by piece; joined, the pieces are what `decode` returns.

        There is a piece, perhaps empty, for each id. If a token ends in the middle of a character,
        its last bytes are kept until the rest of them comes. One more piece follows at the end: it
        is empty, unless the last character is incomplete.
        """
        IncrementalDecoder = codecs.getincrementaldecoder("utf-8")
        utf8_decoder = IncrementalDecoder(self.errors)
        for token_id in ids:
            token = self.decoder[token_id]
            utf8 = bytes(self.byte_decoder[character] for character in token)
            yield utf8_decoder.decode(utf8)  # only whole characters; the rest waits in the decoder
        yield utf8_decoder.decode(b"", final=True)


class MismatchError(ValueError):
    """encoder.json and vocab.bpe do not belong together; perhaps vocab.bpe is truncated."""


def get_encoder(model_name, models_dir):
    """Build the Encoder from <models_dir>/<model_name>/encoder.json and vocab.bpe.

    encoder.json may have extra tokens, as after fine-tuning.
    Raises JSONDecodeError or UnicodeDecodeError if encoder.json is damaged, MismatchError if the
    two do not belong together, as when vocab.bpe is truncated (all three are ValueErrors), and
    OSError if one of them cannot be read.
    """
    folder = Path(models_dir, model_name)
    text = (folder / "encoder.json").read_text("utf-8")
    encoder = json.loads(text)

    # errors="replace", because a file that is cut off in the middle of a character should fail the
    # comparison below, and not raise an error here
    text = (folder / "vocab.bpe").read_text("utf-8", errors="replace")
    lines = text.splitlines()[1:]  # without the first one, "#version: 0.2"
    merges = [tuple(line.split()) for line in lines]

    # the tokens and their ids follow from the merges
    tokens = list(bytes_to_unicode().values())
    tokens += ["".join(pair) for pair in merges]
    tokens.append("<|endoftext|>")
    expected = {token: i for i, token in enumerate(tokens)}
    if not expected.items() <= encoder.items():  # that is, if they are not a subset
        raise MismatchError(f"{folder / 'vocab.bpe'} does not match encoder.json")
    return Encoder(encoder, merges)
