"""GPT-2's byte-pair encoding: text to token ids and back (OpenAI's src/encoder.py; Radford et al. 2019, section 2.2).

Text is split into words, each word is written as its UTF-8 bytes, and neighbouring bytes are merged into ever longer
tokens, in the order in which the merges were learned from the training text (Sennrich et al. 2016, section 3.2).
"""

import contextlib
import heapq
import itertools
import json
import os

import regex

# A contraction's ending ("don't" is split into "don" and "'t"; "DON'T" is not: into "DON", "'" and "T"), letters,
# numbers, other signs (each with at most one space before it), or white space, which leaves its last character to what
# follows: "a  b" is "a", " " and " b".
PATTERN = regex.compile(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


class UserError(ValueError):
    """What a user can fix: the command line shows it in one line. Other ValueErrors are bugs, with a traceback."""


@contextlib.contextmanager
def blame(path, *errors):
    """Turn an error in this `with`, caused by what the file at path contains, into a UserError that names the file."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, *errors) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run this again") from error


def bytes_to_unicode():
    """Give each of the 256 bytes a printable character of its own, so that each token is printable text without spaces.

    Returns {byte: character}. A printable Latin-1 byte keeps its character; the 68 others take those from U+0100 on,
    in order: a space (32) is "Ġ", a newline (10) is "Ċ". From OpenAI's src/encoder.py.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def get_pairs(word):
    """The set of neighbours in a word, a sequence of symbols: "abab" -> {("a", "b"), ("b", "a")}."""
    return set(itertools.pairwise(word))


class Encoder:
    """The vocabulary and the merges, and what they do to a text.

    encoder: {token: id}, a token being a string of `bytes_to_unicode` characters.
    bpe_merges: pairs of such strings, the first learned first.
    errors: what `decode` does with bytes that are not valid UTF-8, as in bytes.decode.

    >>> merges = [("l", "o"), ("lo", "w"), ("Ġ", "low")]
    >>> tokens = [*bytes_to_unicode().values(), *(a + b for a, b in merges)]
    >>> toy = Encoder({token: i for i, token in enumerate(tokens)}, merges)
    >>> toy.bpe("Ġlower")  # l o -> lo, then lo w -> low, then Ġ low -> Ġlow; no merge begins with "e"
    'Ġlow e r'
    >>> toy.encode("low lower")
    [257, 258, 68, 81]
    >>> toy.decode([257, 258, 68, 81])
    'low lower'
    """

    def __init__(self, encoder, bpe_merges, errors="replace"):
        self.encoder = encoder
        self.decoder = {i: token for token, i in encoder.items()}
        self.bpe_ranks = {tuple(pair): rank for rank, pair in enumerate(bpe_merges)}
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {character: byte for byte, character in self.byte_encoder.items()}
        self.errors = errors

    def bpe(self, token):
        """Merge a word, one character a byte, into tokens; returns them with blanks between: "Ġlower" -> "Ġlow e r".

        Of all neighbours that some merge joins, those whose merge was learned first are merged first, from left to
        right, until no merge applies. A heap finds them: looking through the whole word for each would take minutes
        for a word of 100,000 letters. From OpenAI's src/encoder.py, which does look through the whole word.
        """
        if self.bpe_ranks.keys().isdisjoint(get_pairs(token)):
            return " ".join(token)
        word = [*token, ""]  # symbols; one that was merged into its left neighbour becomes "", as is the end
        left, right = list(range(-1, len(token))), list(range(1, len(word)))  # where a symbol's neighbours stand
        heap = []  # (rank, place of the left symbol) of each merge that may be done

        def push(i):
            rank = self.bpe_ranks.get((word[i], word[right[i]]))
            if rank is not None:
                heapq.heappush(heap, (rank, i))

        for i in range(len(token)):
            push(i)
        while heap:
            rank, i = heapq.heappop(heap)
            if self.bpe_ranks.get((word[i], word[right[i]])) != rank:
                continue  # one of the two has been merged with another since
            j = right[i]
            word[i], word[j] = word[i] + word[j], ""
            right[i], left[right[j]] = right[j], i
            push(i)
            if left[i] >= 0:
                push(left[i])
        return " ".join(symbol for symbol in word if symbol)

    def encode(self, text):
        """Text -> list of token ids. `<|endoftext|>` is text like any other. An unpaired surrogate counts as U+FFFD."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # pairs are joined
        ids = []
        for word in PATTERN.findall(text):
            symbols = "".join(self.byte_encoder[byte] for byte in word.encode())
            ids += [self.encoder[token] for token in self.bpe(symbols).split(" ")]
        return ids

    def decode(self, ids):
        """Token ids -> text. A character may span tokens; bytes that make none become U+FFFD (errors="replace").

        Raises KeyError for an id that the vocabulary has not.
        """
        symbols = "".join(self.decoder[i] for i in ids)
        return bytes(self.byte_decoder[symbol] for symbol in symbols).decode("utf-8", errors=self.errors)


def get_encoder(model_name, models_dir):
    """Read <models_dir>/<model_name>/encoder.json and vocab.bpe; returns an Encoder.

    Raises UserError (a ValueError) naming the file, or both, that may be damaged, OSError if one cannot be read.
    """
    json_path, bpe_path = (os.path.join(models_dir, model_name, name) for name in ("encoder.json", "vocab.bpe"))
    with blame(bpe_path), open(bpe_path, encoding="utf-8") as file:
        version, *lines, rest = file.read().split("\n")
        merges = [(first, second) for first, second in map(str.split, lines)]
        if not version.startswith("#version") or rest:
            raise ValueError("it begins with no #version, or ends in the middle of a line")
    with blame(json_path), open(json_path, encoding="utf-8") as file:
        vocabulary = json.load(file)
        if set(vocabulary.values()) != set(range(len(vocabulary))):
            raise ValueError("its ids are not 0, 1, 2 and so on")
    if vocabulary.keys() != {*bytes_to_unicode().values(), *map("".join, merges), "<|endoftext|>"}:
        raise UserError(f"{json_path} or {bpe_path} is damaged (their tokens differ): delete both and run this again")
    return Encoder(vocabulary, merges)
