"""GPT-2's byte-pair encoding: text to token ids and back (Radford et al. 2019, section 2.2).

A text is split into words (or numbers, or punctuation). Each word becomes its UTF-8 bytes, and each
byte is written as one printable character. Adjacent symbols are then merged into longer and longer
tokens, following a list of merges that was learned from the training text: "Neural Machine
Translation of Rare Words with Subword Units" (Sennrich et al. 2016), section 3.2. (`learn_merges`
in tests/train_toy.py learns such a list.) The vocabulary of 50,257 tokens is the 256 bytes, the
results of 50,000 merges, and `<|endoftext|>`.
"""

import codecs
import itertools
import json
import os

import regex

# What counts as a word. At each position, the first of these patterns that matches is used:
#
# "'(?:s|t|re|ve|m|ll|d)"   the end of a contraction, in lowercase: "don't" is "don" and "'t"
# " ?\p{L}+"                letters, with the space before them, if any
# " ?\p{N}+"                digits, with the space before them, if any
# " ?[^\s\p{L}\p{N}]+"      other symbols, with the space before them, if any
# "\s+(?!\S)"               whitespace up to the end of the text, or before a word: then all but its
#                           last character, so that a space goes with the word: "a  b" is "a", " ",
#                           " b"
# "\s+"                     what is left: a last character that is not a space, as in "a\n\nb",
#                           which is "a", "\n", "\n", "b"
PATTERN = regex.compile(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def bytes_to_unicode():
    """Map each of the 256 bytes to a printable character.

    So any token, even a space or half a character, can be written in the text files encoder.json
    and vocab.bpe. A byte that is a visible Latin-1 character is written as that character (so "é",
    two bytes in UTF-8, becomes "Ã©"). The other 68 bytes take the characters from U+0100 on, in
    order: a space (32) is "Ġ", a newline (10) "Ċ". Returns {byte: character}.
    """
    visible = [*range(ord("!"), ord("~") + 1)]
    visible += [*range(ord("¡"), ord("¬") + 1)]
    visible += [*range(ord("®"), ord("ÿ") + 1)]
    characters = {byte: chr(byte) for byte in visible}
    others = [byte for byte in range(256) if byte not in characters]
    return characters | {byte: chr(256 + i) for i, byte in enumerate(others)}


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
        """Split a word into tokens, separated by spaces: "Ġlower" -> "Ġlow er".

        While any two adjacent symbols can be merged, merge the pair that was learned first (the one
        with the lowest rank) wherever it occurs, from left to right.

        token: the whole word (OpenAI's name for it), in characters of `bytes_to_unicode`. None of
        them is a space, so a space can separate the tokens.
        """
        symbols = list(token)
        while pairs := [pair for pair in itertools.pairwise(symbols) if pair in self.bpe_ranks]:
            best_pair = min(pairs, key=self.bpe_ranks.get)
            merged = []
            for symbol in symbols:
                if merged and (merged[-1], symbol) == best_pair:
                    merged[-1] += symbol  # now longer than best_pair[0], so it cannot match again
                else:
                    merged.append(symbol)
            symbols = merged
        return " ".join(symbols)

    def encode(self, text):
        """Text -> list of token ids. `<|endoftext|>` is treated as text, not as the special token.

        A str can contain surrogates, halves of characters in UTF-16 that UTF-8 cannot encode.
        Two that belong together become their character. Any other, such as Python's stand-in for a
        byte of the command line that is not UTF-8, becomes U+FFFD, the replacement character.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = []
        for word in PATTERN.findall(text):
            symbols = "".join(self.byte_encoder[byte] for byte in word.encode())
            ids += [self.encoder[token] for token in self.bpe(symbols).split(" ")]
        return ids

    def decode(self, ids):
        """Token ids -> text. Invalid UTF-8 becomes U+FFFD (or whatever `errors` says).

        Raises KeyError for an id outside the vocabulary.
        """
        return "".join(self.decode_each(ids))

    def decode_each(self, ids):
        """Yield the text of each token id, as `decode` does for all of them together.

        A token may end in the middle of a character. Its bytes are kept until the last one comes.
        If that never comes, there is one more piece at the end.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")(self.errors)
        for i in ids:
            yield utf8.decode(bytes(self.byte_decoder[char] for char in self.decoder[i]))
        yield from utf8.decode(b"", final=True)  # an incomplete character at the end is invalid


def get_encoder(model_name, models_dir):
    """Build the Encoder from <models_dir>/<model_name>/encoder.json and vocab.bpe.

    Raises ValueError or TypeError if the files do not match or are damaged, OSError if one cannot
    be read.
    """
    with open(os.path.join(models_dir, model_name, "encoder.json"), encoding="utf-8") as file:
        encoder = json.load(file)
    with open(os.path.join(models_dir, model_name, "vocab.bpe"), encoding="utf-8") as file:
        _version, *lines = file.read().splitlines()
    merges = [(first, second) for first, second in map(str.split, lines)]  # two on each line
    expected = {*bytes_to_unicode().values(), *map("".join, merges), "<|endoftext|>"}
    if set(encoder) != expected:
        raise ValueError("encoder.json and vocab.bpe have different tokens")
    if set(encoder.values()) != set(range(len(encoder))):
        raise ValueError("the ids in encoder.json are not 0, 1, 2, ...")
    return Encoder(encoder, merges)
