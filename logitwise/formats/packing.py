"""Codes of a few bits as a dense little-endian bit stream in 32-bit words.

Code i of a row takes bits i * bits .. (i + 1) * bits - 1 of the row's stream, lowest bit first, and may go on in the
next word; bit k of the stream is bit k % 32 of word k // 32. The bits after the last code are zero.
"""

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from logitwise.errors import FormatError

WORD = 32


def words_of(count: int, bits: int) -> int:
    """How many words `count` codes take."""
    return -(-count * bits // WORD)


def pack_codes(codes: UInt8[Tensor, "rows count"], bits: int) -> Int32[Tensor, "rows words"]:
    """Unsigned codes of 2 to 8 bits, packed along their rows into ceil(count * bits / 32) words.

    Errors: FormatError where a code takes more bits, since it would run into its neighbours.
    """
    rows, count = codes.shape
    if codes.numel() and int(codes.max()) >> bits:
        raise FormatError(
            f"code {int(codes.max())} cannot be packed", f"{bits} bits hold 0 to {2**bits - 1}", "report this as a bug"
        )
    # 32 codes fill `bits` whole words, so every 32nd code starts at the same place of a word.
    repeats = -(-count // WORD)
    padded = torch.nn.functional.pad(codes, (0, repeats * WORD - count)).reshape(rows, repeats, WORD)
    words = torch.zeros(rows, repeats, bits, dtype=torch.int32, device=codes.device)
    for i in range(WORD):
        word, offset = divmod(i * bits, WORD)
        code = padded[..., i].int()
        words[..., word] |= code << offset
        if offset + bits > WORD:
            words[..., word + 1] |= code >> (WORD - offset)
    return words.view(rows, repeats * bits)[:, : words_of(count, bits)].contiguous()


def unpack_codes(words: Int32[Tensor, "rows words"], bits: int, count: int) -> UInt8[Tensor, "rows count"]:
    """The inverse of `pack_codes`: the first `count` codes of each row, which must have the words for them."""
    rows = words.shape[0]
    repeats = -(-count // WORD)
    padded = torch.nn.functional.pad(words, (0, repeats * bits - words.shape[1])).reshape(rows, repeats, bits)
    codes = torch.empty(rows, repeats, WORD, dtype=torch.uint8, device=words.device)
    for i in range(WORD):
        word, offset = divmod(i * bits, WORD)
        code = padded[..., word] >> offset
        if offset + bits > WORD:
            # The shift copies the sign into the upper bits; they belong to the next word.
            code = (code & (2 ** (WORD - offset) - 1)) | (padded[..., word + 1] << (WORD - offset))
        codes[..., i] = code & (2**bits - 1)
    return codes.view(rows, repeats * WORD)[:, :count].contiguous()
